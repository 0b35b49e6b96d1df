"""The keys of the training objective, read off the constructors of the losses.

A key has the type, default, range and meaning of the constructor's option. Only what depends on the trainer's
own models and tokenizers is declared here.
"""

from collections.abc import Iterable, Iterator
from dataclasses import make_dataclass
from typing import Annotated, Any, Literal

import lossmith
from lossmith.options import Declared, option, options_of

CONSTRUCTORS: dict[str, type[lossmith.Objective]] = {
    "cross_entropy": lossmith.CrossEntropyLoss,
    "nvamp": lossmith.NVAMPLoss,
    "unified": lossmith.UnifiedLoss,
}
PREFIXES = {"nvamp": "nvamp_"}

# Options that are not keys, because the trainer decides them.
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

# Declarations that override those of the options.
HERE = {
    "z_loss": option("", low=0),
    "focal_gamma": option(
        "exponent of the focal loss; 0 is plain cross-entropy, or the default of `use_focal_loss`, 2"
    ),
    "confidence_penalty": option("", low=0),
    "eos_token_id": option(
        "id of the end of text, which then costs something early in a block: 0 with these tokenizers; "
        "None is off"
    ),
    "min_sequence_length": option("tokens of the block before which an end is early"),
    "use_moe_balancing": option("even out which experts a `moe` model uses"),
    "num_experts": option("experts in each layer of a `moe` model; None is 4", low=2),
    "moe_top_k": option("experts that a token is sent to in a `moe` model; None is 2"),
    "moe_num_layers": option("layers with experts; None is `n_layer`, and nothing else can be"),
    "router_z_loss_weight": option("", low=0),
    "use_diversity_loss": option("keep experts apart; needs their outputs, which no model here gives"),
    "contrastive_temperature": option("temperature of pairs, which a text has none of"),
    "track_statistics": option("keep the loss's own means of its parts; the log has them anyway"),
    "reduction": option("whether every token counts the same, or every sequence"),
}
# Types narrower than the options': no tensors or modules, and no sums, since the trainer itself divides by
# the count over all micro-batches and ranks.
NARROWER: dict[str, Any] = {"temperature": float, "reduction": Literal["mean", "sequence_mean"]}


def _options_of(loss: str) -> dict[str, Declared]:
    return {name: spec for name, spec in options_of(CONSTRUCTORS[loss]).items() if name not in DECIDED}


SHARED = frozenset(_options_of("cross_entropy"))
# The keys of each loss, each with the name of its option.
OPTIONS = {
    loss: {name if name in SHARED else PREFIXES.get(loss, "") + name: name for name in _options_of(loss)}
    for loss in CONSTRUCTORS
}
LOSS_KEYS = tuple(dict.fromkeys(["loss", *(name for options in OPTIONS.values() for name in options)]))


def keys_class(meaning: str, keys: Iterable[tuple[str, Any, Any]]) -> Any:
    """A dataclass of keys, each given as (name, annotation, default)."""
    return make_dataclass("Keys", keys, namespace={"__doc__": meaning})


def _keys_of(loss: str) -> Iterator[tuple[str, Any, Any]]:
    """The keys that belong to one loss alone; cross-entropy owns those that it shares."""
    declared = _options_of(loss)
    for name, of in OPTIONS[loss].items():
        if loss == "cross_entropy" or name not in SHARED:
            spec, here = declared[of], HERE.get(of)
            hint = spec.hint
            if of in NARROWER:
                hint = Annotated[NARROWER[of], spec.kind.declared]
            yield name, hint if here is None else Annotated[hint, here], spec.default


_LOSS = Annotated[
    str,
    option(
        "what a language model is trained with, or `module:function` of your own", choices=tuple(CONSTRUCTORS)
    ),
]
LossKeys = keys_class(
    "The training objective. Evaluation always reports the loss without any of these options.",
    [("loss", _LOSS, "cross_entropy"), *_keys_of("cross_entropy")],
)
UnifiedKeys = keys_class("Of loss=unified alone.", _keys_of("unified"))
NVAMPKeys = keys_class("Of loss=nvamp alone.", _keys_of("nvamp"))
