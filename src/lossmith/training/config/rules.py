"""The rules for a configuration: values are in range, and every key applies to the mode, model and loss."""

from collections.abc import Iterable, Iterator
from typing import Any

from lossmith.options import Declared
from lossmith.training.config.keys import MIN_LR_DIVISOR, SPECS, TaskKeys, TrainConfig
from lossmith.training.config.loss_keys import LOSS_KEYS, OPTIONS
from lossmith.training.config.objective import check_objective
from lossmith.training.config.own_loss import is_own
from lossmith.training.errors import UserError
from lossmith.training.untrusted import shown

# Keys that switch on components which only some models and modes support.
LEFT_TO_RIGHT = ("use_ngram_penalty", "use_immediate_repetition_penalty", "eos_token_id")
OF_HIDDEN_STATES = ("use_mtp", "use_contrastive_loss")
OF_ROUTERS = ("use_moe_balancing", "router_z_loss_weight")
OF_EXPERTS = ("num_experts", "moe_top_k", "moe_num_layers")
# Integers above this are shown as powers of ten.
LONGEST_NUMBER = 10**15
LARGEST_FLOAT = 10**308


def check(config: TrainConfig) -> None:
    """Raise UserError for values that are out of range or incompatible."""
    for name, spec in SPECS.items():
        check_range(spec, getattr(config, name))
    _check_sizes(config)
    for names, why in _out_of_place(config):
        for name in config.changed(names):
            raise UserError(f"{name}={getattr(config, name)} {why}{name} out.")
    if config.compile and config.pull_interval and config.changed(["pull_interval"]):
        raise UserError(
            f"pull_interval={config.pull_interval} goes back through the loss alone, and compile=True makes "
            "one graph of it and the model. Leave one of them out."
        )
    if config.is_language_model:
        _check_experts(config)
        _refuse_keys_of_others(config)
        check_objective(config)


def _check_sizes(config: TrainConfig) -> None:
    width, heads = config.n_embd, config.n_head
    if width % heads or (width // heads) % 2:
        raise UserError(
            f"n_embd={width} over n_head={heads} is {width / heads:g} per head; "
            "expected an even whole number, since rotary positions turn pairs of coordinates. "
            f"Try --n_embd={heads * 2 * max(1, round(width / heads / 2))}."
        )
    if config.min_lr > config.learning_rate:
        raise UserError(
            f"min_lr={config.min_lr:g} is above learning_rate={config.learning_rate:g}; expected the lowest "
            "learning rate to be no higher than the highest. "
            f"Try --min_lr={config.learning_rate / MIN_LR_DIVISOR:g}."
        )


def _out_of_place(config: TrainConfig) -> Iterator[tuple[Iterable[str], str]]:
    """Groups of keys that do not apply to this mode or model, each with the reason."""
    mode, of_cross_entropy = config.mode, OPTIONS["cross_entropy"]
    if not config.is_causal:
        causal = "is a causal language model, but"
        yield ["model"], f"{causal} mode={mode}, objective={config.objective}. Leave "
    if not config.is_language_model:
        others = [name for name in LOSS_KEYS if name not in of_cross_entropy]
        language = "is about a language model"
        yield ["objective"], f"{language}, but mode={mode}. Pass --mode={TaskKeys.mode}, or leave "
        yield others, f"{language}, but mode={mode}. Leave "
        few = f"mode={mode} has few logits, which are always there"
        yield ["materialize_logits"], f"{language}; {few}. Leave "
    if mode == "sequence_scorer":
        squared = f"mode={mode} trains the squared error"
        yield of_cross_entropy, f"is an option of cross-entropy; {squared}. Leave "
    outputs = "reads the output of every expert, which no model of the trainer gives"
    yield ["use_diversity_loss"], f"{outputs}: leave "
    if config.experts is None:
        keys = (*OF_ROUTERS, *OF_EXPERTS)
        yield keys, "is about a mixture of experts: pass --model=moe, or leave "
    if config.objective == "masked":
        hidden = "reads the hidden states of a causal model"
        yield OF_HIDDEN_STATES, f"{hidden}, but objective=masked: leave "
        order = "is about what comes after what"
        yield LEFT_TO_RIGHT, f"{order}, but objective=masked sees both sides: leave "


def _check_experts(config: TrainConfig) -> None:
    if config.moe_num_layers not in (None, config.n_layer):
        raise UserError(
            f"moe_num_layers={config.moe_num_layers}, but every layer has experts and n_layer="
            f"{config.n_layer}. Leave moe_num_layers out."
        )
    if config.experts is not None and config.experts[1] > config.experts[0]:
        raise UserError(
            f"moe_top_k={config.experts[1]} is above num_experts={config.experts[0]}; expected no more "
            f"experts a token than there are. Try --num_experts={2 * config.experts[1]}."
        )


def _refuse_keys_of_others(config: TrainConfig) -> None:
    of_the_model = OF_EXPERTS[:2] if config.experts else ()
    own = {"loss", *OPTIONS.get(config.loss, ()), *of_the_model}
    for name in config.changed(LOSS_KEYS):
        if name not in own:
            having = [f"loss={loss}" for loss, options in OPTIONS.items() if name in options]
            raise UserError(
                f"{name}={getattr(config, name)} is a key of {' or '.join(having)}, but loss={config.loss}. "
                f"Leave {name} out, or pass --{having[-1]}."
            )


# ── ranges ────────────────────────────────────────────────────────────────────────────────────────


def check_range(spec: Declared, value: Any, origin: str = "") -> None:
    """Raise UserError if `value` is out of range; the message begins with where it was set."""
    if spec.kind.holds(value) or (spec.name == "loss" and is_own(value)):
        return
    if spec.choices:
        raise UserError(f"{origin}{spec.name}={shown(value)}; expected one of {', '.join(spec.choices)}.")
    is_long = isinstance(value, int) and LONGEST_NUMBER < abs(value) < LARGEST_FLOAT
    said = f"{value:g}" if is_long else shown(value)
    raise UserError(f"{origin}{spec.name}={said} is out of range; expected {spec.name} {spec.kind.limits}.")


def limits_of(spec: Declared) -> str:
    """A key's range in words, such as `max_iters >= 1`; empty if its type is the only limit."""
    if spec.choices:
        return f"one of {', '.join(spec.choices)}"
    limits = spec.kind.limits
    return f"{spec.name} {limits}" if limits[:1] in ("<", ">") else ""
