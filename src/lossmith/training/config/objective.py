"""The training objective described by the keys."""

import re
import warnings
from typing import Any

import torch

import lossmith
from lossmith.training.config.keys import TrainConfig
from lossmith.training.config.loss_keys import CONSTRUCTORS, OPTIONS
from lossmith.training.config.own_loss import find_own, is_own, require_usable
from lossmith.training.errors import UserError


def make_objective(config: TrainConfig, *, shift: bool) -> lossmith.Objective:
    """The objective of a token task, without modifiers; `shift` if logits[t] predict labels[t + 1].

    Raises:
        UserError: a loss of one's own that there is not, or that the trainer cannot train with.
    """
    if is_own(config.loss):
        make = find_own(config.loss)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return require_usable(make(config), config.loss, shift=shift)
    options: dict[str, Any] = {option: getattr(config, name) for name, option in OPTIONS[config.loss].items()}
    if config.loss == "unified":
        options |= _of_the_model(config)
        if not config.focal_gamma:
            del options["focal_gamma"]  # the constructor has its own default
    # Forked, so that a loss that draws heads of its own leaves the model's initialisation unchanged. The
    # run itself warns of keys without effect.
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
    """Raise UserError, in terms of keys, for options that the loss's constructor refuses."""
    for name in ("eos_token_id", "pad_token_id"):
        token = getattr(config, name)
        if token is not None and token >= config.vocab_size:
            raise UserError(
                f"{name}={token} is no token of vocab_size={config.vocab_size}; expected an id below that. "
                f"The end of text is 0, so pass --{name}=0."
            )
    if is_own(config.loss):  # nothing is imported to check a configuration
        return
    try:
        with torch.device("meta"):  # checks the values without allocating memory
            make_objective(config, shift=True)
    except ValueError as error:
        names = {option: name for name, option in OPTIONS[config.loss].items()}
        said = re.sub(r"^\w+", lambda found: names.get(found[0], found[0]), str(error))
        raise UserError(f"loss={config.loss}: {said.rstrip('.')}.") from None
