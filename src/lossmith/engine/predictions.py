"""``Predictions``: what a model says of the next token, as logits or as what they would be made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lossmith.engine.checks import check_logits
from lossmith.engine.rows.blocks import accumulation_dtype
from lossmith.engine.sampling import sample_ids
from lossmith.engine.statistics.raw import Needs
from lossmith.engine.statistics.stats import TokenStats
from lossmith.engine.sweep import logits_stats


class Predictions(ABC):
    """A distribution over V classes at every position [...]."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """V."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where they are."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """That of the statistics and of the loss."""

    @abstractmethod
    def check(self, targets: Tensor) -> None:
        """
        Raises:
            TypeError, ValueError: they and the targets [...] do not belong together.
        """

    @abstractmethod
    def stats(
        self,
        targets: Tensor,
        *,
        candidates: Tensor | None,
        class_weight: Tensor | None,
        temperature: Tensor | None,
        softcap: float | None,
        ignore_index: int,
        default_needs: Needs,
    ) -> TokenStats:
        """Lazy statistics at ``targets`` [...]; see :func:`lossmith.engine.sweep.logits_stats`."""

    @abstractmethod
    def sample(self, softcap: float | None) -> Tensor:
        """[...] an id drawn at every position, at temperature 1."""

    @abstractmethod
    def logits(self) -> Tensor:
        """[..., V], differentiable."""


@dataclass(frozen=True)
class Logits(Predictions):
    """Logits [..., V] that are there already."""

    values: Tensor

    @property
    def num_classes(self) -> int:
        return self.values.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.values.dtype)

    def check(self, targets: Tensor) -> None:
        check_logits(self.values, targets)

    def stats(
        self,
        targets: Tensor,
        *,
        candidates: Tensor | None,
        class_weight: Tensor | None,
        temperature: Tensor | None,
        softcap: float | None,
        ignore_index: int,
        default_needs: Needs,
    ) -> TokenStats:
        return logits_stats(
            self.values,
            targets,
            candidates=candidates,
            class_weight=class_weight,
            temperature=temperature,
            softcap=softcap,
            ignore_index=ignore_index,
            default_needs=default_needs,
        )

    def sample(self, softcap: float | None) -> Tensor:
        return sample_ids(self.values, softcap=softcap)

    def logits(self) -> Tensor:
        return self.values
