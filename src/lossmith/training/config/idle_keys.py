"""Keys that are set but have no effect, and what they need to have one."""

from collections.abc import Iterator
from dataclasses import fields

from lossmith.modifiers.config import KEYS, MASTER, MODIFIERS
from lossmith.objectives import unified_parts
from lossmith.training.config.keys import OptimizerKeys, TrainConfig
from lossmith.training.config.loss_keys import LOSS_KEYS
from lossmith.training.config.own_loss import is_own

# The weight of each component of UnifiedLoss; at 0 its switch has no effect.
WEIGHTS = {
    switch.name: option
    for switch in unified_parts.SWITCHES
    for option in switch.options
    if switch.name.startswith("use_") and option.endswith("_weight")
}
# Keys that refine another key, which has to be on.
NEEDS = {
    "smoothing_mode": "label_smoothing",
    "wandb_project": "wandb_log",
    "target_smoothing_padding_token": "target_smoothing_exclude_padding",
    "nvamp_top_k": "nvamp_gamma",
    "nvamp_eps": "nvamp_alpha",
    "nvamp_legacy": "nvamp_alpha",
}
# Keys that an evaluation does not read.
OF_TRAINING = (
    *(spec.name for spec in fields(OptimizerKeys) if spec.name != "batch_size"),
    "eval_interval", "eval_iters", "log_interval", "pull_interval", "sample_tokens", "compile", "seed",
    "materialize_logits",
    "tensorboard_log", "wandb_log", "wandb_project",
    # The bias that chooses experts is part of the model.
    *(name for name in LOSS_KEYS if not name.startswith(("moe_", "num_experts", "use_moe"))),
    *KEYS,
)  # fmt: skip


def without_effect(config: TrainConfig) -> list[tuple[str, str]]:
    """Pairs of a key that is set but has no effect and what it needs to have one."""
    found: dict[str, str] = {}
    for name, need in _candidates(config):
        found.setdefault(name, need)
    return list(found.items())


def _candidates(config: TrainConfig) -> Iterator[tuple[str, str]]:
    if config.loss == "unified":
        found = unified_parts.without_effect(config, config.changed)
        idle = [(name, need) for need, names in found for name in names]
        yield from idle
        for switch, weight in WEIGHTS.items():
            is_read = weight not in dict(idle)
            if config.changed([switch]) and is_read and getattr(config, weight) == 0:
                yield switch, weight
    for name in config.changed(NEEDS):
        if not getattr(config, NEEDS[name]):
            yield name, NEEDS[name]
    for name in config.changed(["contrastive_temperature"]):
        yield name, "pairs of samples, which no text here has"
    yield from _beyond_the_block(config)
    yield from _of_modifiers(config)


def _beyond_the_block(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Lengths that exceed a block."""
    longest = {}
    if config.mode != "sequence_scorer":  # its sample is a table
        # A causal model's sample follows an end-of-text token.
        longest["sample_tokens"] = config.block_size - config.is_causal
    if config.loss == "unified" and config.changed(["use_mtp"]):
        longest["num_future_tokens"] = config.block_size - 2  # leaves the last head one target
    for name in config.changed(longest):
        most = longest[name]
        if getattr(config, name) > most:
            yield f"{name} above {most}", f"block_size={getattr(config, name) + config.block_size - most}"


def _of_modifiers(config: TrainConfig) -> Iterator[tuple[str, str]]:
    switches = [modifier.enabled_key for modifier in MODIFIERS]
    for modifier in MODIFIERS:
        own = [name for name in KEYS if name.startswith(modifier.prefix) and name not in switches]
        if not config.changed([modifier.enabled_key]):
            yield from ((name, modifier.enabled_key) for name in config.changed(own))
    switched_on = config.changed(switches)
    if getattr(config, MASTER) and not switched_on:
        yield MASTER, f"a modifier: {', '.join(switches)}"
    elif not getattr(config, MASTER):
        yield from ((name, f"{MASTER}=True") for name in switched_on)


def idle_in_evaluation(config: TrainConfig, saved: TrainConfig) -> list[str]:
    """The keys that differ from the saved run's but that an evaluation ignores."""
    own = ("loss",) if is_own(saved.loss) else ()  # which an evaluation does without unless it is named
    names = [name for name in OF_TRAINING if name not in own]
    return [name for name in names if getattr(config, name) != getattr(saved, name)]
