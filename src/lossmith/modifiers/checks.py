"""What a pipeline checks of what it is made of and given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from lossmith.core.warn_user import warn_user
from lossmith.engine.statistics.stats import TokenStats
from lossmith.modifiers.base import BaseLossModifier, ModelMode
from lossmith.modifiers.token_modifier import Measured, TokenModifier
from lossmith.objectives.objective import Objective

FROM_KEYS = "A pipeline is made from keys by lossmith.create_loss_modifier_pipeline(config)"


def listed(modifiers: Any) -> Iterable[BaseLossModifier]:
    """The modifiers that a pipeline is made of: a list, a single one, or None for none.

    Raises:
        TypeError: anything else.
    """
    if modifiers is None:
        return ()
    if isinstance(modifiers, BaseLossModifier | type):
        return (modifiers,)  # type: ignore[return-value]
    if isinstance(modifiers, str | Mapping) or not isinstance(modifiers, Iterable):
        raise TypeError(f"modifiers must be a list of modifiers; got {modifiers!r}. {FROM_KEYS}")
    return modifiers


def check_modifier(modifier: Any) -> None:
    """
    Raises:
        TypeError: it is no modifier, or one that was not set up.
    """
    if isinstance(modifier, type) and issubclass(modifier, BaseLossModifier):
        name = modifier.__name__
        raise TypeError(f"a modifier must be an instance; got the class {name}; write {name}()")
    if isinstance(modifier, list | tuple):
        raise TypeError("modifiers are added one at a time; got a list of them")
    if not isinstance(modifier, BaseLossModifier):
        raise TypeError(
            f"a modifier must be an instance of a subclass of lossmith.BaseLossModifier; got {modifier!r}"
        )
    if "_metrics" not in vars(modifier):
        kind = type(modifier).__name__
        raise TypeError(f"{kind}.__init__ does not call super().__init__(config); a modifier has to")


def check_base(base: Any) -> None:
    """
    Raises:
        TypeError: it is no objective.
    """
    if not isinstance(base, Objective):
        raise TypeError(
            f"base must be a lossmith.Objective, such as lossmith.CrossEntropyLoss(); got {base!r}"
        )


def check_tensor(name: str, value: Any) -> None:
    """
    Raises:
        TypeError: it is neither a tensor nor None.
    """
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")


def check_given(targets: Tensor, ignore_index: Any, per_position_loss: Any, stats: Any) -> None:
    """
    Raises:
        TypeError: an id that is none, a loss of each position that is none, or statistics that are none.
        ValueError: a loss of each position of another shape than the targets'.
    """
    if not isinstance(ignore_index, Integral) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an id, a whole number; got {ignore_index!r}")
    check_tensor("per_position_loss", per_position_loss)
    if per_position_loss is not None and not per_position_loss.is_floating_point():
        raise TypeError(f"per_position_loss must be floating point; got {per_position_loss.dtype}")
    if per_position_loss is not None and per_position_loss.shape != targets.shape:
        raise ValueError(
            f"per_position_loss must have the targets' shape {list(targets.shape)}; "
            f"got {list(per_position_loss.shape)}"
        )
    if stats is not None and not isinstance(stats, TokenStats):
        raise TypeError(f"stats must be lossmith.TokenStats; got {type(stats).__name__}")


def checked_factor(modifier: BaseLossModifier, answer: Any) -> tuple[Tensor, Mapping[str, Any]]:
    """What a scorer's modifier answers.

    Raises:
        TypeError: it is no factor with metrics.
    """
    is_pair = isinstance(answer, tuple) and len(answer) == 2
    if not is_pair or not isinstance(answer[0], Tensor) or answer[0].dim():
        raise TypeError(f"{modifier.name}.factor must return a scalar tensor and metrics; got {answer!r}")
    return answer


def checked_measured(modifier: BaseLossModifier, measured: Any, num_samples: int) -> Measured:
    """What a token modifier has measured.

    Raises:
        TypeError: it is no Measured.
        ValueError: it does not have a weight for each sample.
    """
    if not isinstance(measured, Measured):
        raise TypeError(f"{modifier.name}.measure must return a Measured; got {type(measured).__name__}")
    if measured.weight is not None and measured.weight.shape != (num_samples,):
        raise ValueError(
            f"{modifier.name}.measure must give each sample a weight, [{num_samples}]; "
            f"got {list(measured.weight.shape)}"
        )
    return measured


def refuse_flat(active: Sequence[BaseLossModifier], targets: Tensor) -> None:
    """
    Raises:
        ValueError: a modifier weighs samples, and there is one, since the targets are flat.
    """
    if targets.dim() > 1:
        return
    for modifier in active:
        if isinstance(modifier, TokenModifier) and modifier.weighs:
            raise ValueError(
                f"{modifier.name} weighs samples, and targets {list(targets.shape)} are one sample; pass "
                "logits [B, T, V] and targets [B, T], not flattened (a single sequence as logits[None], "
                "targets[None])"
            )


def is_on(modifier: BaseLossModifier) -> bool:
    """Whether a modifier is enabled: by the attribute, or by an ``is_enabled`` of its own."""
    asks_itself = type(modifier).is_enabled is not BaseLossModifier.is_enabled
    return bool(modifier.is_enabled()) if asks_itself else modifier.enabled


def warn_of_modes(modifier: BaseLossModifier, mode: ModelMode | None) -> None:
    """Say of a modifier that it can never act: not in the pipeline's mode, or in none at all."""
    if not any(modifier.supports_mode(known) for known in ModelMode):
        warn_user(
            f"{modifier.name} has no effect: its supports_mode answers False to every mode; compare with "
            "lossmith.ModelMode"
        )
    elif mode is not None and not modifier.supports_mode(mode):
        modes = ", ".join(repr(known.value) for known in ModelMode if modifier.supports_mode(known))
        warn_user(
            f"{modifier.name} has no effect in a pipeline of model_mode={mode.value!r}: it is for {modes}; "
            "leave it out"
        )


def of_scorer(predictions: Tensor | None, token_weight: Any, shift: Any) -> Tensor:
    """The predictions [B] of a sequence scorer, which has neither tokens to weigh nor rows to shift along.

    Raises:
        TypeError: they are missing, or there is what belongs to tokens.
    """
    if predictions is None:
        raise TypeError("a sequence scorer's predictions [B] are missing; pass them as logits")
    if token_weight is not None:
        raise TypeError("token_weight weighs tokens, and a sequence scorer has none; leave it out")
    if shift:
        raise TypeError("shift moves targets along a row, and a sequence scorer has none; leave it out")
    return predictions
