"""Sums over ranks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

StatsScope = Literal["local", "global"]
STATS_SCOPES = ("local", "global")


def sum_over_ranks(values: Tensor, scope: StatsScope) -> Tensor:
    """The sum of detached ``values`` over all ranks; ``values`` where the scope is local.

    Every rank has to call this alike.
    """
    is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if scope == "local" or is_alone:
        return values
    total = values.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def masked_mean(values: Tensor, where: Tensor, scope: StatsScope = "local") -> Tensor:
    """The mean of detached ``values`` where ``where`` (bool, same shape), 0 where that is nowhere; over all
    ranks if the scope is global."""
    kept = torch.where(where, values, 0.0)
    total, count = sum_over_ranks(torch.stack([kept.sum(), where.sum().to(kept.dtype)]), scope)
    return total / count.clamp(min=1)
