"""The keys of the training objective, and which of them each `loss` has.

What the constructors of `UnifiedLoss` and `NVAMPLoss` take becomes keys by itself, with their types and
defaults; written down here is what they mean to somebody at a command line.
"""

import inspect
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass
from typing import TYPE_CHECKING, Any, Literal

import lossmith
from lossmith.options import option as key
from lossmith.training.key_types import SHARES

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

    loss: str = key(
        "cross_entropy",
        "what a language model is trained with",
        choices=(*CONSTRUCTORS,),
    )
    label_smoothing: float = key(0.0, "share of the target that is given to other tokens", low=0.0, below=1.0)
    smoothing_mode: str = key(
        "uniform",
        "who shares it, every token or only the wrong ones",
        choices=("uniform", "exclude_target"),
    )
    z_loss: float = key(0.0, "weight of the squared log-sum-exp", low=0.0)
    focal_gamma: float = key(
        0.0,
        "exponent of the focal loss; 0 is plain cross-entropy, or the default of `use_focal_loss`, 2",
        low=0.0,
    )
    confidence_penalty: float = key(0.0, "weight of the negative entropy", low=0.0)
    temperature: float = key(1.0, "divides the logits inside the loss", above=0.0)
    # No sums: the trainer divides by what it counts over micro-batches and ranks, whatever the loss.
    reduction: str = key(
        "mean", "whether every token counts the same, or every sequence", choices=("mean", "sequence_mean")
    )


def meaning(text: str, **limits: Any) -> tuple[str, dict[str, Any]]:
    """What a key means, and its limits as :func:`lossmith.options.option` has them."""
    return text, limits


OF_UNIFIED = {
    "primary_loss_type": meaning(
        "the main loss: cross-entropy, with a temperature, or weighted by the confidence of the prediction"
    ),
    "initial_temperature": meaning("temperature of a `deepseek` main loss, or where it begins", above=0.0),
    "adaptive_temperature": meaning("let the temperature follow how steady training is"),
    "temperature_bounds": meaning("the lowest and the highest temperature"),
    "use_mtp": meaning("train heads that predict tokens further ahead"),
    "num_future_tokens": meaning("how many such heads, each a token further", low=1),
    "mtp_weight": meaning("weight of the loss of these heads"),
    "mtp_type": meaning("whether every token counts the same in their loss, or by confidence"),
    "shared_projection": meaning("let the heads share the model's own output matrix"),
    "adaptive_threshold": meaning("the confidence whose weight is 1", above=0.0, below=1.0),
    "adaptive_weight_range": meaning("the weights of confidence 0 and 1"),
    "use_ngram_penalty": meaning("penalise what would complete an n-gram again"),
    "ngram_size": meaning("n; 1 is every token of the window", low=1),
    "ngram_penalty_weight": meaning("weight of the n-gram penalty"),
    "ngram_window_size": meaning("how many tokens it looks back; at least `ngram_size`", low=1),
    "use_immediate_repetition_penalty": meaning("penalise the token that has just been repeated"),
    "immediate_repetition_weight": meaning("weight of that penalty"),
    "immediate_repetition_threshold": meaning("equal tokens in a row after which another one costs", low=1),
    "eos_token_id": meaning(
        "id of the end of text, which then costs something early in a block: 0 with these tokenizers; "
        "None is off",
        low=0,
    ),
    "pad_token_id": meaning("id of targets that do not count; None for none", low=0),
    "min_sequence_length": meaning("tokens of the block before which an end is early", low=0),
    "eos_penalty_weight": meaning("weight of the penalty on an early end"),
    "use_moe_balancing": meaning("even out which experts a `moe` model uses"),
    "num_experts": meaning("experts in each layer of a `moe` model; None is 4", low=2),
    "gradient_balance_weight": meaning("weight of the balance"),
    "target_expert_usage": meaning("share of each expert, a list that sums to 1; None is the same for all"),
    "moe_top_k": meaning("experts that a token is sent to in a `moe` model; None is 2", low=1),
    "moe_num_layers": meaning("layers with experts; None is `n_layer`, and nothing else can be", low=1),
    "moe_balance_mode": meaning("balance by a loss, or by a bias on the choice of experts"),
    "router_z_loss_weight": meaning("weight of the routers' squared log-sum-exp", low=0.0),
    "use_focal_loss": meaning("add a focal loss, or put it in place of the main one"),
    "focal_alpha": meaning("multiplies the focal loss"),
    "focal_weight": meaning("weight of the focal loss beside the main one"),
    "focal_mode": meaning("the focal loss beside the main one, or in its place"),
    "use_diversity_loss": meaning("keep experts apart; needs their outputs, which no model here gives"),
    "diversity_weight": meaning("weight of the diversity loss"),
    "use_contrastive_loss": meaning("keep the last hidden states of a block apart"),
    "contrastive_weight": meaning("weight of the contrastive loss"),
    "contrastive_temperature": meaning("temperature of pairs, which a text has none of", above=0.0),
    "contrastive_margin": meaning("cosines above 1 minus this cost something", low=0.0),
    "use_auxiliary_loss": meaning("reward entropy"),
    "auxiliary_weight": meaning("weight of the reward of entropy"),
    "track_statistics": meaning("keep the loss's own means of its parts; the log has them anyway"),
}
OF_NVAMP = {
    "alpha": meaning("weight of the variance-aware part"),
    "beta": meaning("weight of plain cross-entropy"),
    "gamma": meaning("weight of the largest losses"),
    "eps": meaning("added to the variance", above=0.0),
    "top_k": meaning("how many of the largest losses are averaged", low=1),
    "legacy": meaning("the value of the published package"),
    "stats_scope": meaning("whether mean, variance and largest losses are those of this rank or of all"),
}

SHARED = frozenset(spec.name for spec in fields(LossKeys))


def options_of(loss: str) -> dict[str, str]:
    """The keys of a loss: what each is called among the options of its constructor, by key."""
    names = [name for name in inspect.signature(CONSTRUCTORS[loss]).parameters if name not in DECIDED]
    return {name if name in SHARED else PREFIXES.get(loss, "") + name: name for name in names}


OPTIONS = {loss: options_of(loss) for loss in CONSTRUCTORS}


def _keys_of(loss: str, title: str, meanings: Mapping[str, tuple[str, dict[str, Any]]]) -> type:
    """A dataclass of the keys that are this loss's alone, in the order of its constructor."""
    constructor = CONSTRUCTORS[loss]
    parameters = inspect.signature(constructor).parameters
    hints = typing.get_type_hints(constructor.__init__)
    declared = []
    for name, option in OPTIONS[loss].items():
        if name in SHARED:
            continue
        text, limits = meanings[option]
        if typing.get_origin(hints[option]) is Literal:
            limits = {**limits, "choices": typing.get_args(hints[option])}
        spec = key(parameters[option].default, text, **limits)
        declared.append((name, _type_of(hints[option]), spec))
    return make_dataclass(title, declared, namespace={"__doc__": f"Of loss={loss} alone."})


def _type_of(hint: Any) -> Any:
    """A constructor's type as that of a key: one of a few texts is text, and a sequence is a tuple."""
    if typing.get_origin(hint) is Literal:
        return str
    return SHARES if hint == (float | Sequence[float] | None) else hint


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
    UnifiedKeys = _keys_of("unified", "UnifiedKeys", OF_UNIFIED)
    NVAMPKeys = _keys_of("nvamp", "NVAMPKeys", OF_NVAMP)
