"""What users of nano_gpt write: it works with a note, or is refused with what to write."""

import enum
import re
import warnings
from pathlib import Path

import pytest
import torch

from lossmith import (
    BaseLossModifier,
    EntropyModifier,
    LossModifierPipeline,
    MaskRatioWeightModifier,
    MetricsCollectorModifier,
    ModelMode,
    SequenceScorerCorrelationModifier,
    SequenceScorerVarianceModifier,
    SequenceScoringJudgeWeightModifier,
    TargetSmoothingModifier,
    create_loss_modifier_pipeline,
)
from lossmith.core.former_names import CALLS, CONFIGURATION, OPTIONS, REDUCTIONS
from lossmith.modifiers.config import ALIASES, MODIFIERS

ON = {"loss_modifiers_enabled": True}
KINDS = {kind.__name__: kind for kind in MODIFIERS}
MIGRATION = Path(__file__).parents[2] / "docs" / "migration"


def judge(ids):
    return torch.full((len(ids),), 0.5)


# What nano_gpt's factory hands its modifiers, with other values than the defaults.
CONSTRUCTED = [
    (
        EntropyModifier,
        {"enabled": True, "verbose": False, "weight": 0.5, "entropy_threshold": 0.2, "eps": 1e-7},
        {"weight": 0.5, "threshold": 0.2, "eps": 1e-7},
    ),
    (
        TargetSmoothingModifier,
        {
            "smoothing_factor": 0.2,
            "special_token_ids": [3, 5],
            "padding_token_id": 7,
            "exclude_padding": True,
        },
        {"factor": 0.2, "special_tokens": (3, 5), "padding_token": 7},
    ),
    (
        MaskRatioWeightModifier,
        {"power": 1.0, "min_weight": 0.2, "max_weight": 5.0, "eps": 1e-7, "use_sequence_level": True},
        {"power": 1.0, "min_weight": 0.2, "max_weight": 5.0},
    ),
    (
        SequenceScoringJudgeWeightModifier,
        {
            "judge": judge,
            "judge_weight_exponent": 2.0,
            "judge_weight_min_factor": 0.2,
            "judge_weight_max_factor": 5.0,
            "judge_weight_eps": 1e-5,
            "judge_weight_checkpoint": "out/judge",
            "device": "cpu",
            "dtype": "float32",
        },
        {"exponent": 2.0, "min_factor": 0.2, "max_factor": 5.0, "eps": 1e-5, "checkpoint": "out/judge"},
    ),
    (
        SequenceScorerVarianceModifier,
        {"sequence_variance_scale": 3.0, "sequence_variance_alpha": 1.0, "sequence_variance_eps": 1e-7},
        {"scale": 3.0, "alpha": 1.0, "eps": 1e-7},
    ),
    (
        SequenceScorerCorrelationModifier,
        {"sequence_correlation_alpha": 2.0, "sequence_correlation_eps": 1e-7},
        {"alpha": 2.0, "eps": 1e-7},
    ),
    (
        MetricsCollectorModifier,
        {"eps": 1e-5, "ema_alpha": 0.25, "collect_sequence_scorer_aare": True},
        {"eps": 1e-5, "ema_decay": 0.75},
    ),
]


@pytest.mark.parametrize(("kind", "given", "expected"), CONSTRUCTED, ids=lambda c: getattr(c, "__name__", ""))
def test_the_constructors_keys_work_and_name_what_to_write(kind, given, expected):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        modifier = kind(given)
    assert {name: getattr(modifier.settings, name) for name in expected} == expected
    said = {str(warning.message) for warning in caught}
    renamed = {n: f for n, f in OPTIONS.get(kind.__name__, {}).items() if n in given and f.new}
    assert len(said) == len(renamed)
    for name, former in renamed.items():
        assert f"{kind.__name__}'s {name} is a former name; write {former.write}" in said
    assert all(warning.category is DeprecationWarning for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)  # else Python would not show them


FLAT = [
    ({"seq_scorer_log_abs_rel_err": True}, {}),
    ({"seq_scorer_log_abs_rel_err": True, "sequence_metrics_ema_alpha": 0.25}, {"ema_decay": 0.75}),
    ({"seq_scorer_log_abs_rel_err": True, "sequence_metrics_eps": 1e-3}, {"eps": 1e-3}),
    # as a file of defaults holds both
    ({"seq_scorer_log_abs_rel_err": True, "metrics_collector_enabled": False}, {}),
]


