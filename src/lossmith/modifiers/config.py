"""``create_loss_modifier_pipeline``: flat configuration keys in, a pipeline out."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from lossmith.modifiers.base import ModelMode
from lossmith.modifiers.configured_modifier import ConfiguredModifier
from lossmith.modifiers.entropy import EntropyModifier
from lossmith.modifiers.judge import Judge, SequenceScoringJudgeWeightModifier
from lossmith.modifiers.mask_ratio import MaskRatioWeightModifier
from lossmith.modifiers.metrics_collector import MetricsCollectorModifier
from lossmith.modifiers.pipeline import LossModifierPipeline
from lossmith.modifiers.sequence_correlation import SequenceScorerCorrelationModifier
from lossmith.modifiers.sequence_variance import SequenceScorerVarianceModifier
from lossmith.modifiers.target_smoothing import TargetSmoothingModifier
from lossmith.objective import Objective
from lossmith.options import option, option_types, unknown_option

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
# A key this close to one of ours was meant to be it, whatever else the configuration holds.
SURELY_MEANT = 0.87


def _declare_keys() -> tuple[dict[str, dataclasses.Field], dict[str, str]]:
    """Every key with its declaration, and other names of keys."""
    declared: list[tuple[str, Any, Any]] = [
        (MASTER, bool, option(False, "master switch of the loss modifiers: off, none of them acts"))
    ]
    aliases = {}
    for modifier in MODIFIERS:
        meaning = f"apply the {modifier.__name__}"
        declared.append((modifier.enabled_key, bool, option(False, meaning)))
        types = option_types(modifier.Settings)
        for spec in dataclasses.fields(modifier.Settings):
            copied = dataclasses.field(default=spec.default, metadata=spec.metadata)
            declared.append((modifier.prefix + spec.name, types[spec.name], copied))
        aliases |= {
            modifier.prefix + other: modifier.prefix + name for other, name in modifier.aliases.items()
        }
    keys = dataclasses.make_dataclass("Keys", declared)
    return {spec.name: spec for spec in dataclasses.fields(keys)}, aliases


# What a configuration may hold: name -> dataclass field with default, type and metadata.
KEYS, ALIASES = _declare_keys()


def create_loss_modifier_pipeline(
    config: Any,
    *,
    base: Objective | None = None,
    model_mode: ModelMode | str = ModelMode.LANGUAGE_MODEL,
    judge: Judge | None = None,
) -> LossModifierPipeline:
    """The pipeline that flat keys describe: ``entropy_modifier_enabled``, ``target_smoothing_factor`` ...

    Args:
        config: a mapping, a dataclass, a namespace or an OmegaConf config. It may hold other keys, of
            which ``device`` and ``dtype`` are the judge's too. ``None`` stands for the default.
        base: the objective that is modified; plain cross-entropy if not given.
        model_mode: what the model predicts.
        judge: used in place of the checkpoint ``judge_weight_checkpoint``.

    Returns:
        A pipeline of the modifiers that are enabled; an empty one unless ``loss_modifiers_enabled``.

    Raises:
        ValueError: an unknown key, a value out of range, or a judge that cannot be loaded.
        TypeError: a value of another type, or a config that is none.

    Example:
        >>> import lossmith
        >>> pipeline = lossmith.create_loss_modifier_pipeline(
        ...     {"loss_modifiers_enabled": True, "entropy_modifier_enabled": True}
        ... )
        >>> [modifier.name for modifier in pipeline.modifiers]
        ['EntropyModifier']
    """
    values = {name: value for name, value in _items(config).items() if value is not None}
    _refuse_unknown(values)
    pipeline = LossModifierPipeline(base=base, model_mode=model_mode)
    is_on = _switch(values, MASTER)
    for modifier in MODIFIERS:
        own = _own(modifier, values)
        modifier.read_settings(own, lambda name, prefix=modifier.prefix: prefix + name)
        if not (_switch(values, modifier.enabled_key) and is_on):
            continue
        if modifier is SequenceScoringJudgeWeightModifier:
            own |= {"judge": judge, "device": values.get("device"), "dtype": values.get("dtype")}
        pipeline.add_modifier(modifier(own))
    return pipeline


def _items(config: Any) -> dict[str, Any]:
    """The keys and values of whatever holds them."""
    if isinstance(config, Mapping):
        return {str(name): value for name, value in config.items()}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {spec.name: getattr(config, spec.name) for spec in dataclasses.fields(config)}
    if hasattr(config, "__dict__") and not isinstance(config, type):
        return dict(vars(config))
    raise TypeError(
        "config must be a mapping, a dataclass, a namespace or an OmegaConf config; "
        f"got {type(config).__name__}"
    )


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    prefixes = ("loss_modifiers_", *(modifier.prefix for modifier in MODIFIERS))
    known = [*KEYS, *ALIASES]
    for name in values:
        if name in known:
            continue
        switch = name.removesuffix("_enabled")
        is_switch = switch != name and any(prefix.startswith(switch) for prefix in prefixes)
        if (
            is_switch
            or name.startswith(prefixes)
            or difflib.get_close_matches(name, known, n=1, cutoff=SURELY_MEANT)
        ):
            raise ValueError(unknown_option("the loss modifiers' configuration", name, known))


def _switch(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise TypeError(f"{key} expects True or False; got {value!r} ({type(value).__name__})")
    return value


def _own(modifier: type[ConfiguredModifier], values: Mapping[str, Any]) -> dict[str, Any]:
    """A modifier's parameters by their own names."""
    own = {}
    for name, value in values.items():
        if name.startswith(modifier.prefix) and name != modifier.enabled_key:
            own[name.removeprefix(modifier.prefix)] = value
    return own
