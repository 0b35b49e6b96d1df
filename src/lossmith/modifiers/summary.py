"""Numbers that sum a batch up, computed when somebody looks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lossmith.metrics import Source


class Spread(NamedTuple):
    """Mean, extremes and population standard deviation."""

    mean: Tensor
    min: Tensor
    max: Tensor
    std: Tensor


def spread(values: Tensor, where: Tensor) -> Callable[[], Spread]:
    """The spread of ``values`` where ``where`` (bool, same shape); all 0 where nothing is."""

    @functools.cache
    def compute() -> Spread:
        count = where.sum().clamp(min=1)
        some = where.any()
        mean = torch.where(where, values, 0.0).sum() / count
        deviation = torch.where(where, values - mean, 0.0)
        lowest = torch.where(where, values, torch.inf).amin()
        highest = torch.where(where, values, -torch.inf).amax()
        std = (deviation.square().sum() / count).sqrt()
        return Spread(mean, torch.where(some, lowest, 0.0), torch.where(some, highest, 0.0), std)

    return compute


def loss_metrics(original: Tensor, final: Tensor, final_name: str = "final_loss") -> dict[str, Source]:
    """What a modifier made of a loss, both detached scalars; the ratio of 0 to 0 is 1."""
    return {
        "original_loss": original,
        final_name: final,
        "loss_ratio": lambda: torch.where(original == final, 1.0, final / original),
    }
