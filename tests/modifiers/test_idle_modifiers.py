"""A modifier that cannot act on what it is given says so once; one that can says nothing."""

import copy
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch

from lossmith import (
    BaseLossModifier,
    CrossEntropyLoss,
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
from lossmith.modifiers.idle import PATIENCE

IGNORE = -100
SEVERAL = PATIENCE + 2


def dense(num_rows=4, length=6, num_classes=9):
    """Logits, and targets none of which is ignored, as in causal training."""
    return torch.randn(num_rows, length, num_classes), torch.randint(num_classes, (num_rows, length))


def masked(*counts, length=6, num_classes=9):
    """Logits, and targets with so many supervised tokens a row."""
    logits, targets = dense(len(counts), length, num_classes)
    for row, count in enumerate(counts):
        targets[row, count:] = IGNORE
    return logits, targets


def said_by(modifier, batches, **options):
    """What a pipeline of one modifier warns of over these batches."""
    pipeline = LossModifierPipeline([modifier], **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logits, targets in batches:
            pipeline.modify_loss(logits, targets)
    assert all(warning.category is UserWarning for warning in caught)
    return [str(warning.message) for warning in caught], pipeline.get_enabled_modifier_names()


# ── token modifiers that cannot act ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["token_classifier", "language_model", None])
@pytest.mark.parametrize("options", [{}, {"use_for_weighting": False}, {"stats_scope": "global"}])
def test_entropy_of_two_classes_says_once_that_there_is_none(mode, options):
    batches = [masked(6, 4, 1, num_classes=2) for _ in range(SEVERAL)]
    said, names = said_by(EntropyModifier(options), batches, model_mode=mode)
    assert len(said) == 1
    assert said[0].startswith("EntropyModifier has no effect: with 2 classes")
    assert "leave it out" in said[0]
    assert names == []


def test_the_metrics_of_two_classes_hold_no_entropies():
    modifier = EntropyModifier({})
    with pytest.warns(UserWarning, match="no effect"):
        modifier.modify_loss(*masked(6, 4, num_classes=2))
    metrics = modifier.get_metrics()
    assert metrics["loss_fallback"] == 1
    assert not [name for name in metrics if "entropy" in name]


@pytest.mark.parametrize("base", [None, CrossEntropyLoss(shift=True)])
@pytest.mark.parametrize("num_rows", [2, 4])
def test_mask_ratio_of_a_causal_batch_says_once_that_all_weights_are_the_same(num_rows, base):
    batches = [dense(num_rows) for _ in range(SEVERAL)]
    said, names = said_by(MaskRatioWeightModifier({}), batches, base=base)
    assert len(said) == 1
    assert "MaskRatioWeightModifier weighs all samples alike" in said[0]
    assert "leave it out" in said[0]
    assert "mask=" in said[0]
    assert names == []


def test_both_are_told_of_a_two_class_token_classifier():
    pipeline = LossModifierPipeline(
        [EntropyModifier({}), MaskRatioWeightModifier({}), TargetSmoothingModifier({})],
        model_mode="token_classifier",
    )
    with pytest.warns(UserWarning, match="no effect|alike") as caught:
        loss = pipeline.modify_loss(*dense(num_classes=2))
    assert sorted(str(warning.message).split()[0] for warning in caught) == [
        "EntropyModifier",
        "MaskRatioWeightModifier",
    ]
    assert loss.isfinite()
    assert pipeline.get_enabled_modifier_names() == ["TargetSmoothingModifier"]
    assert not pipeline.is_empty()


@pytest.mark.parametrize("counts", [(3, 3, 3, 3), (2,)])
def test_a_share_that_is_always_the_same_is_told_once_it_cannot_be_chance(counts):
    """A prompt of the same length everywhere; or one sample a batch."""
    few = [masked(*counts) for _ in range(3)]
    assert said_by(MaskRatioWeightModifier({}), few) == ([], ["MaskRatioWeightModifier"])
    said, names = said_by(MaskRatioWeightModifier({}), few * 4)
    assert len(said) == 1
    assert "weighs all samples alike" in said[0]
    assert names == []


def test_limits_that_leave_one_weight():
    modifier = MaskRatioWeightModifier({"min_weight": 2.0, "max_weight": 2.0})
    said, _ = said_by(modifier, [masked(6, 4, 1)])
    assert said == [
        "MaskRatioWeightModifier weighs all samples alike: min_weight and max_weight are equal; set them "
        "apart, or leave it out"
    ]


@pytest.mark.parametrize("options", [{}, {"direction": "uniform"}])
def test_one_sample_a_batch_has_nothing_to_be_compared_with(options):
    batches = [masked(4) for _ in range(SEVERAL)]
    said, names = said_by(EntropyModifier(options), batches)
    assert len(said) == 1
    assert "every batch so far was a single sample" in said[0]
    assert "stats_scope='global'" in said[0]
    assert names == []
    assert said_by(EntropyModifier({"stats_scope": "global", **options}), batches)[0] == []


@pytest.mark.parametrize("kind", [SequenceScorerVarianceModifier, SequenceScorerCorrelationModifier])
def test_one_score_a_batch_likewise(kind):
    singles = [(torch.rand(1), torch.rand(1)) for _ in range(SEVERAL)]
    said, names = said_by(kind({}), singles)
    assert len(said) == 1
    assert f"{kind.__name__} has no effect: every batch so far was a single sample" in said[0]
    assert names == []
    assert said_by(kind({}), [*singles[:3], (torch.rand(3), torch.rand(3)), *singles])[0] == []


def test_a_modifier_asked_by_itself_remembers_too():
    modifier = EntropyModifier({})
    for _ in range(PATIENCE - 1):
        modifier.modify_loss(*masked(4))
    with pytest.warns(UserWarning, match="single sample"):
        modifier.modify_loss(*masked(4))
    modifier.modify_loss(*masked(4))


# ── no false alarms ───────────────────────────────────────────────────────────────────────────────

HEALTHY = {
    "padding": [masked(6, 4, 1, 3)] * SEVERAL,
    "padding after a full batch": [masked(6, 5, 2), *[dense()] * SEVERAL],
    "samples of other lengths, one at a time": [masked(n) for n in (6, 3, 1, 2, 5, 4, 6, 3, 1, 2)],
    "a last batch of one": [masked(6, 4, 1, 3), masked(3)] * SEVERAL,
    "a batch without targets": [masked(0, 0), masked(6, 4), masked(0, 0)] * SEVERAL,
    "three classes": [masked(6, 4, 1, num_classes=3)] * SEVERAL,
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_acts_says_nothing(name):
    modifiers = [MaskRatioWeightModifier({}), TargetSmoothingModifier({}), MetricsCollectorModifier({})]
    if "one at a time" not in name:
        modifiers.append(EntropyModifier({}))
    for modifier in modifiers:
        assert said_by(modifier, HEALTHY[name]) == ([], [modifier.name])


def test_what_is_switched_off_says_nothing():
    off = [MaskRatioWeightModifier({"power": 0.0}), MaskRatioWeightModifier({"enabled": False})]
    off += [EntropyModifier({"enabled": False})]
    for modifier in off:
        assert said_by(modifier, [dense(num_classes=2)] * SEVERAL)[0] == []


def test_a_pipeline_for_models_of_several_modes_says_nothing():
    """What a mode leaves out is as it should be where the mode is that of the call."""
    pipeline = LossModifierPipeline([EntropyModifier({}), SequenceScorerVarianceModifier({})])
    scores = torch.rand(4)
    for _ in range(SEVERAL):
        pipeline.modify_loss(*masked(6, 4, 1))
        pipeline.modify_loss(scores, 1 - scores)
        pipeline.modify_loss(*masked(6, 4, 1), model_mode="token_classifier")
    assert pipeline.get_enabled_modifier_names() == ["EntropyModifier", "SequenceScorerVarianceModifier"]


def test_names_follow_once_the_shares_differ():
    """The first batch was full by chance."""
    pipeline = LossModifierPipeline([MaskRatioWeightModifier({})])
    with pytest.warns(UserWarning, match="alike"):
        pipeline.modify_loss(*dense())
    assert pipeline.get_enabled_modifier_names() == []
    for _ in range(SEVERAL):
        pipeline.modify_loss(*masked(6, 4, 1))
    assert pipeline.get_enabled_modifier_names() == ["MaskRatioWeightModifier"]


def test_the_loss_is_what_it_was(batch):
    """Telling changes nothing, and neither does having told."""
    logits, targets = batch[0], batch[1].clamp(min=0)
    pipeline = LossModifierPipeline([MaskRatioWeightModifier({"min_weight": 3.0})])
    with pytest.warns(UserWarning, match="alike"):
        first = pipeline.modify_loss(logits, targets)
    again = pipeline.modify_loss(logits, targets)
    assert torch.equal(first, again)
    torch.testing.assert_close(first, 3 * CrossEntropyLoss(reduction="sequence_mean")(logits, targets))
    assert pipeline.get_all_metrics()["MaskRatioWeightModifier.min_weight"] == 3
    assert not pipeline.is_empty()


def test_a_compiled_step_is_not_interrupted():
    logits, targets = dense(num_classes=2)
    pipeline = LossModifierPipeline([EntropyModifier({}), MaskRatioWeightModifier({})])
    compiled = torch.compile(lambda z: pipeline.modify_loss(z, targets), backend="eager", fullgraph=True)
    for _ in range(SEVERAL):
        loss = compiled(logits)
    assert loss.isfinite()


def test_copies_do_not_say_it_again():
    pipeline = LossModifierPipeline([MaskRatioWeightModifier({})])
    batch = dense()
    with pytest.warns(UserWarning, match="alike"):
        pipeline.modify_loss(*batch)
    for other in (copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
        other.modify_loss(*batch)
        assert other.get_enabled_modifier_names() == []


# ── modes ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (lambda: EntropyModifier({}), "sequence_scorer"),
        (lambda: SequenceScorerVarianceModifier({}), "language_model"),
        (lambda: SequenceScorerCorrelationModifier({}), "token_classifier"),
        (lambda: SequenceScoringJudgeWeightModifier({"judge": len}), "token_classifier"),
    ],
)
def test_a_modifier_that_is_not_for_the_pipelines_mode_says_so(make, mode):
    modifier = make()
    with pytest.warns(UserWarning, match=f"{modifier.name} has no effect .*model_mode='{mode}'") as caught:
        pipeline = LossModifierPipeline([modifier, MetricsCollectorModifier({})], model_mode=mode)
    assert len(caught) == 1
    assert pipeline.get_enabled_modifier_names() == ["MetricsCollectorModifier"]
    assert not pipeline.is_empty()
    with pytest.warns(UserWarning, match="has no effect"):
        assert LossModifierPipeline([make()], model_mode=mode).is_empty()


def test_one_that_is_off_is_not_spoken_of():
    LossModifierPipeline([EntropyModifier({"enabled": False})], model_mode="sequence_scorer")


def test_from_keys_too():
    config = {"loss_modifiers_enabled": True, "sequence_variance_enabled": True}
    with pytest.warns(UserWarning, match="SequenceScorerVarianceModifier has no effect"):
        create_loss_modifier_pipeline(config, model_mode=ModelMode.LANGUAGE_MODEL)


def test_a_modifier_that_no_mode_calls_says_so():
    """As one that compares with another ModelMode than lossmith's."""

    class Elsewhere(BaseLossModifier):
        def supports_mode(self, mode):
            return mode is None

        def modify_loss(self, logits, targets, loss, **kwargs):
            return 2 * loss

    with pytest.warns(UserWarning, match=r"Elsewhere has no effect: .*supports_mode.*lossmith\.ModelMode"):
        LossModifierPipeline([Elsewhere({})])


def test_switches_without_the_master_switch_are_spoken_of():
    with pytest.warns(UserWarning, match="entropy_modifier_enabled has no effect without loss_modifiers_ena"):
        pipeline = create_loss_modifier_pipeline({"entropy_modifier_enabled": True, "learning_rate": 1e-3})
    assert pipeline.is_empty()
    # a master switch that was put off on purpose is none of it
    create_loss_modifier_pipeline({"loss_modifiers_enabled": False, "entropy_modifier_enabled": True})


# ── what multiplies to harm says so ───────────────────────────────────────────────────────────────


def sparse_weights(**ratio: float) -> list[BaseLossModifier]:
    judge = SequenceScoringJudgeWeightModifier({"judge": lambda ids: torch.full((len(ids),), 0.5)})
    return [MaskRatioWeightModifier(ratio), judge]


def test_weights_that_favour_the_same_samples_twice_are_spoken_of_once():
    logits, targets = torch.zeros(2, 4, 5), torch.tensor([[1, 2, 3, 4], [1, -100, -100, -100]])
    pipeline = LossModifierPipeline(sparse_weights())
    with pytest.warns(UserWarning, match=r"both favour samples .*reduction='mean'") as caught:
        pipeline.modify_loss(logits, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.modify_loss(logits, targets)
    assert "MaskRatioWeightModifier and SequenceScoringJudgeWeightModifier" in str(caught[0].message)


@pytest.mark.parametrize(
    ("modifiers", "reduction"),
    [
        (sparse_weights(), "mean"),
        (sparse_weights(power=0.0), "auto"),
        (sparse_weights()[:1], "auto"),
        ([EntropyModifier(), *sparse_weights()[1:]], "auto"),
    ],
)
def test_what_does_not_multiply_is_not_spoken_of(modifiers: list[BaseLossModifier], reduction: str):
    logits, targets = torch.zeros(2, 4, 5), torch.tensor([[1, 2, 3, 4], [1, -100, -100, -100]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LossModifierPipeline(modifiers, reduction=reduction).modify_loss(logits, targets)


# ── before training ───────────────────────────────────────────────────────────────────────────────


def test_a_look_at_the_targets_tells_before_training():
    _, targets = dense(num_classes=2)
    pipeline = LossModifierPipeline([EntropyModifier(), MaskRatioWeightModifier(), TargetSmoothingModifier()])
    with pytest.warns(UserWarning, match="EntropyModifier has no effect|MaskRatio.* alike") as caught:
        pipeline.look_at(targets, num_classes=2)
    assert len(caught) == 2
    assert pipeline.get_enabled_modifier_names() == ["TargetSmoothingModifier"]
    pipeline.modify_loss(torch.randn(4, 6, 2), targets)  # and nothing is said again
    healthy = LossModifierPipeline([EntropyModifier(), MaskRatioWeightModifier()])
    healthy.look_at(masked(6, 4, 1)[1], num_classes=9)
    healthy.look_at(targets, mask=torch.arange(6) < torch.tensor([[6], [2], [3], [1]]))
    LossModifierPipeline([SequenceScorerVarianceModifier()]).look_at(torch.rand(1))
    assert len(healthy.get_enabled_modifier_names()) == 2


def test_a_look_sees_shifted_labels_and_padding_as_training_does():
    padded = torch.tensor([[1, 2, 3, 0], [1, 2, 0, 0]])
    LossModifierPipeline([MaskRatioWeightModifier(), TargetSmoothingModifier(padding_token=0)]).look_at(
        padded
    )
    prompts = torch.tensor([[-100, 2, 3, 1], [-100, 2, 4, 1]])  # nothing is left out once they are shifted
    shifting = LossModifierPipeline([MaskRatioWeightModifier()], base=CrossEntropyLoss(shift=True))
    with pytest.warns(UserWarning, match="alike"):
        shifting.look_at(prompts)


# ── the documentation ─────────────────────────────────────────────────────────────────────────────

ROOT = Path(__file__).parents[2]
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/modifiers.md"])
def test_what_the_first_example_switches_on_has_an_effect(page):
    namespace: dict = {}
    for block in CODE.findall((ROOT / page).read_text()):
        exec(block, namespace)
        if "create_loss_modifier_pipeline" in block:
            break
    pipeline = namespace["pipeline"]
    metrics = pipeline.get_all_metrics()
    enabled = [modifier.name for modifier in pipeline.modifiers]
    assert {"EntropyModifier", "MaskRatioWeightModifier"} <= set(enabled)
    assert pipeline.get_enabled_modifier_names() == enabled
    assert metrics["EntropyModifier.weight_std"] > 0.05
    assert metrics["MaskRatioWeightModifier.weight_std"] > 0.1


def test_no_command_weighs_by_mask_ratio_where_nothing_is_masked():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    blocks = [block for page in pages for block in COMMANDS.findall(page.read_text())]
    commands = [c for block in blocks for c in block.replace("\\\n", "").splitlines() if "python " in c]
    weighing = [c for c in commands if "--mask_ratio_weight_enabled" in c]
    assert weighing
    assert not [c for c in weighing if "--objective=masked" not in c and "masked_language_model" not in c]
