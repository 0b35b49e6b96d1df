"""Sums over ranks."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from lossmith.options import option

StatsScope = Annotated[
    Literal["local", "global"], option("whether statistics are those of this rank or of all")
]


def num_ranks() -> int:
    """How many ranks there are; 1 without a process group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()


def sum_over_ranks(values: Tensor, scope: StatsScope) -> Tensor:
    """The sum of detached ``values`` over all ranks; ``values`` itself if the scope is local.

    Every rank must make the same call.
    """
    if scope == "local" or num_ranks() == 1:
        return values
    total = values.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def gather_over_ranks(values: Tensor, length: int) -> Tensor:
    """Detached ``values`` [n] of all ranks, concatenated; n may differ, up to ``length``, and -inf fills the
    rest. Nothing waits for the device."""
    if num_ranks() == 1:
        return values.detach()
    padded = torch.nn.functional.pad(values.detach(), (0, length - len(values)), value=-torch.inf)
    found = [torch.empty_like(padded) for _ in range(num_ranks())]
    torch.distributed.all_gather(found, padded)
    return torch.cat(found)


def masked_mean(values: Tensor, where: Tensor, scope: StatsScope = "local") -> Tensor:
    """The mean of detached ``values`` where ``where`` (bool, same shape) is True, 0 if that is nowhere; over
    all ranks if the scope is global."""
    kept = torch.where(where, values, 0.0)
    total, count = sum_over_ranks(torch.stack([kept.sum(), where.sum().to(kept.dtype)]), scope)
    return total / count.clamp(min=1)