@pytest.mark.parametrize(("given", "expected"), FLAT, ids=str)
def test_the_scorers_relative_error_is_measured(given, expected):
    names = "|".join(n for n in given if n in OPTIONS[CONFIGURATION])
    with pytest.warns(DeprecationWarning, match=f"({names}) is a former name; write metrics_collector"):
        pipeline = create_loss_modifier_pipeline({**ON, **given, "learning_rate": 1e-3})
    (collector,) = pipeline.modifiers
    assert isinstance(collector, MetricsCollectorModifier)
    assert {name: getattr(collector.settings, name) for name in expected} == expected
    targets = torch.tensor([0.5, 0.25])
    pipeline.modify_loss(1.2 * targets, targets)
    found = pipeline.get_all_metrics()
    assert found["MetricsCollectorModifier.mean_absolute_relative_error"] == pytest.approx(0.2)


def test_off_it_is_off():
    with pytest.warns(DeprecationWarning, match="seq_scorer_log_abs_rel_err"):
        assert create_loss_modifier_pipeline({**ON, "seq_scorer_log_abs_rel_err": False}).is_empty()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MaskRatioWeightModifier({"use_sequence_level": False}),
            "MaskRatioWeightModifier's use_sequence_level=False is gone; write nothing: weights are always",
        ),
        (
            lambda: SequenceScorerVarianceModifier({"sequence_variance_mode": "error"}),
            "sequence_variance_mode='error' is gone; write scale and alpha",
        ),
        (
            lambda: MetricsCollectorModifier({"collect_sequence_scorer_aare": False}),
            "collect_sequence_scorer_aare=False is gone; write enabled=False",
        ),
        (
            lambda: create_loss_modifier_pipeline({**ON, "sequence_variance_mode": "target"}),
            "sequence_variance_mode='target' is gone; write sequence_variance_scale",
        ),
        (
            lambda: create_loss_modifier_pipeline({**ON, "mask_ratio_weight_sequence_level": False}),
            "mask_ratio_weight_sequence_level=False is gone; write nothing",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused_with_what_to_write(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
    create_loss_modifier_pipeline({**ON, "mask_ratio_weight_sequence_level": True})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"entropy_threshold": 2.0}, "entropy_threshold=2.0 is out of range"),
        ({"entropy_threshold": "low"}, "entropy_threshold expects a number; got 'low'"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_mistake_names_the_key_that_was_written(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        EntropyModifier(given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_converted_value_out_of_range():
    for value in (0.0, 2.0, "slow", True, float("nan")):
        with pytest.raises((ValueError, TypeError), match="ema_decay"):
            MetricsCollectorModifier({"ema_alpha": value})


# ── both names of one option ──────────────────────────────────────────────────────────────────────

BOTH = [
    # a file of defaults holds the one, and what the user wrote is the other
    ({"mask_ratio_weight_max": 10.0, "mask_ratio_weight_max_weight": 5.0}, "max_weight", 5.0),
    ({"mask_ratio_weight_max": 5.0, "mask_ratio_weight_max_weight": 10.0}, "max_weight", 5.0),
    ({"mask_ratio_weight_max_weight": 5.0, "mask_ratio_weight_max": 10}, "max_weight", 5.0),
    ({"mask_ratio_weight_min": 0.1, "mask_ratio_weight_min_weight": 0.1}, "min_weight", 0.1),
    ({"mask_ratio_weight_min": 0.3, "mask_ratio_weight_min_weight": 0.3}, "min_weight", 0.3),
]


@pytest.mark.parametrize(("given", "name", "value"), BOTH, ids=str)
def test_of_both_names_the_one_that_is_just_the_default_gives_way(given, name, value):
    (modifier,) = create_loss_modifier_pipeline({**ON, "mask_ratio_weight_enabled": True, **given}).modifiers
    assert getattr(modifier.settings, name) == value
    own = {key.removeprefix("mask_ratio_weight_"): v for key, v in given.items()}
    assert getattr(MaskRatioWeightModifier(own).settings, name) == value


def test_of_both_names_of_a_switch():
    for debug, verbose in ((True, False), (False, True), (True, True)):
        assert EntropyModifier({"debug": debug, "verbose": verbose}).settings.verbose is True
    assert EntropyModifier({"debug": False, "verbose": False}).settings.verbose is False


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_former_name_beside_the_name():
    both = {"special_token_ids": [], "special_tokens": [1, 2]}
    assert TargetSmoothingModifier(both).settings.special_tokens == (1, 2)
    assert EntropyModifier({"entropy_threshold": 0.3, "threshold": 0.0}).settings.threshold == 0.3
    with pytest.raises(ValueError, match="entropy_threshold and threshold are names of one option"):
        EntropyModifier({"entropy_threshold": 0.3, "threshold": 0.2})


@pytest.mark.parametrize(("one", "other"), [(5.0, 7.0), (5.0, "7"), (5.0, float("nan")), (True, 7.0)])
def test_two_different_values_are_an_error_that_names_both(one, other):
    config = {"mask_ratio_weight_max": one, "mask_ratio_weight_max_weight": other}
    message = "mask_ratio_weight_max and mask_ratio_weight_max_weight are names of one option; .*give one"
    with pytest.raises(ValueError, match=message):
        create_loss_modifier_pipeline({**ON, **config})


# ── methods ───────────────────────────────────────────────────────────────────────────────────────


def test_the_pipelines_switch(batch):
    pipeline = LossModifierPipeline([EntropyModifier({})])
    loss = torch.tensor(2.0)
    with pytest.warns(DeprecationWarning, match=r"set_temporarily_disabled\(\) is a former name.*with pipel"):
        pipeline.set_temporarily_disabled(True)
    assert pipeline.modify_loss(*batch, loss) is loss
    with pytest.warns(DeprecationWarning, match=r"is_temporarily_disabled\(\) is a former name"):
        assert pipeline.is_temporarily_disabled() is True
    with pytest.warns(DeprecationWarning, match="former name"):
        pipeline.set_temporarily_disabled(False)
    assert pipeline.modify_loss(*batch, loss) is not loss
    with (
        pytest.warns(DeprecationWarning, match="former name"),
        pytest.raises(TypeError, match=r"disabled expects True or False"),
    ):
        pipeline.set_temporarily_disabled("no")


def test_a_modifiers_question():
    for is_on in (True, False):
        modifier = EntropyModifier({"enabled": is_on})
        with pytest.warns(
            DeprecationWarning, match=r"is_enabled\(\) is a former name; write the attribute en"
        ):
            assert modifier.is_enabled() is is_on


class Warmup(BaseLossModifier):
    """Written to nano_gpt's interface, where the pipeline asks `is_enabled`."""

    def __init__(self, config):
        super().__init__(config)
        self.enabled = config.get("enabled", False)
        self.steps = 0

    def is_enabled(self):
        return self.enabled and self.steps > 2

    def modify_loss(self, logits, targets, loss, **kwargs):
        return 2 * loss


def test_a_question_of_ones_own_is_asked(batch):
    modifier = Warmup({"enabled": True})
    pipeline = LossModifierPipeline([modifier])
    assert pipeline.is_empty()
    assert pipeline.modify_loss(*batch, torch.tensor(1.0)) == 1
    modifier.steps = 3
    assert pipeline.get_enabled_modifier_names() == ["Warmup"]
    assert pipeline.modify_loss(*batch, torch.tensor(1.0)) == 2


class TheirMode(enum.Enum):
    LANGUAGE_MODEL = "language_model"
    SEQUENCE_SCORER = "sequence_scorer"


def test_a_mode_of_their_own_enumeration(batch):
    pipeline = LossModifierPipeline([MaskRatioWeightModifier({})], model_mode=TheirMode.LANGUAGE_MODEL)
    assert pipeline.model_mode is ModelMode.LANGUAGE_MODEL
    loss = pipeline.modify_loss(*batch, model_mode=TheirMode.LANGUAGE_MODEL)
    assert loss == pipeline.modify_loss(*batch)
    for mode in (TheirMode.SEQUENCE_SCORER, "sequence_scorer"):
        assert SequenceScorerVarianceModifier({}).supports_mode(mode)
        assert not EntropyModifier({}).supports_mode(mode)
        assert not SequenceScoringJudgeWeightModifier({"judge": judge}).supports_mode(mode)


def test_no_modifiers_at_all():
    assert LossModifierPipeline(None).is_empty()


# ── the table ─────────────────────────────────────────────────────────────────────────────────────


def test_the_table_leads_somewhere():
    for owner, formers in OPTIONS.items():
        known = set(ALIASES)
        if owner == CONFIGURATION:
            from lossmith.modifiers.config import KEYS

            known = set(KEYS)
        else:
            known = set(KINDS[owner].Settings.__dataclass_fields__)
        assert {former.new for former in formers.values() if former.new} <= known
        assert not known & set(formers)


def test_the_migration_page_lists_the_table():
    pages = "\n".join(page.read_text() for page in MIGRATION.glob("*.md"))
    rows = [line.split("|")[1:3] for line in pages.splitlines() if line.startswith("| ")]
    listed = {name: former.new or "" for formers in OPTIONS.values() for name, former in formers.items()}
    for name, new in {**listed, **dict.fromkeys([*CALLS, *REDUCTIONS], "")}.items():
        found = [here for theirs, here in rows if re.search(rf"\b{name}\b", theirs)]
        assert any(f"`{new}`" in here if new else here for here in found), name
