"""``ScorerModifier``: a modifier that multiplies the loss of a sequence scorer by a factor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lossmith.core.metrics import Source
from lossmith.modifiers.base import ModelMode
from lossmith.modifiers.configured_modifier import ConfiguredModifier
from lossmith.modifiers.idle import ALONE, Singles
from lossmith.modifiers.summary import loss_metrics


class ScorerModifier(ConfiguredModifier):
    """The base of the modifiers of SEQUENCE_SCORER: they say by what to multiply the loss."""

    def __init__(self, config: Mapping[str, Any] | None = None, **parameters: Any) -> None:
        super().__init__(config, **parameters)
        self._singles = Singles()

    def supports_mode(self, mode: ModelMode) -> bool:
        return ModelMode(mode) is ModelMode.SEQUENCE_SCORER

    def idle_because(self, num_scores: int) -> str | None:
        """Why it cannot act on a batch of so many scores and those before it, and what to do, to be said once
        after the modifier's name; None where it can. It is asked once a batch, outside of compiled graphs."""
        if getattr(self.settings, "stats_scope", None) == "local" and self._singles.are_all(num_scores):
            return ALONE.format(what="its factor is a statistic of a batch")
        return None

    @abstractmethod
    def factor(
        self, predictions: Tensor, targets: Tensor, where: Tensor
    ) -> tuple[Tensor, Mapping[str, Source]]:
        """The factor, a scalar, and metrics, from detached predictions [B] and targets [B], ``where`` (bool)
        they count."""

    def record(self, factor: Tensor, metrics: Mapping[str, Source], loss: Tensor) -> None:
        """Keep the metrics of a batch whose loss, detached, was ``loss`` before this factor."""
        self.keep_metrics({**metrics, **loss_metrics(loss, loss * factor)})

    def modify_loss(
        self, logits: Tensor, targets: Tensor, loss: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The loss with this modifier alone; the arguments are those of
        :meth:`lossmith.LossModifierPipeline.modify_loss`."""
        from lossmith.modifiers.pipeline import LossModifierPipeline  # which applies modifiers

        kwargs.setdefault("model_mode", ModelMode.SEQUENCE_SCORER)
        return LossModifierPipeline([self]).modify_loss(logits, targets, loss, **kwargs)
