"""``Part``: predictions that a rank has a part of, and what it says of them as it stands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossmith.engine.predictions import Predictions


class Part(Predictions):
    """Predictions of which this rank has a part.

    Attributes:
        own: the predictions of this rank's part.
        shards: which part that is.
    """

    own: Any
    shards: Any
    # any statistic is a collective, which all ranks must take part in: what is always read is announced
    is_costly = True

    @property
    def num_classes(self) -> int:
        return self.own.num_classes

    @property
    def device(self) -> torch.device:
        return self.own.device

    @property
    def dtype(self) -> torch.dtype:
        return self.own.dtype

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        return self.own.tensors

    def check(self, targets: Tensor) -> None:
        self.own.check(targets)

    def capped(self, softcap: float | None) -> float | None:
        return self.own.capped(softcap)
