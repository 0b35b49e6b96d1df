"""``ScorerModifier``: a modifier that multiplies the loss of a sequence scorer by a factor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lossmith.core.metrics import Source
from lossmith.modifiers.base import ModelMode
from lossmith.modifiers.configured_modifier import BuiltInModifier
from lossmith.modifiers.idle import ALONE
from lossmith.modifiers.summary import loss_metrics


class ScorerModifier(BuiltInModifier):
    """The base of the modifiers of SEQUENCE_SCORER: each gives a factor for the loss."""

    modes = (ModelMode.SEQUENCE_SCORER,)

    def idle_because(self, batch: int) -> str | None:
        """As for every modifier; here ``batch`` is the number of scores."""
        is_local = getattr(self.settings, "stats_scope", None) == "local"
        if is_local and self.seen.only_singles(batch):
            return ALONE.format(what="its factor is a statistic of a batch")
        return None

    @abstractmethod
    def factor(
        self, predictions: Tensor, targets: Tensor, where: Tensor
    ) -> tuple[Tensor, Mapping[str, Source]]:
        """The factor, a scalar, and metrics, from detached predictions [B] and targets [B]; ``where`` (bool)
        marks those that count."""

    def on_scores(self, predictions: Tensor, targets: Tensor, where: Tensor, loss: Tensor) -> Tensor:
        """The factor for a batch, and store its metrics; ``loss`` is the detached loss before the factor.

        Raises:
            TypeError: :meth:`factor` does not return a factor and metrics.
        """
        self.look_at(predictions.numel())
        answer: Any = self.factor(predictions, targets, where)
        is_pair = isinstance(answer, tuple) and len(answer) == 2
        if not is_pair or not isinstance(answer[0], Tensor) or answer[0].dim():
            raise TypeError(f"{self.name}.factor must return a scalar tensor and metrics; got {answer!r}")
        factor, metrics = answer
        self.keep_metrics({**metrics, **loss_metrics(loss, loss * factor)})
        return factor.detach()

    def modify_loss(
        self, logits: Tensor, targets: Tensor, loss: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        kwargs.setdefault("model_mode", ModelMode.SEQUENCE_SCORER)
        return super().modify_loss(logits, targets, loss, **kwargs)
