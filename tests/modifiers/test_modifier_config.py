"""Flat keys: everything that the documentation names, from whatever holds it; mistakes name the key."""

import argparse
import dataclasses
import re

import pytest
import torch

import lossmith
from lossmith import create_loss_modifier_pipeline
from lossmith.modifiers.config import ALIASES, KEYS

EVERYTHING = {
    "loss_modifiers_enabled": True,
    "entropy_modifier_enabled": True,
    "entropy_modifier_weight": 1.2,
    "entropy_modifier_threshold": 0.1,
    "entropy_modifier_eps": 1e-7,
    "entropy_modifier_use_for_weighting": True,
    "entropy_modifier_verbose": False,
    "target_smoothing_enabled": True,
    "target_smoothing_factor": 0.15,
    "target_smoothing_special_tokens": [0, 1, 2],
    "target_smoothing_exclude_padding": True,
    "target_smoothing_padding_token": -100,
    "mask_ratio_weight_enabled": True,
    "mask_ratio_weight_power": 0.25,
    "mask_ratio_weight_min_weight": 0.2,
    "mask_ratio_weight_max_weight": 5.0,
    "mask_ratio_weight_eps": 1e-7,
    "sequence_variance_enabled": True,
    "sequence_variance_scale": 3.0,
    "sequence_variance_alpha": 1.0,
    "sequence_variance_eps": 1e-7,
    "sequence_correlation_enabled": True,
    "sequence_correlation_alpha": 2.0,
    "sequence_correlation_eps": 1e-7,
    "judge_weight_modifier_enabled": True,
    "judge_weight_exponent": 2.0,
    "judge_weight_min_factor": 0.2,
    "judge_weight_max_factor": 5.0,
    "judge_weight_eps": 1e-5,
    "metrics_collector_enabled": True,
    # of the training run, and none of the modifiers' business
    "learning_rate": 1e-3,
    "device": "cpu",
    "dtype": "float32",
}
NAMES = [
    "EntropyModifier",
    "TargetSmoothingModifier",
    "MaskRatioWeightModifier",
    "SequenceScoringJudgeWeightModifier",
    "SequenceScorerVarianceModifier",
    "SequenceScorerCorrelationModifier",
    "MetricsCollectorModifier",
]


def judge(ids: torch.Tensor) -> torch.Tensor:
    return torch.full((len(ids),), 0.5)


def holders() -> dict:
    made = dataclasses.make_dataclass(
        "Config",
        [(k, type(v), dataclasses.field(default_factory=lambda v=v: v)) for k, v in EVERYTHING.items()],
    )
    return {
        "dict": EVERYTHING,
        "dataclass": made(),
        "namespace": argparse.Namespace(**EVERYTHING),
        "dict with None": {**EVERYTHING, "entropy_modifier_direction": None},
    }


@pytest.mark.parametrize("kind", ["dict", "dataclass", "namespace", "dict with None", "omegaconf"])
def test_every_key_from_whatever_holds_it(kind):
    if kind == "omegaconf":
        config = pytest.importorskip("omegaconf").OmegaConf.create(EVERYTHING)
    else:
        config = holders()[kind]
    pipeline = create_loss_modifier_pipeline(config, judge=judge)
    assert [type(modifier).__name__ for modifier in pipeline.modifiers] == NAMES
    assert pipeline.get_enabled_modifier_names() == NAMES
    by_prefix = {modifier.prefix: modifier for modifier in pipeline.modifiers}
    seen = 0
    for key, value in EVERYTHING.items():
        for prefix, modifier in by_prefix.items():
            if key.startswith(prefix) and not key.endswith("_enabled"):
                expected = tuple(value) if isinstance(value, list) else value
                assert getattr(modifier.settings, key.removeprefix(prefix)) == expected
                seen += 1
    assert seen == 22
    config_seen = create_loss_modifier_pipeline(config, judge=judge)
    scores = torch.rand(4)
    assert config_seen(scores, 1 - scores).isfinite()


@pytest.mark.filterwarnings("ignore:entropy_modifier_enabled has no effect")
def test_off_unless_the_master_switch_is_on():
    for config in ({}, {**EVERYTHING, "loss_modifiers_enabled": False}, {"entropy_modifier_enabled": True}):
        pipeline = create_loss_modifier_pipeline(config)
        assert list(pipeline.modifiers) == []
        assert pipeline.is_empty()
    assert not list(create_loss_modifier_pipeline({"loss_modifiers_enabled": True}).modifiers)


