"""``RunningMeans``: means of a loss's numbers over batches, robust to bad batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lossmith.core.metrics import Source

NUM_BATCHES, NUM_NONFINITE = "num_batches", "num_nonfinite"


class RunningMeans:
    """Sums over batches on their device, updated in place, so that replaying a CUDA graph updates them too.

    A batch with a number that is not finite enters no mean; it is counted separately.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, values: Mapping[str, Source], like: Tensor) -> None:
        """Add a batch.

        Args:
            values: its numbers, by name.
            like: a tensor with the device and dtype of the sums.
        """
        numbers = (source() if callable(source) else source for source in values.values())
        given = (torch.as_tensor(n, device=like.device).detach().to(like) for n in numbers)
        seen = torch.stack([value.sum() if value.dim() else value for value in given])
        is_finite = seen.isfinite().all()
        self._move(tuple(values), seen.masked_fill(~is_finite, 0.0))
        self._move((NUM_BATCHES, NUM_NONFINITE), torch.stack([is_finite, ~is_finite]).long())

    def _move(self, names: tuple[str, ...], by: Tensor) -> None:
        with torch.inference_mode(False):  # or training could not add to an evaluation's sums
            if names not in self._sums:
                self._sums[names] = torch.zeros_like(by)
            elif self._sums[names].device != by.device:
                self._sums[names] = self._sums[names].to(by.device)
            self._sums[names].add_(by)

    def read(self) -> dict[str, Any]:
        """The means as 0-dimensional tensors, and how many batches are in them and how many were left out."""
        sums: dict[str, Any] = {}
        for names, values in self._sums.items():  # several sets of names, if a part came and went
            for name, value in zip(names, values.unbind(), strict=True):
                sums[name] = sums.get(name, 0) + value
        counts = {name: sums.pop(name) for name in (NUM_BATCHES, NUM_NONFINITE) if name in sums}
        means = {name: total / counts[NUM_BATCHES] for name, total in sums.items()}
        return {**means, NUM_BATCHES: 0, **counts}
