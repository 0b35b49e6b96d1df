"""``BaseLossModifier``: what a loss modifier is; subclass it to write your own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from typing import Any

from torch import Tensor, nn

from lossmith.metrics import Metrics


class ModelMode(Enum):
    """What a model predicts.

    LANGUAGE_MODEL: a token of the vocabulary at every position, logits [B, T, V].
    TOKEN_CLASSIFIER: a class at every position, logits [B, T, C].
    SEQUENCE_SCORER: a number in [0, 1] for the whole sequence, predictions [B].
    """

    LANGUAGE_MODEL = "language_model"
    TOKEN_CLASSIFIER = "token_classifier"
    SEQUENCE_SCORER = "sequence_scorer"

    @classmethod
    def _missing_(cls, value: object) -> ModelMode:
        for mode in cls:
            if isinstance(value, str) and value.lower() == mode.value:
                return mode
        known = ", ".join(repr(mode.value) for mode in cls)
        raise ValueError(f"model_mode must be one of {known}, or a ModelMode; got {value!r}")


class BaseLossModifier(nn.Module, ABC):
    """A loss modifier: write :meth:`modify_loss`, and a pipeline applies it.

    Args:
        config: ``enabled`` (default True) and the modifier's own parameters.

    Attributes:
        enabled: whether the pipeline applies it; may be changed at any time.
        config: the mapping that it was made from.
        name: what it is called in metrics and messages; its class's name.
        _metrics: numbers, or tensors of one element, to be shown by the last call.

    Example:
        >>> import torch, lossmith
        >>> class Doubled(lossmith.BaseLossModifier):
        ...     def modify_loss(self, logits, targets, loss, **kwargs):
        ...         self._metrics = {"before": loss.detach()}
        ...         return 2 * loss
        >>> pipeline = lossmith.LossModifierPipeline([Doubled({})])
        >>> pipeline.modify_loss(torch.zeros(1, 2, 4), torch.tensor([[0, 1]]), torch.tensor(1.5)).item()
        3.0
        >>> pipeline.get_all_metrics()
        {'Doubled.before': 1.5}
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config = {} if config is None else config
        self.name = type(self).__name__
        if not isinstance(self.config, Mapping):
            raise TypeError(f"{self.name}: config must be a mapping; got {type(config).__name__}")
        self.enabled = self.config.get("enabled", True)
        if not isinstance(self.enabled, bool):
            raise TypeError(f"{self.name}: enabled expects True or False; got {self.enabled!r}")
        self._metrics: Mapping[str, Any] = {}

    def supports_mode(self, mode: ModelMode) -> bool:
        """Whether the modifier means something for such a model; the pipeline passes over it otherwise."""
        return True

    @abstractmethod
    def modify_loss(
        self, logits: Tensor, targets: Tensor, loss: Tensor, **kwargs: Any
    ) -> Tensor | Mapping[str, Tensor]:
        """The modified loss.

        Args:
            logits: [..., T, V], or the predictions [B] of a sequence scorer.
            targets: [..., T] ids, or the targets [B] of a sequence scorer.
            loss: the reduced loss so far.
            kwargs: ``model_mode``, ``mask``, ``per_position_loss`` ([..., T], differentiable: the loss
                of each position so far, before any weighting), ``ignore_index``, ``stats``
                (:class:`lossmith.TokenStats` of the batch), ``denominator``, ``reduction``, ``input_ids``.

        Returns:
            A scalar, which takes the place of ``loss``; or ``{"per_position_loss": [..., T]}``, which
            takes the place of the per-position loss, to be weighted and reduced by the pipeline.
        """

    def get_metrics(self) -> Mapping[str, Any]:
        """The metrics of the last call, as floats once they are read."""
        return Metrics(self._metrics)

    def reset_metrics(self) -> None:
        """Forget the metrics."""
        self._metrics = {}
