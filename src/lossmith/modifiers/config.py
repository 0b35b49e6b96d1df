"""``create_loss_modifier_pipeline``: flat configuration keys in, a pipeline out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from lossmith.core.former_names import CONFIGURATION, OPTIONS
from lossmith.core.warn_user import warn_user
from lossmith.modifiers.base import read_switch
from lossmith.modifiers.configured_modifier import ConfiguredModifier, settle
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
# General keys of a training configuration that the judge reads too.
JUDGE_KEYS = ("device", "dtype")


def _declare_keys() -> Iterator[Declared]:
    """Every key with its declaration."""
    yield _switch(MASTER, "master switch of the loss modifiers: off, none of them acts")
    for modifier in MODIFIERS:
        yield _switch(modifier.enabled_key, f"apply the {modifier.__name__}")
        for spec in options_of(modifier.Settings).values():
            yield dataclasses.replace(spec, name=modifier.prefix + spec.name)


def _switch(name: str, meaning: str) -> Declared:
    hint = Annotated[bool, option(meaning)]
    return Declared(name, False, hint, kind_of(hint, name))


# The keys of a configuration, by name; other names of keys, and former ones.
KEYS = {spec.name: spec for spec in _declare_keys()}
ALIASES = {m.prefix + other: m.prefix + name for m in MODIFIERS for other, name in m.aliases.items()}
FORMERS = OPTIONS[CONFIGURATION]
OURS = (*KEYS, *ALIASES, *FORMERS, *JUDGE_KEYS)


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
        config: a mapping, a dataclass, a namespace or an OmegaConf config. It may hold other keys; the judge
            also reads ``device`` and ``dtype``. ``None`` stands for the default. If two names of one option
            are given, a value that equals the default gives way. Former names work, with a
            DeprecationWarning.
        base: the objective to modify; plain cross-entropy if not given.
        model_mode, reduction: see :class:`lossmith.LossModifierPipeline`.
        judge: replaces the checkpoint ``judge_weight_checkpoint``.

    Returns:
        A pipeline of the enabled modifiers; an empty one unless ``loss_modifiers_enabled``.

    Raises:
        ValueError: an unknown key, a value out of range, two names of one option with different values, or a
            judge that cannot be loaded.
        TypeError: a value of the wrong type, or something that is not a config.

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
        prefix, key = modifier.prefix, modifier.enabled_key
        names = [name for name in values if name.startswith(prefix) and name != key]
        own = {name.removeprefix(prefix): values[name] for name in names}
        modifier.read_settings(own, lambda name, prefix=prefix: key_of(prefix + name))
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
    """The names in a config of any kind, with the values of those that are ours, or could be."""
    if isinstance(config, Mapping):
        names, read = list(config), config.__getitem__
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        names, read = [spec.name for spec in dataclasses.fields(config)], config.__getattribute__
    elif hasattr(config, "__dict__") and not isinstance(config, type):
        of_class = [name for name in OURS if hasattr(config, name)]
        names, read = [*vars(config), *of_class], config.__getattribute__
    else:
        raise TypeError(
            "config must be a mapping, a dataclass, a namespace or an OmegaConf config; "
            f"got {type(config).__name__}"
        )
    return {str(name): read(name) if name in OURS else True for name in names}


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    """Raise a ValueError for a misspelt name. A name that merely looks like ours counts as a mistake only
    if the config holds no keys of other things."""
    known = [*KEYS, *ALIASES]
    unknown = [name for name in values if name not in known and name not in JUDGE_KEYS]
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
