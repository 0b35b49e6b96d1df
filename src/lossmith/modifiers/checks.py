"""The checks that a pipeline makes on its modifiers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lossmith.core.warn_user import warn_user
from lossmith.equation.reduction import Reduction
from lossmith.modifiers.base import BaseLossModifier, ModelMode

if TYPE_CHECKING:
    from lossmith.modifiers.tokens.token_modifier import TokenModifier

FROM_KEYS = "A pipeline is made from keys by lossmith.create_loss_modifier_pipeline(config)"


def listed(modifiers: Any) -> Iterable[BaseLossModifier]:
    """The modifiers of a pipeline, given as a list, a single one, or None for none."""
    if modifiers is None:
        return ()
    if isinstance(modifiers, BaseLossModifier | type):
        return (modifiers,)  # type: ignore[return-value]
    if isinstance(modifiers, str | Mapping) or not isinstance(modifiers, Iterable):
        raise TypeError(f"modifiers must be a list of modifiers; got {modifiers!r}. {FROM_KEYS}")
    return modifiers


def check_modifier(modifier: Any) -> None:
    """Raise a TypeError if it is not a modifier, or one whose ``__init__`` did not run."""
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


def warn_of_modes(modifier: BaseLossModifier, mode: ModelMode | None) -> None:
    """Warn if a modifier can never act: not in the pipeline's mode, or in no mode at all."""
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


def warn_of_sparse_weights(modifiers: Iterable[TokenModifier], reduction: Reduction) -> None:
    """Warn, once, if several modifiers favour samples with few supervised tokens, and a mean over samples
    does so before them: their weights multiply, and the gradient comes from a few tokens."""
    if reduction != "sequence_mean" or torch.compiler.is_compiling():
        return
    favouring = [m for m in modifiers if m.favours_sparse and m.weighs and m.idle_reason is None]
    if len(favouring) < 2 or all(m.seen.is_told_of_sparse_weights for m in favouring):
        return
    for modifier in favouring:
        modifier.seen.is_told_of_sparse_weights = True
    warn_user(
        f"{' and '.join(m.name for m in favouring)} both favour samples with few supervised tokens, on top "
        "of a mean over samples. Where that number varies, as in masked language models, the gradient comes "
        "from a few tokens and the model learns less; pass reduction='mean', or leave one of them out. "
        "docs/modifiers.md has measurements"
    )