def test_defaults():
    defaults = {key: spec.default for key, spec in KEYS.items()}
    assert not any(defaults[key] for key in defaults if key.endswith("enabled"))
    expected = {
        "entropy_modifier_weight": 1.0,
        "entropy_modifier_threshold": 0.0,
        "entropy_modifier_eps": 1e-8,
        "entropy_modifier_max_weight": 10.0,
        "entropy_modifier_use_for_weighting": True,
        "entropy_modifier_verbose": False,
        "entropy_modifier_direction": "concentrated",
        "target_smoothing_factor": 0.1,
        "target_smoothing_special_tokens": (),
        "target_smoothing_exclude_padding": True,
        "target_smoothing_padding_token": -100,
        "mask_ratio_weight_power": 0.5,
        "mask_ratio_weight_min_weight": 0.1,
        "mask_ratio_weight_max_weight": 10.0,
        "mask_ratio_weight_eps": 1e-8,
        "judge_weight_checkpoint": "",
        "judge_weight_exponent": 1.0,
        "judge_weight_min_factor": 0.1,
        "judge_weight_max_factor": 10.0,
        "judge_weight_eps": 1e-6,
        "sequence_variance_scale": 2.0,
        "sequence_variance_alpha": 1.5,
        "sequence_variance_eps": 1e-8,
        "sequence_correlation_alpha": 4.0,
        "sequence_correlation_mapping": "quadratic",
        "sequence_correlation_eps": 1e-8,
    }
    assert {key: defaults[key] for key in expected} == expected
    assert all(spec.meaning for spec in KEYS.values())


@pytest.mark.parametrize(
    ("key", "attribute", "value"),
    [
        ("entropy_modifier_debug", "verbose", True),
        ("mask_ratio_weight_min", "min_weight", 0.3),
        ("mask_ratio_weight_max", "max_weight", 3.0),
    ],
)
def test_other_names_of_keys(key, attribute, value):
    switch = ALIASES[key].rsplit(f"_{attribute}", 1)[0] + "_enabled"
    config = {"loss_modifiers_enabled": True, switch: True, key: value}
    (modifier,) = create_loss_modifier_pipeline(config).modifiers
    assert getattr(modifier.settings, attribute) == value
    if value is True:  # a switch has no third value
        return
    with pytest.raises(ValueError, match=f"{key} and {ALIASES[key]} are names of one option"):
        create_loss_modifier_pipeline({**config, ALIASES[key]: 2 * value})


def test_special_tokens_as_text():
    for given, expected in (("0, 1,2", (0, 1, 2)), ("[5]", (5,)), ("", ()), ((7,), (7,)), (7, (7,))):
        config = {"loss_modifiers_enabled": True, "target_smoothing_enabled": True}
        pipeline = create_loss_modifier_pipeline({**config, "target_smoothing_special_tokens": given})
        assert pipeline.modifiers[0].settings.special_tokens == expected


