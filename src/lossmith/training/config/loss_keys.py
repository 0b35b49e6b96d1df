"""The keys of the training objective, and which of them each `loss` has.

What the constructors of `UnifiedLoss` and `NVAMPLoss` take becomes keys by itself, with its type, default,
range and meaning.
"""

from dataclasses import dataclass, fields, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import lossmith
from lossmith.options import Declared, option, options_of
from lossmith.options.shared import (
    LOWEST_DIVISOR,
    ConfidencePenaltyCoefficient,
    FocalGamma,
    LabelSmoothing,
    ZLossCoefficient,
)
from lossmith.terms.cross_entropy import SmoothingMode

CONSTRUCTORS: dict[str, type[lossmith.Objective]] = {
    "cross_entropy": lossmith.CrossEntropyLoss,
    "nvamp": lossmith.NVAMPLoss,
    "unified": lossmith.UnifiedLoss,
}
PREFIXES = {"nvamp": "nvamp_"}

# What is no key of the trainer's, because the trainer knows it.
DECIDED = {
    "vocab_size": "the key of that name",
    "hidden_size": "n_embd",
    "shift": "what the mode predicts",
    "ignore_index": "what the data has where there is no target",
    "empty": "there is no batch without a target",
    "softcap": "the models cap nothing",
    "class_weight": "a tensor of a number a token, which no key can hold",
    "special_tokens": "target_smoothing_special_tokens has them",
}


@dataclass
class LossKeys:
    """The training objective. Evaluation always reports the loss without any of these options."""

    loss: Annotated[
        Literal["cross_entropy", "nvamp", "unified"], option("what a language model is trained with")
    ] = "cross_entropy"
    label_smoothing: LabelSmoothing = 0.0
    smoothing_mode: SmoothingMode = "uniform"
    z_loss: Annotated[ZLossCoefficient, option("weight of the squared log-sum-exp", low=0)] = 0.0
    focal_gamma: Annotated[
        FocalGamma,
        option("exponent of the focal loss; 0 is plain cross-entropy, or the default of `use_focal_loss`, 2"),
    ] = 0.0
    confidence_penalty: Annotated[
        ConfidencePenaltyCoefficient, option("weight of the negative entropy", low=0)
    ] = 0.0
    temperature: Annotated[float, option("divides the logits inside the loss", low=LOWEST_DIVISOR)] = 1.0
    # No sums: the trainer divides by what it counts over micro-batches and ranks, whatever the loss.
    reduction: Annotated[
        Literal["mean", "sequence_mean"], option("whether every token counts the same, or every sequence")
    ] = "mean"


# What a key says here that its option does not say: what the trainer's models and tokenizers make of it.
HERE = {
    "eos_token_id": option(
        "id of the end of text, which then costs something early in a block: 0 with these tokenizers; "
        "None is off"
    ),
    "min_sequence_length": option("tokens of the block before which an end is early"),
    "use_moe_balancing": option("even out which experts a `moe` model uses"),
    "num_experts": option("experts in each layer of a `moe` model; None is 4", low=2),
    "moe_top_k": option("experts that a token is sent to in a `moe` model; None is 2"),
    "moe_num_layers": option("layers with experts; None is `n_layer`, and nothing else can be"),
    "router_z_loss_weight": option("weight of the routers' squared log-sum-exp", low=0),
    "use_diversity_loss": option("keep experts apart; needs their outputs, which no model here gives"),
    "contrastive_temperature": option("temperature of pairs, which a text has none of"),
    "track_statistics": option("keep the loss's own means of its parts; the log has them anyway"),
}

SHARED = frozenset(spec.name for spec in fields(LossKeys))


def keys_of(loss: str) -> dict[str, str]:
    """The keys of a loss: what each is called among the options of its constructor, by key."""
    names = [name for name in options_of(CONSTRUCTORS[loss]) if name not in DECIDED]
    return {name if name in SHARED else PREFIXES.get(loss, "") + name: name for name in names}


OPTIONS = {loss: keys_of(loss) for loss in CONSTRUCTORS}


def _keys_of(loss: str, title: str) -> type:
    """A dataclass of the keys that are this loss's alone, in the order of its constructor."""
    options = options_of(CONSTRUCTORS[loss])
    declared = [
        (name, _hint_of(options[option]), options[option].default)
        for name, option in OPTIONS[loss].items()
        if name not in SHARED
    ]
    return make_dataclass(title, declared, namespace={"__doc__": f"Of loss={loss} alone."})


def _hint_of(declared: Declared) -> Any:
    """An option's annotation, with what is said of it here."""
    here = HERE.get(declared.name)
    return declared.hint if here is None else Annotated[declared.hint, here]


if TYPE_CHECKING:

    class UnifiedKeys:
        """The keys of `UnifiedLoss`; these are read here and there."""

        use_moe_balancing: bool
        num_experts: int | None
        moe_top_k: int | None
        moe_num_layers: int | None
        moe_balance_mode: str

    class NVAMPKeys:
        """The keys of `NVAMPLoss`."""

else:
    UnifiedKeys = _keys_of("unified", "UnifiedKeys")
    NVAMPKeys = _keys_of("nvamp", "NVAMPKeys")
