"""Shapes that a pipeline is given: flat ones have no samples to be weighed."""

import pytest
import torch

from lossmith import (
    CrossEntropyLoss,
    EntropyModifier,
    LossModifierPipeline,
    MaskRatioWeightModifier,
    MetricsCollectorModifier,
    SequenceScoringJudgeWeightModifier,
    TargetSmoothingModifier,
)

WEIGHERS = {
    "entropy": lambda: EntropyModifier({}),
    "mask ratio": lambda: MaskRatioWeightModifier({}),
    "judge": lambda: SequenceScoringJudgeWeightModifier({"judge": lambda ids: torch.full((len(ids),), 0.4)}),
}
NOT_WEIGHING = {
    "entropy, metrics only": lambda: EntropyModifier({"use_for_weighting": False}),
    "mask ratio of power 0": lambda: MaskRatioWeightModifier({"power": 0.0}),
    "smoothing": lambda: TargetSmoothingModifier({}),
    "collector": lambda: MetricsCollectorModifier({}),
}


@pytest.mark.parametrize("name", WEIGHERS)
def test_flat_targets_are_refused_where_samples_are_weighed(name, batch):
    logits, targets = (values.flatten(0, 1) for values in batch)
    pipeline = LossModifierPipeline([TargetSmoothingModifier({}), WEIGHERS[name]()])
    message = (
        r"Modifier weighs samples, and targets \[24\] are one sample; pass logits \[B, T, V\] and targets "
        r"\[B, T\]"
    )
    with pytest.raises(ValueError, match=message):
        pipeline.modify_loss(logits, targets)
    with pytest.raises(ValueError, match=message):
        pipeline.evaluate(logits, targets)
    with pytest.raises(ValueError, match=message):
        pipeline.count(targets)
    with pytest.raises(ValueError, match=message):
        pipeline.modify_loss(logits, targets, model_mode="language_model", reduction="mean")
    with pipeline.temporarily_disabled():
        torch.testing.assert_close(pipeline(logits, targets), CrossEntropyLoss()(logits, targets))


@pytest.mark.parametrize("name", WEIGHERS)
def test_flat_hidden_states_are_refused_likewise(name):
    head = {"hidden_states": torch.randn(6, 4), "lm_head_weight": torch.randn(9, 4)}
    with pytest.raises(ValueError, match=r"targets \[6\] are one sample"):
        LossModifierPipeline([WEIGHERS[name]()])(targets=torch.randint(9, (6,)), **head)


@pytest.mark.parametrize("name", NOT_WEIGHING)
def test_what_weighs_nothing_takes_them(name, batch):
    logits, targets = batch
    pipeline = LossModifierPipeline([NOT_WEIGHING[name]()])
    flat = pipeline(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(flat, pipeline(logits, targets))


def test_one_sequence_as_a_batch_of_one(batch):
    """The remedy that the message names for a single sequence."""
    logits, targets = batch[0][1], batch[1][1]
    loss = LossModifierPipeline([MaskRatioWeightModifier({})]).modify_loss(logits[None], targets[None])
    torch.testing.assert_close(loss, (6 / 4) ** 0.5 * CrossEntropyLoss()(logits, targets))


@pytest.mark.parametrize("given", [torch.ones(4, 6).long(), [[1.0]], torch.ones(4)])
def test_a_per_position_loss_that_is_none(given, batch):
    with pytest.raises((TypeError, ValueError), match="per_position_loss must"):
        LossModifierPipeline([EntropyModifier({})]).modify_loss(*batch, per_position_loss=given)
    scores = torch.rand(3)
    with pytest.raises((TypeError, ValueError), match="per_position_loss must"):
        LossModifierPipeline([MetricsCollectorModifier({})])(scores, scores, per_position_loss=given)


def test_other_things_than_tensors(batch):
    logits, targets = batch
    pipeline = LossModifierPipeline([EntropyModifier({})])
    with pytest.raises(TypeError, match=r"targets must be a tensor; got list"):
        pipeline.modify_loss(logits, targets.tolist())
    with pytest.raises(TypeError, match=r"logits must be a tensor; got list"):
        pipeline.modify_loss(logits.tolist(), targets)
    with pytest.raises(TypeError, match=r"stats must be lossmith.TokenStats; got dict"):
        pipeline.modify_loss(logits, targets, stats={"nll": 1.0})
    scorer = LossModifierPipeline(model_mode="sequence_scorer")
    with pytest.raises(TypeError, match=r"targets must be a tensor; got list"):
        scorer.modify_loss(torch.rand(2), [0.1, 0.2])


@pytest.mark.parametrize("ignore_index", [-100.0, "-100", True])
def test_an_ignored_id_that_is_none(ignore_index, batch):
    with pytest.raises(TypeError, match="ignore_index must be an id, a whole number; got"):
        LossModifierPipeline([EntropyModifier({})]).modify_loss(*batch, ignore_index=ignore_index)


def test_a_mask_of_scores_that_is_none():
    scores = torch.rand(2)
    with pytest.raises(TypeError, match="mask must be a tensor; got list"):
        LossModifierPipeline([])(scores, scores, mask=[1, 0])


def test_a_single_score_is_a_batch_of_one():
    score = torch.tensor(0.25)
    assert LossModifierPipeline()(score, torch.tensor(0.75)) == 0.25