MISTAKES = [
    ({"entropy_modifier_wieght": 1.0}, "no option 'entropy_modifier_wieght'.*'entropy_modifier_weight'"),
    ({"entropy_modifer_enabled": True}, "Did you mean 'entropy_modifier_enabled'"),
    ({"loss_modifier_enabled": True}, "Did you mean 'loss_modifiers_enabled'"),
    ({"target_smooting_factor": 0.1}, "Did you mean 'target_smoothing_factor'"),
    ({"judge_weight_enabled": True}, "judge_weight"),
    ({"entropy_enabled": True}, "no option 'entropy_enabled'"),
    ({"entropy_modifier_weight": -1.0}, r"entropy_modifier_weight=-1.0 is out of range.*>= 0"),
    ({"entropy_modifier_weight": float("nan")}, "entropy_modifier_weight=nan is out of range"),
    ({"entropy_modifier_threshold": 1.5}, "entropy_modifier_threshold=1.5.*>= 0 and <= 1"),
    ({"entropy_modifier_direction": "up"}, "entropy_modifier_direction='up'.*'concentrated', 'uniform'"),
    ({"entropy_modifier_weight": "high"}, "entropy_modifier_weight expects a number; got 'high'"),
    ({"entropy_modifier_weight": True}, "entropy_modifier_weight expects a number"),
    ({"entropy_modifier_verbose": 1}, "entropy_modifier_verbose expects True or False"),
    ({"entropy_modifier_enabled": "yes"}, "entropy_modifier_enabled expects True or False"),
    ({"target_smoothing_factor": 1.0}, "target_smoothing_factor=1.0.*>= 0 and < 1"),
    ({"target_smoothing_special_tokens": "a,b"}, "target_smoothing_special_tokens expects token ids.*'a'"),
    ({"target_smoothing_special_tokens": "-1"}, "target_smoothing_special_tokens='-1' is out of range.*>= 0"),
    ({"target_smoothing_padding_token": 1.5}, "target_smoothing_padding_token expects a whole number"),
    ({"mask_ratio_weight_power": -0.5}, "mask_ratio_weight_power=-0.5"),
    (
        {"mask_ratio_weight_min": 20.0},
        "mask_ratio_weight_min_weight=20 is above mask_ratio_weight_max_weight=10",
    ),
    ({"judge_weight_min_factor": 11.0}, "judge_weight_min_factor=11 is above judge_weight_max_factor=10"),
    ({"judge_weight_exponent": -1.0}, "judge_weight_exponent=-1.0"),
    ({"sequence_variance_scale": 0.5}, "sequence_variance_scale=0.5.*>= 1"),
    ({"sequence_correlation_alpha": 0.5}, "sequence_correlation_alpha=0.5.*>= 1"),
    (
        {"sequence_correlation_alpha": 12.0},
        "sequence_correlation_alpha=12 is above 9.*sequence_correlation_mapping",
    ),
    ({"metrics_collector_ema_decay": 1.0}, "metrics_collector_ema_decay=1.0"),
]


@pytest.mark.parametrize(
    ("config", "message"), MISTAKES, ids=lambda c: next(iter(c)) if isinstance(c, dict) else ""
)
@pytest.mark.parametrize("is_on", [True, False])
def test_mistakes_name_the_key(config, message, is_on):
    """Also where the modifier is off: it will be on one day."""
    with pytest.raises((ValueError, TypeError), match=re.compile(message, re.DOTALL)):
        create_loss_modifier_pipeline({"loss_modifiers_enabled": is_on, **config})


def test_a_mistake_in_a_modifiers_own_mapping():
    with pytest.raises(ValueError, match=r"EntropyModifier has no option 'wieght'\. Did you mean 'weight'"):
        lossmith.EntropyModifier({"wieght": 1.0})
    with pytest.raises(ValueError, match="weight=-1 is out of range"):
        lossmith.EntropyModifier({"weight": -1})
    with pytest.raises(TypeError, match="enabled expects True or False; got 'False'"):
        lossmith.EntropyModifier({"enabled": "False"})


def test_a_config_that_is_none():
    for config in (3, "file.yaml", dict, None):
        with pytest.raises(TypeError, match="config must be a mapping"):
            create_loss_modifier_pipeline(config)


def test_keys_of_other_things_are_let_through():
    others = ["weight_decay", "entropy", "smoothing_mode", "label_smoothing", "mask_token", "max_weight"]
    others += ["loss", "judge", "sequence_length", "metrics", "target", "focal_gamma", "eval_interval"]
    create_loss_modifier_pipeline(dict.fromkeys(others, 1))


def test_the_judge_has_to_come_from_somewhere():
    config = {"loss_modifiers_enabled": True, "judge_weight_modifier_enabled": True}
    with pytest.raises(ValueError, match="judge_weight_checkpoint"):
        create_loss_modifier_pipeline(config)
    config["judge_weight_checkpoint"] = "/nowhere/judge"
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match="/nowhere/judge does not exist"):
        create_loss_modifier_pipeline(config)


def test_the_base_and_the_mode_are_passed_on():
    base = lossmith.CrossEntropyLoss(shift=True)
    pipeline = create_loss_modifier_pipeline({}, base=base, model_mode="token_classifier")
    assert pipeline.base is base
    assert pipeline.model_mode is lossmith.ModelMode.TOKEN_CLASSIFIER
