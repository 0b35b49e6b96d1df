"""Numbers that summarise a batch, computed when they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmith.core.distributed import masked_mean
from lossmith.core.metrics import Source


class Spread:
    """Mean, extremes and population std of ``values`` where ``where`` (bool, same shape); 0 if nowhere."""

    def __init__(self, values: Tensor, where: Tensor) -> None:
        self._values = values
        self._where = where

    def mean(self) -> Tensor:
        return masked_mean(self._values, self._where)

    def std(self) -> Tensor:
        return masked_mean((self._values - self.mean()).square(), self._where).sqrt()

    def min(self) -> Tensor:
        return self._if_any(torch.where(self._where, self._values, torch.inf).amin())

    def max(self) -> Tensor:
        return self._if_any(torch.where(self._where, self._values, -torch.inf).amax())

    def _if_any(self, value: Tensor) -> Tensor:
        return torch.where(self._where.any(), value, 0.0)

    def metrics(self, *names: str) -> dict[str, Source]:
        """The statistic that each name asks for by one of its words: ``min_weight`` is the minimum."""
        of_word = {"mean": self.mean, "std": self.std, "min": self.min, "max": self.max}
        return {name: of_word[word] for name in names for word in name.split("_") if word in of_word}


def loss_metrics(original: Tensor, final: Tensor, final_name: str = "final_loss") -> dict[str, Source]:
    """The loss before and after a modifier, detached scalars, and their ratio; 0 / 0 gives 1."""
    return {
        "original_loss": original,
        final_name: final,
        "loss_ratio": lambda: torch.where(original == final, 1.0, final / original),
    }
