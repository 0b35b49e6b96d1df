"""The training objective that the keys describe, and whether they can describe one."""

import re
import warnings
from typing import Any

import torch

import lossmith
from lossmith.training.config.keys import LOSS_KEYS, SPECS, TrainConfig
from lossmith.training.config.loss_keys import CONSTRUCTORS, OPTIONS
from lossmith.training.errors import UserError

# What a component reads that only some models and modes have: the keys that switch it on, and what that is.
LEFT_TO_RIGHT = ("use_ngram_penalty", "use_immediate_repetition_penalty", "eos_token_id")
OF_HIDDEN_STATES = ("use_mtp", "use_contrastive_loss")
OF_ROUTERS = ("use_moe_balancing", "router_z_loss_weight")
OF_EXPERTS = ("num_experts", "moe_top_k", "moe_num_layers")


def make_objective(config: TrainConfig, *, shift: bool) -> lossmith.Objective:
    """The objective of a task that predicts tokens, without modifiers.

    Args:
        config: the run's configuration.
        shift: whether logits[t] predict labels[t + 1].
    """
    options: dict[str, Any] = {option: getattr(config, name) for name, option in OPTIONS[config.loss].items()}
    if config.loss == "unified":
        options |= _of_the_model(config)
        if not config.focal_gamma:
            del options["focal_gamma"]  # the loss has a default of its own
    # The seed gives every loss the same model, whether it draws heads of its own or not. What the constructor
    # has to say of options without effect the run says of its keys.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* no effect without ")
        torch.manual_seed(config.seed)
        return CONSTRUCTORS[config.loss](shift=shift, **options)


def _of_the_model(config: TrainConfig) -> dict[str, Any]:
    experts, per_token = config.experts or (None, None)
    by_bias = config.use_moe_balancing and config.moe_balance_mode == "bias"
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_experts": experts,
        "moe_top_k": per_token,
        "moe_num_layers": config.n_layer if by_bias else config.moe_num_layers,
    }


def check_objective(config: TrainConfig) -> None:
    """
    Raises:
        UserError: keys of the loss that are another's, that go with no such model, or with one another.
    """
    if config.mode != SPECS["mode"].default:
        _refuse_other_losses(config)
        return
    _refuse_what_is_not_there(config)
    _refuse_keys_of_others(config)
    for name in ("eos_token_id", "pad_token_id"):
        token = getattr(config, name)
        if token is not None and token >= config.vocab_size:
            raise UserError(
                f"{name}={token} is no token of vocab_size={config.vocab_size}; expected an id below that. "
                f"The end of text is 0, so pass --{name}=0."
            )
    try:
        with torch.device("meta"):  # its values are looked at, and nothing is allocated
            make_objective(config, shift=True)
    except ValueError as error:
        names = {option: name for name, option in OPTIONS[config.loss].items()}
        said = re.sub(r"^\w+", lambda found: names.get(found[0], found[0]), str(error))
        raise UserError(f"loss={config.loss}: {said.rstrip('.')}.") from None


def _refuse_other_losses(config: TrainConfig) -> None:
    others = config.changed(name for name in LOSS_KEYS if name not in OPTIONS["cross_entropy"])
    if others:
        name = others[0]
        raise UserError(
            f"{name}={getattr(config, name)} is about a language model, but mode={config.mode}. Leave "
            f"{name} out."
        )


def _refuse_keys_of_others(config: TrainConfig) -> None:
    own = {"loss", *OPTIONS[config.loss]}
    if config.experts is not None:
        own |= {"num_experts", "moe_top_k"}  # the model's too
    for name in config.changed(LOSS_KEYS):
        if name not in own:
            has_it = " or ".join(f"loss={loss}" for loss, options in OPTIONS.items() if name in options)
            raise UserError(
                f"{name}={getattr(config, name)} is a key of {has_it}, but loss={config.loss}. Leave {name} "
                f"out, or pass --{has_it.split(' or ')[-1]}."
            )


def _refuse_what_is_not_there(config: TrainConfig) -> None:
    """Raise UserError for a component that reads what this model or mode does not have."""
    is_masked = config.objective == "masked"
    wrong: tuple[tuple[bool, tuple[str, ...], str], ...] = (
        (
            True,
            ("use_diversity_loss",),
            "reads the output of every expert, which no model of the trainer gives:",
        ),
        (
            config.experts is None,
            (*OF_ROUTERS, *OF_EXPERTS),
            "is about a mixture of experts: pass --model=moe, or",
        ),
        (
            is_masked,
            OF_HIDDEN_STATES,
            "reads the hidden states of a causal model, but objective=masked:",
        ),
        (
            is_masked,
            LEFT_TO_RIGHT,
            "is about what comes after what, but objective=masked sees both sides:",
        ),
    )
    for is_wrong, names, reason in wrong:
        for name in config.changed(names) if is_wrong else ():
            raise UserError(f"{name}={getattr(config, name)} {reason} leave {name} out.")
    if config.moe_num_layers not in (None, config.n_layer):
        raise UserError(
            f"moe_num_layers={config.moe_num_layers}, but every layer has experts and n_layer="
            f"{config.n_layer}. Leave moe_num_layers out."
        )
