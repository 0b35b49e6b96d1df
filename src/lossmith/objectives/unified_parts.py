"""Builds what the options of ``UnifiedLoss`` stand for: a primary objective and components."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lossmith.components.component import Component, Weighted
from lossmith.components.contrastive import Contrastive
from lossmith.components.diversity import ExpertDiversity
from lossmith.components.moe import MoEBalance, RouterZLoss
from lossmith.components.mtp import MTP
from lossmith.components.repetition import EarlyEOS, ImmediateRepetition, NgramRepetition
from lossmith.components.token_losses import ConfidenceCalibration, ConfidencePenalty, Focal
from lossmith.objectives.adaptive import AdaptiveCrossEntropyLoss
from lossmith.objectives.cross_entropy import CrossEntropyLoss
from lossmith.objectives.temperature import AdaptiveTemperature
from lossmith.terms.confidence_weight import check_weight_range

# The weight of the calibration loss of a supplied confidence head.
CALIBRATION_WEIGHT = 0.01


def check_options(o: Any) -> None:
    """
    Raises:
        ValueError: options of :class:`lossmith.UnifiedLoss` that contradict each other.
    """
    if o.primary_loss_type != "deepseek" and (o.adaptive_temperature or o.initial_temperature != 1.0):
        raise ValueError(
            f"a temperature belongs to primary_loss_type='deepseek', and this is {o.primary_loss_type!r}; "
            "leave initial_temperature and adaptive_temperature out, or change the type"
        )
    if o.use_focal_loss and o.focal_mode == "replace" and o.focal_alpha != 1:
        raise ValueError(
            f"focal_alpha={o.focal_alpha} scales the focal loss beside the main one; with "
            "focal_mode='replace' it would scale everything. Leave it out"
        )
    if o.use_moe_balancing and o.num_experts is None:
        raise ValueError("use_moe_balancing needs num_experts, how many experts a router chooses from")
    if o.eos_token_id is not None and o.eos_token_id >= o.vocab_size:
        raise ValueError(
            f"eos_token_id={o.eos_token_id} is no token of vocab_size={o.vocab_size}; expected an id below it"
        )
    check_weight_range(o.adaptive_weight_range, "adaptive_weight_range")


def make_primary(o: Any) -> CrossEntropyLoss:
    """The main loss that the options describe."""
    replaced = o.use_focal_loss and o.focal_mode == "replace"
    options = {
        "label_smoothing": o.label_smoothing,
        "ignore_index": o.ignore_index,
        "focal_gamma": o.focal_gamma if replaced else 0.0,
        "z_loss": o.z_loss,
        "reduction": o.reduction,
        "shift": o.shift,
        "empty": o.empty,
        "backend": o.backend,
    }
    primary: CrossEntropyLoss
    if o.primary_loss_type == "adaptive_mtp":
        primary = AdaptiveCrossEntropyLoss(**_confidence(o), **options)
    elif o.adaptive_temperature:
        temperature = AdaptiveTemperature(o.initial_temperature, bounds=o.temperature_bounds)
        primary = CrossEntropyLoss(temperature=temperature, **options)
    else:
        primary = CrossEntropyLoss(temperature=o.initial_temperature, **options)
    primary.pad_token_id, primary.eos_token_id = o.pad_token_id, o.eos_token_id
    return primary


@dataclass(frozen=True)
class Part:
    """Functions of the options: whether a component is on, its weight, and how to make it."""

    is_on: Callable[[Any], bool]
    weight: Callable[[Any], float]
    make: Callable[[Any], Component]


# Keyed by the part's name in the detailed result.
PARTS = {
    "mtp_loss": Part(
        lambda o: o.use_mtp,
        lambda o: o.mtp_weight,
        lambda o: MTP(
            o.vocab_size,
            o.hidden_size,
            num_future_tokens=o.num_future_tokens,
            shared_projection=o.shared_projection,
            adaptive=_weighs_by_confidence(o),
            **_confidence(o),
        ),
    ),
    "confidence_loss": Part(
        lambda o: _weighs_by_confidence(o),
        lambda o: CALIBRATION_WEIGHT,
        lambda o: ConfidenceCalibration(),
    ),
    "ngram_penalty": Part(
        lambda o: o.use_ngram_penalty,
        lambda o: o.ngram_penalty_weight,
        lambda o: NgramRepetition(o.ngram_size, o.ngram_window_size),
    ),
    "immediate_repetition_penalty": Part(
        lambda o: o.use_immediate_repetition_penalty,
        lambda o: o.immediate_repetition_weight,
        lambda o: ImmediateRepetition(o.immediate_repetition_threshold),
    ),
    "eos_penalty": Part(
        lambda o: o.eos_token_id is not None,
        lambda o: o.eos_penalty_weight,
        lambda o: EarlyEOS(o.eos_token_id, o.min_sequence_length),
    ),
    "moe_balance_loss": Part(
        lambda o: o.use_moe_balancing,
        lambda o: o.gradient_balance_weight,
        lambda o: MoEBalance(
            o.num_experts,
            target_expert_usage=o.target_expert_usage,
            mode=o.moe_balance_mode,
            top_k=o.moe_top_k,
            num_layers=o.moe_num_layers,
        ),
    ),
    "router_z_loss": Part(lambda o: True, lambda o: o.router_z_loss_weight, lambda o: RouterZLoss()),
    "focal_loss": Part(
        lambda o: o.use_focal_loss and o.focal_mode == "add",
        lambda o: o.focal_weight,
        lambda o: Focal(o.focal_gamma, o.focal_alpha),
    ),
    "diversity_loss": Part(
        lambda o: o.use_diversity_loss, lambda o: o.diversity_weight, lambda o: ExpertDiversity()
    ),
    "contrastive_loss": Part(
        lambda o: o.use_contrastive_loss,
        lambda o: o.contrastive_weight,
        lambda o: Contrastive(o.contrastive_temperature, o.contrastive_margin),
    ),
    "auxiliary_loss": Part(
        lambda o: o.use_auxiliary_loss, lambda o: o.auxiliary_weight, lambda o: ConfidencePenalty()
    ),
}


@dataclass(frozen=True)
class Switch:
    """What must be on for some options to have an effect.

    Attributes:
        name: what the user has to set.
        is_on: whether the options turn it on.
        options: the options without effect while it is off.
    """

    name: str
    is_on: Callable[[Any], bool]
    options: tuple[str, ...]


# Left out are facts about the model, whether its loss uses them or not: hidden_size, num_experts,
# moe_top_k, moe_num_layers.
SWITCHES = (
    Switch("adaptive_temperature", lambda o: o.adaptive_temperature, ("temperature_bounds",)),
    Switch(
        "use_mtp",
        lambda o: o.use_mtp,
        ("num_future_tokens", "mtp_weight", "mtp_type", "shared_projection"),
    ),
    Switch(
        "primary_loss_type='adaptive_mtp' or mtp_type='adaptive'",
        lambda o: _weighs_by_confidence(o),
        ("adaptive_threshold", "adaptive_weight_range"),
    ),
    Switch(
        "use_ngram_penalty",
        lambda o: o.use_ngram_penalty,
        ("ngram_size", "ngram_penalty_weight", "ngram_window_size"),
    ),
    Switch(
        "use_immediate_repetition_penalty",
        lambda o: o.use_immediate_repetition_penalty,
        ("immediate_repetition_weight", "immediate_repetition_threshold"),
    ),
    Switch(
        "eos_token_id",
        lambda o: o.eos_token_id is not None,
        ("min_sequence_length", "eos_penalty_weight"),
    ),
    Switch(
        "use_moe_balancing",
        lambda o: o.use_moe_balancing,
        ("gradient_balance_weight", "target_expert_usage", "moe_balance_mode"),
    ),
    Switch(
        "moe_balance_mode='loss'",
        lambda o: not o.use_moe_balancing or o.moe_balance_mode == "loss" or not o.gradient_balance_weight,
        ("gradient_balance_weight",),
    ),
    Switch(
        "use_focal_loss",
        lambda o: o.use_focal_loss,
        ("focal_gamma", "focal_alpha", "focal_weight", "focal_mode"),
    ),
    Switch(
        "focal_mode='add'",
        lambda o: not o.use_focal_loss or o.focal_mode == "add",
        ("focal_weight",),
    ),
    Switch("use_diversity_loss", lambda o: o.use_diversity_loss, ("diversity_weight",)),
    Switch(
        "use_contrastive_loss",
        lambda o: o.use_contrastive_loss,
        ("contrastive_weight", "contrastive_temperature", "contrastive_margin"),
    ),
    Switch("use_auxiliary_loss", lambda o: o.use_auxiliary_loss, ("auxiliary_weight",)),
)


def without_effect(
    o: Any, changed: Callable[[Sequence[str]], Sequence[str]]
) -> list[tuple[str, Sequence[str]]]:
    """The switches that are off although some of their options are set, with those options.

    Args:
        o: the options.
        changed: names of options -> those not at their defaults.
    """
    found = [(switch.name, changed(switch.options)) for switch in SWITCHES if not switch.is_on(o)]
    return [(name, options) for name, options in found if options]


def describe_without_effect(o: Any, defaults: Mapping[str, Any]) -> str | None:
    """What :func:`without_effect` finds, in one sentence; None if it finds nothing.

    Args:
        o: the options.
        defaults: the default of each option, by name.
    """

    def changed(names: Sequence[str]) -> list[str]:
        return [name for name in names if _differs(getattr(o, name), defaults[name])]

    said = [
        f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'} no effect without {switch}"
        for switch, names in without_effect(o, changed)
    ]
    return "; ".join(said) or None


def _differs(value: Any, default: Any) -> bool:
    if default is None:  # the value may be a tensor
        return value is not None
    return (tuple(value) if isinstance(value, list) else value) != default


def make_components(o: Any) -> dict[str, Weighted]:
    """The components that are switched on, weighted; a weight of 0 switches one off."""
    return {
        name: Weighted(part.make(o), part.weight(o))
        for name, part in PARTS.items()
        if part.is_on(o) and part.weight(o) != 0
    }


def _weighs_by_confidence(o: Any) -> bool:
    return o.primary_loss_type == "adaptive_mtp" or (o.use_mtp and o.mtp_type == "adaptive")


def _confidence(o: Any) -> dict[str, Any]:
    return {"threshold": o.adaptive_threshold, "weight_range": o.adaptive_weight_range}
