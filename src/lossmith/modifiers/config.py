"""``create_loss_modifier_pipeline``: flat configuration keys in, a pipeline out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from lossmith.core.former_names import CONFIGURATION, OPTIONS
from lossmith.core.warn_user import warn_user
from lossmith.modifiers.base import read_switch
from lossmith.modifiers.configured_modifier import ConfiguredModifier
from lossmith.modifiers.option_names import settle
from lossmith.modifiers.pipeline import AutoReduction, LossModifierPipeline
from lossmith.modifiers.scores.correlation import SequenceScorerCorrelationModifier
from lossmith.modifiers.scores.variance import SequenceScorerVarianceModifier
from lossmith.modifiers.tokens.entropy import EntropyModifier
from lossmith.modifiers.tokens.judge import SequenceScoringJudgeWeightModifier
from lossmith.modifiers.tokens.mask_ratio import MaskRatioWeightModifier
from lossmith.modifiers.tokens.metrics_collector import MetricsCollectorModifier
from lossmith.modifiers.tokens.target_smoothing import TargetSmoothingModifier
from lossmith.options import (
    Declared,
    is_misspelt,
    kind_of,
    option,
    options_of,
    strict_options,
    unknown_option,
)

MASTER = "loss_modifiers_enabled"
MODIFIERS: tuple[type[ConfiguredModifier], ...] = (
    EntropyModifier,
    TargetSmoothingModifier,
    MaskRatioWeightModifier,
    SequenceScoringJudgeWeightModifier,
    SequenceScorerVarianceModifier,
    SequenceScorerCorrelationModifier,
    MetricsCollectorModifier,
)
PREFIXES = ("loss_modifiers_", *(modifier.prefix for modifier in MODIFIERS))
# What of the rest of a training configuration is the judge's too.
JUDGE_KEYS = ("device", "dtype")


def _declare_keys() -> tuple[dict[str, Declared], dict[str, str]]:
    """Every key with its declaration, and other names of keys."""
    declared = [_switch_key(MASTER, "master switch of the loss modifiers: off, none of them acts")]
    aliases = {}
    for modifier in MODIFIERS:
        declared.append(_switch_key(modifier.enabled_key, f"apply the {modifier.__name__}"))
        settings = options_of(modifier.Settings).values()
        declared += [dataclasses.replace(spec, name=modifier.prefix + spec.name) for spec in settings]
        aliases |= {
            modifier.prefix + other: modifier.prefix + name for other, name in modifier.aliases.items()
        }
    return {spec.name: spec for spec in declared}, aliases


def _switch_key(name: str, meaning: str) -> Declared:
    hint = Annotated[bool, option(meaning)]
    return Declared(name, False, hint, kind_of(hint, name))


# What a configuration may hold, by name.
KEYS, ALIASES = _declare_keys()
FORMERS = OPTIONS[CONFIGURATION]


@strict_options
def create_loss_modifier_pipeline(
    config: Any,
    *,
    base: Annotated[Any, option("the objective that is modified")] = None,
    model_mode: Annotated[Any, option("what the model predicts")] = None,
    reduction: AutoReduction = "auto",
    judge: Annotated[Any, option("used in place of a checkpoint")] = None,
) -> LossModifierPipeline:
    """The pipeline that flat keys describe: ``entropy_modifier_enabled``, ``target_smoothing_factor`` ...

    Args:
        config: a mapping, a dataclass, a namespace or an OmegaConf config. It may hold other keys, of
            which ``device`` and ``dtype`` are the judge's too. ``None`` stands for the default. Of two names
            of one option the value that is just the default gives way; former names work, with a
            DeprecationWarning.
        base: the objective that is modified; plain cross-entropy if not given.
        model_mode, reduction: see :class:`lossmith.LossModifierPipeline`.
        judge: used in place of the checkpoint ``judge_weight_checkpoint``.

    Returns:
        A pipeline of the modifiers that are enabled; an empty one unless ``loss_modifiers_enabled``.

    Raises:
        ValueError: an unknown key, a value out of range, two names of one option with different values, or a
            judge that cannot be loaded.
        TypeError: a value of another type, or a config that is none.

    Example:
        >>> import lossmith
        >>> pipeline = lossmith.create_loss_modifier_pipeline(
        ...     {"loss_modifiers_enabled": True, "entropy_modifier_enabled": True}
        ... )
        >>> [modifier.name for modifier in pipeline.modifiers]
        ['EntropyModifier']
    """
    values, key_of = settle(
        {name: value for name, value in _items(config).items() if value is not None},
        owner="",
        formers=FORMERS,
        aliases=ALIASES,
        defaults={name: spec.default for name, spec in KEYS.items()},
    )
    _refuse_unknown(values)
    pipeline = LossModifierPipeline(base=base, model_mode=model_mode, reduction=reduction)
    is_on = read_switch(values.get(MASTER, False), MASTER)
    for modifier in MODIFIERS:
        own = _own(modifier, values)
        modifier.read_settings(own, lambda name, prefix=modifier.prefix: key_of(prefix + name))
        key = modifier.enabled_key
        is_wanted = read_switch(values.get(key, False), key_of(key))
        if is_wanted and MASTER not in values:
            warn_user(f"{key_of(key)} has no effect without {MASTER}=True")
        if not (is_wanted and is_on):
            continue
        if modifier is SequenceScoringJudgeWeightModifier:
            own |= {"judge": judge, **{name: values.get(name) for name in JUDGE_KEYS}}
        pipeline.add_modifier(modifier(own))
    return pipeline


def _items(config: Any) -> dict[str, Any]:
    """The names in whatever holds them, with the values of those that are ours, or could be."""
    if isinstance(config, Mapping):
        names, read = list(config), config.__getitem__
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        names, read = [spec.name for spec in dataclasses.fields(config)], config.__getattribute__
    elif hasattr(config, "__dict__") and not isinstance(config, type):
        declared = [name for name in (*KEYS, *ALIASES, *FORMERS, *JUDGE_KEYS) if hasattr(config, name)]
        names, read = [*vars(config), *declared], config.__getattribute__  # also those of its class
    else:
        raise TypeError(
            "config must be a mapping, a dataclass, a namespace or an OmegaConf config; "
            f"got {type(config).__name__}"
        )
    ours = {*KEYS, *ALIASES, *FORMERS, *JUDGE_KEYS}
    return {str(name): read(name) if name in ours else True for name in names}


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    known = [*KEYS, *ALIASES]
    unknown = [name for name in values if name not in known and name not in JUDGE_KEYS]
    # Next to keys of other things, such a name may be one of those; alone it is a mistake.
    are_all_ours = all(_looks_like_ours(name) for name in unknown)
    for name in unknown:
        if is_misspelt(name, known) or name.startswith(PREFIXES) or _is_switch(name) or are_all_ours:
            raise ValueError(unknown_option("the loss modifiers' configuration", name, known))


def _is_switch(name: str) -> bool:
    """`entropy_enabled` for `entropy_modifier_enabled`, and the like."""
    switch = name.removesuffix("_enabled")
    return switch != name and any(prefix.startswith(switch) for prefix in PREFIXES)


def _looks_like_ours(name: str) -> bool:
    """Whether it begins and ends like one of our keys: `entropy_weight`."""
    words = name.split("_")
    keys = [key.split("_") for key in (*KEYS, *ALIASES)]
    return any(words[0] == key[0] and (words[-1] == key[-1] or len(words) < 3) for key in keys)


def _own(modifier: type[ConfiguredModifier], values: Mapping[str, Any]) -> dict[str, Any]:
    """A modifier's parameters by their own names."""
    own = {}
    for name, value in values.items():
        if name.startswith(modifier.prefix) and name != modifier.enabled_key:
            own[name.removeprefix(modifier.prefix)] = value
    return own
