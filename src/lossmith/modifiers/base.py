"""``BaseLossModifier``: the base of loss modifiers; subclass it to write your own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

from torch import Tensor, nn

from lossmith.core.former_names import former
from lossmith.core.metrics import Metrics
from lossmith.options import option, read_options


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
    def of(cls, value: ModelMode | str) -> ModelMode:
        """The mode, from a mode or its name."""
        return value if isinstance(value, ModelMode) else cls(value)  # graphs cannot construct an Enum

    @classmethod
    def _missing_(cls, value: object) -> ModelMode:
        text = value.value if isinstance(value, Enum) else value  # of the user's own enumeration
        for mode in cls:
            if isinstance(text, str) and text.lower() == mode.value:
                return mode
        known = ", ".join(repr(mode.value) for mode in cls)
        raise ValueError(f"model_mode must be one of {known}, or a ModelMode; got {value!r}")


@dataclass(frozen=True)
class Switch:
    """A switch, read like any other option."""

    enabled: Annotated[bool, option("whether the pipeline applies the modifier")] = True


def read_switch(value: Any, name: str) -> bool:
    """The value of a switch that the user calls ``name``; a TypeError unless it is True or False."""
    return read_options(Switch, {"enabled": value}, owner=name, key_of=lambda _: name).enabled


def given_parameters(
    name: str, config: Mapping[str, Any] | None, parameters: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The parameters of a modifier called ``name``: those of a mapping and those given by name."""
    config = {} if config is None else config
    if not isinstance(config, Mapping):
        raise TypeError(
            f"{name}: config must be a mapping of parameters, such as {{'enabled': True}}, or parameters are "
            f"given by name, enabled=True; got {config!r}"
        )
    twice = [given for given in parameters if given in config]
    if twice:
        raise TypeError(f"{name}: {twice[0]} is in the mapping and given by name; give it once")
    return {**config, **parameters} if parameters else config


class BaseLossModifier(nn.Module, ABC):
    """A loss modifier: write :meth:`modify_loss`, and a pipeline applies it.

    Args:
        config: ``enabled`` (default True) and the modifier's own parameters.
        parameters: the same by name, ``EntropyModifier(threshold=0.1)``.

    Attributes:
        enabled: whether the pipeline applies it; may be changed at any time.
        config: the mapping that it was made from.
        name: its name in metrics and messages: its class's name.
        idle_reason: why it cannot act on the batches so far; None if it can, or if that is not known.
        is_custom: whether a pipeline calls :meth:`modify_loss` and uses the result unchanged; lossmith's own
            modifiers have further methods that a pipeline calls instead.
        weighs: whether it weighs samples; a custom modifier does not.
        _metrics: numbers or one-element tensors, the metrics of the last call.

    Raises:
        TypeError: the config is not a mapping, a parameter is given twice, or ``enabled`` is not a bool.

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

    idle_reason: str | None = None
    is_custom: bool = True
    weighs: bool = False

    def __init__(self, config: Mapping[str, Any] | None = None, **parameters: Any) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.config = given_parameters(self.name, config, parameters)
        self.enabled = self.config.get("enabled", True)
        self._metrics: Mapping[str, Any] = {}

    @property
    def enabled(self) -> bool:
        return self._is_enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._is_enabled = read_switch(value, f"{self.name}: enabled")

    @former("is_enabled")
    def is_enabled(self) -> bool:
        """A former name of :attr:`enabled`; a pipeline calls it if a subclass overrides it."""
        return self.enabled

    def is_on(self) -> bool:
        """Whether a pipeline applies it: :attr:`enabled`, or ``is_enabled`` if a subclass overrides it."""
        has_own = type(self).is_enabled is not BaseLossModifier.is_enabled
        return bool(self.is_enabled()) if has_own else self.enabled

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """
        Raises:
            TypeError: always; only a pipeline applies a modifier.
        """
        raise TypeError(
            f"{self.name} is not called itself; put it into a LossModifierPipeline and call that, or write "
            "modifier.modify_loss(logits, targets)"
        )

    def supports_mode(self, mode: ModelMode) -> bool:
        """Whether the modifier applies to such a model; if not, the pipeline skips it."""
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
            A scalar, which replaces ``loss``; or ``{"per_position_loss": [..., T]}``, which replaces the
            per-position loss, and which the pipeline then weights and reduces.
        """

    def get_metrics(self) -> Mapping[str, float]:
        """The metrics of the last call; they become floats when read."""
        return Metrics(self._metrics)

    def reset_metrics(self) -> None:
        """Forget the metrics."""
        self._metrics = {}
