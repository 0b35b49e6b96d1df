"""The inputs of an objective: their names, masks under two names, and logits or a linear head."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from torch import Tensor

from lossmith.engine.checks import check_targets
from lossmith.engine.head.plan import HEAD_OPTIONS
from lossmith.engine.predictions import Predictions
from lossmith.engine.shards.dtensor import head_as_predictions, logits_as_predictions
from lossmith.engine.shards.sequence import SequenceShards
from lossmith.options import kind_of, option
from lossmith.options.shared import Softcap

# These replace logits. Components may read the first two as well.
HEAD_INPUTS = (
    "hidden_states",
    "lm_head_weight",
    "lm_head_bias",
    "lm_head_scale",
    "lm_head_softcap",
    *HEAD_OPTIONS,
)
OWN_INPUTS = (
    "mask",
    "attention_mask",
    "token_weight",
    "input_ids",
    "segment_ids",
    "denominator",
    "num_items_in_batch",
    "scalars",
    "shift",
    "sequence",
    "stats",
    *HEAD_INPUTS,
)

_HEAD_OPTIONS = (
    kind_of(
        Annotated[float | Tensor, option("what a model multiplies its logits by", dtype="real")],
        "lm_head_scale",
    ),
    kind_of(Softcap, "lm_head_softcap"),
)


def take_predictions(
    logits: Tensor | Predictions | None, inputs: Mapping[str, Any], taken: Collection[str]
) -> tuple[Predictions, dict[str, Any]]:
    """Split the inputs into predictions and what is left for the objective.

    Args:
        logits: [..., V], or predictions of another kind. If None, the inputs must hold ``hidden_states``
            [..., D] and ``lm_head_weight`` [V, D], and may hold the rest of ``HEAD_INPUTS``.
        inputs: by name.
        taken: names that the objective reads itself.

    Raises:
        TypeError: neither logits nor a head was given, or both; or an option of the head has the wrong type.
        ValueError: an option of the head is out of range.
    """
    if logits is not None and not inputs:
        return (logits if isinstance(logits, Predictions) else logits_as_predictions(logits)), {}
    rest = {name: value for name, value in inputs.items() if name in taken or name not in HEAD_INPUTS}
    given = {name: inputs[name] for name in HEAD_INPUTS if inputs.get(name) is not None}
    if logits is not None:
        for name in given:
            if name not in taken:
                raise TypeError(f"{name} is for the loss without logits; pass either logits or {name}")
        return (logits if isinstance(logits, Predictions) else logits_as_predictions(logits)), rest
    missing = [name for name in HEAD_INPUTS[:2] if name not in given]
    if missing:
        raise TypeError(
            "expected logits [..., V], or hidden_states [..., D] and lm_head_weight [V, D] in their place; "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        )
    for kind in _HEAD_OPTIONS:
        if kind.name in given:
            given[kind.name] = kind.check(given[kind.name])
    hidden, weight, bias = (given.pop(name, None) for name in HEAD_INPUTS[:3])
    options = {name.removeprefix("lm_head_"): value for name, value in given.items()}
    return scaled_head(hidden, weight, bias, **options), rest


def scaled_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, scale: float | Tensor = 1.0, **options: Any
) -> Predictions:
    """The head with its logits multiplied by ``scale``, by scaling the tensors they are made of."""
    if scale != 1:
        hidden, bias = hidden * scale, None if bias is None else bias * scale
    return head_as_predictions(hidden, weight, bias, **options)


def given_targets(targets: Tensor | None) -> Tensor:
    """
    Raises:
        TypeError: no targets were given.
    """
    if targets is None:
        raise TypeError("targets are missing; pass the ids [..., T] that the predictions are judged by")
    return targets


def whole_sequences(
    shards: SequenceShards,
    targets: Tensor,
    aligned: Mapping[str, Tensor | None],
    inputs: Mapping[str, Any],
    per_position: Collection[str],
    per_token: Collection[str],
) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Any]]:
    """Targets and what goes with them, of this rank's positions, as those of all ranks: one collective, and
    one for each tensor with a row per token.

    Args:
        shards: how the sequences are split.
        targets: [..., T_r].
        aligned: [..., T_r] tensors, or None.
        inputs: of components and terms.
        per_position, per_token: which of them are [..., T_r], and which have a row per token.

    Raises:
        TypeError, ValueError: not a tensor, or not of this rank's positions.
    """
    if not isinstance(shards, SequenceShards):
        raise TypeError(
            "sequence must be lossmith.SequenceShards, which positions each rank has; got "
            f"{type(shards).__name__}"
        )
    check_targets(targets)
    shards.check_part("targets", targets, -1)
    aligned = {**aligned, **{name: inputs[name] for name in per_position if inputs.get(name) is not None}}
    given = {name: value for name, value in aligned.items() if value is not None}
    for name, value in given.items():
        shards.check_part(name, value, -1)
        if value.shape != targets.shape:
            raise ValueError(
                f"{name} must have the targets' shape {list(targets.shape)}; got {list(value.shape)}"
            )
    targets, *found = shards.gather_together([targets, *given.values()])
    whole = {**aligned, **dict(zip(given, found, strict=True))}
    rows = {name: inputs[name] for name in per_token if inputs.get(name) is not None}
    gathered = {name: shards.gather_tokens(value) for name, value in rows.items()}
    features = {name: whole.pop(name) for name in per_position if name in whole}
    return targets, whole, {**inputs, **gathered, **features}


def both_masks(mask: Tensor | None, attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask of the targets and that of the tokens; if only one is given, it serves as both."""
    return (attention_mask if mask is None else mask), (mask if attention_mask is None else attention_mask)


def either(name: str, value: Any, alias: str, aliased: Any) -> Any:
    """An argument that may be passed under either of two names."""
    if value is not None and aliased is not None:
        raise TypeError(f"{alias} is another name of {name}; pass one of them")
    return aliased if value is None else value
