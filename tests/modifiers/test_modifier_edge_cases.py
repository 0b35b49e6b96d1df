"""Edges: what is masked or no number, constant scores, copies, other libraries' values, mixed kinds."""

import copy
import math
import pickle

import pytest
import torch

import lossmith
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

nan = math.nan


class Same(BaseLossModifier):
    def modify_loss(self, logits, targets, loss, **kwargs):
        return loss


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("size", [2, 3, 7, 64])
def test_constant_targets_have_no_correlation_whatever_rounding_says(value, size):
    scores = torch.linspace(0.1, 0.9, size)
    modifier = SequenceScorerCorrelationModifier({})
    assert modifier.modify_loss(scores, torch.full((size,), value), torch.tensor(1.0)) == 1


@pytest.mark.parametrize("where", ["prediction", "target"])
def test_a_masked_score_that_is_no_number(where):
    p = torch.tensor([0.2, nan if where == "prediction" else 0.3, 0.4], requires_grad=True)
    t = torch.tensor([0.1, nan if where == "target" else 0.5, 0.9])
    pipeline = LossModifierPipeline(
        [SequenceScorerVarianceModifier({}), SequenceScorerCorrelationModifier({})]
    )
    loss = pipeline(p, t, mask=torch.tensor([1, 0, 1]))
    loss.backward()
    assert loss.isfinite()
    assert p.grad.isfinite().all()
    assert p.grad[1] == 0


def test_given_statistics_know_the_mask():
    logits = torch.randn(2, 3, 5)
    logits[0, 1] = nan
    logits.requires_grad_()
    targets, mask = torch.zeros(2, 3).long(), torch.tensor([[1, 0, 1], [1, 1, 1]])
    modifiers = [EntropyModifier({}), TargetSmoothingModifier({}), MaskRatioWeightModifier({})]
    losses = []
    for stats in (None, lossmith.token_stats(logits, targets)):
        loss = LossModifierPipeline(modifiers).modify_loss(logits, targets, mask=mask, stats=stats)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all()
        losses.append(loss)
    torch.testing.assert_close(*losses)


def test_what_stands_at_an_ignored_place_is_not_in_the_metrics():
    modifier = TargetSmoothingModifier({})
    given = torch.tensor([[1.0, nan]])
    modifier.modify_loss(torch.zeros(1, 2, 3), torch.tensor([[1, -100]]), per_position_loss=given)
    assert modifier.get_metrics()["original_loss"] == 1


def test_aliases_and_typos_next_to_custom_modifiers():
    pipeline = LossModifierPipeline([Same({})])
    logits, targets = torch.randn(2, 3, 5), torch.zeros(2, 3).long()
    mask = torch.tensor([[1, 0, 0], [1, 0, 0]])
    assert pipeline.evaluate(logits, targets, attention_mask=mask).num_tokens == 2
    whole = pipeline.evaluate(logits, targets).total
    torch.testing.assert_close(pipeline.evaluate(logits, targets, num_items_in_batch=12).total, whole / 2)
    with pytest.raises(TypeError, match="Did you mean 'mask'"):
        pipeline.modify_loss(logits, targets, masks=mask)


def test_probabilities_are_no_scores():
    logits = torch.randn(2, 3, 5)
    one_hot = torch.nn.functional.one_hot(torch.zeros(2, 3).long(), 5)
    for targets in (one_hot, logits.softmax(-1)):
        for mode in (None, "language_model"):
            with pytest.raises((TypeError, ValueError), match=r"class ids|targets"):
                LossModifierPipeline([EntropyModifier({})], model_mode=mode).modify_loss(logits, targets)
    with pytest.raises(ValueError, match="one prediction and one target a sequence"):
        LossModifierPipeline(model_mode="SEQUENCE_SCORER")(torch.rand(2, 3), torch.rand(3, 2))
    assert ModelMode("LANGUAGE_MODEL") is ModelMode.LANGUAGE_MODEL


def test_a_judge_that_is_enabled_later(tmp_path):
    modifier = SequenceScoringJudgeWeightModifier({"enabled": False})
    modifier.enabled = True
    with pytest.raises(ValueError, match="needs a judge"):
        modifier.modify_loss(torch.randn(2, 3, 5), torch.zeros(2, 3).long())


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "sequence_mean"])
@pytest.mark.parametrize("denominator", [None, 40])
def test_losses_among_the_metrics_are_means_whatever_the_reduction(reduction, denominator):
    logits, targets = torch.randn(2, 3, 5), torch.zeros(2, 3).long()
    pipeline = LossModifierPipeline([TargetSmoothingModifier({})], reduction=reduction)
    pipeline.modify_loss(logits, targets, denominator=denominator)
    original = pipeline.get_all_metrics()["TargetSmoothingModifier.original_loss"]
    assert original == pytest.approx(CrossEntropyLoss()(logits, targets).item())
    scores = torch.rand(4)
    scorer = LossModifierPipeline([SequenceScorerVarianceModifier({})], reduction=reduction)
    scorer.modify_loss(scores, 1 - scores)
    assert len(scorer.get_all_metrics()) == 9


def test_the_running_average_of_a_scorer():
    t = torch.ones(2)
    collector = MetricsCollectorModifier({"ema_decay": 0.5})
    pipeline = LossModifierPipeline([collector], model_mode="sequence_scorer")
    name = "MetricsCollectorModifier.mean_absolute_relative_error_ema"

    def after(predictions, **inputs):
        pipeline.modify_loss(predictions, t, torch.tensor(1.0), **inputs)
        return pipeline.get_all_metrics()[name]

    assert after(t + 1) == 1
    assert after(t + 5, mask=torch.tensor([0, 0])) == 1  # nobody counts
    assert math.isfinite(after(t + nan))
    with torch.inference_mode():
        assert after(t + 7) == 1  # an evaluation
    pipeline.reset_all_metrics()
    pipeline.to(torch.bfloat16)
    for _ in range(300):
        found = after(t + 1)
    assert found == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_decay_is_what_the_past_keeps(decay):
    """The average starts from 0, which is divided out."""
    collector = MetricsCollectorModifier({"ema_decay": decay})
    pipeline, t = LossModifierPipeline([collector], model_mode="sequence_scorer"), torch.ones(2)
    average, weight = 0.0, 0.0
    for error in (1.0, 4.0, 0.5):
        pipeline.modify_loss(t + error, t)
        average, weight = decay * average + (1 - decay) * error, decay * weight + 1 - decay
        found = pipeline.get_all_metrics()["MetricsCollectorModifier.mean_absolute_relative_error_ema"]
        assert found == pytest.approx(average / weight)


def test_scalars_are_never_dropped():
    logits, targets = torch.randn(2, 3, 5), torch.zeros(2, 3).long()
    scalars = {"aux": torch.tensor(100.0)}
    for modifiers in ([], [MetricsCollectorModifier({})], [Same({})]):
        pipeline = LossModifierPipeline(modifiers)
        assert pipeline.modify_loss(logits, targets, torch.tensor(1.0), scalars=scalars) == 101
    with pytest.raises(ValueError, match="aux belong to no token"):
        LossModifierPipeline().modify_loss(logits, targets, scalars=scalars, reduction="none")


def test_options_are_those_of_the_base():
    base = CrossEntropyLoss(temperature=0.5, softcap=30.0, ignore_index=-1, reduction="sum")
    pipeline = LossModifierPipeline(base=base)
    assert (pipeline.temperature, pipeline.softcap, pipeline.ignore_index) == (0.5, 30.0, -1)
    base.ignore_index = 4
    assert pipeline.ignore_index == 4
    assert list(pipeline.state_dict()) == list(LossModifierPipeline(base=CrossEntropyLoss()).state_dict())


def test_a_configuration_in_class_attributes():
    class Config:
        loss_modifiers_enabled = True
        entropy_modifier_enabled = True
        learning_rate = 1e-3

    assert create_loss_modifier_pipeline(Config()).get_enabled_modifier_names() == ["EntropyModifier"]


@pytest.mark.parametrize(
    "name",
    ["mask_ratio_power", "entropy_weight", "entropy_threshold", "judge_checkpoint", "mask_weight_enabled"],
)
def test_a_short_name_alone_is_a_mistake_and_next_to_other_keys_somebody_elses(name):
    with pytest.raises(ValueError, match=f"no option '{name}'"):
        create_loss_modifier_pipeline({"loss_modifiers_enabled": True, name: 0.5})
    if not name.endswith("_enabled"):
        create_loss_modifier_pipeline({"loss_modifiers_enabled": True, name: 0.5, "learning_rate": 1e-3})


def test_values_of_other_libraries():
    numpy = pytest.importorskip("numpy")
    config = {"loss_modifiers_enabled": True, "entropy_modifier_enabled": True}
    pipeline = create_loss_modifier_pipeline(config | {"entropy_modifier_weight": numpy.float32(0.5)})
    assert pipeline.modifiers[0].settings.weight == 0.5
    omegaconf = pytest.importorskip("omegaconf")
    missing = omegaconf.OmegaConf.create(config | {"lr": "???"})
    assert not create_loss_modifier_pipeline(missing).is_empty()


def test_verbose_under_compile():
    pipeline = LossModifierPipeline([EntropyModifier({"verbose": True})])
    logits, targets = torch.randn(2, 3, 5), torch.zeros(2, 3).long()
    compiled = torch.compile(lambda z: pipeline.modify_loss(z, targets), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits), pipeline.modify_loss(logits, targets))


@pytest.mark.filterwarnings("ignore:MaskRatioWeightModifier weighs all samples alike")
def test_no_sweep_where_none_is_needed(count_ops):
    logits, targets = torch.randn(2, 3, 5), torch.zeros(2, 3).long()
    with count_ops as ops:
        MaskRatioWeightModifier({}).modify_loss(logits, targets, per_position_loss=torch.ones(2, 3))
    assert ops.passes == (0, 0)


def test_custom_modifiers_of_other_kinds():
    class Explicit(BaseLossModifier):
        def __init__(self, config):
            super().__init__(config)
            self.name = "mine"

        def modify_loss(self, logits, targets, loss, mask=None):
            self._metrics = {"loss": loss, "masked": float(mask is not None)}
            return loss * 2

    class NoMetrics(Same):
        def get_metrics(self):
            return None

    logits, targets = torch.randn(2, 3, 5, requires_grad=True), torch.zeros(2, 3).long()
    pipeline = LossModifierPipeline([Explicit({})])
    loss = pipeline.modify_loss(logits, targets, mask=torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(loss, 2 * CrossEntropyLoss()(logits, targets))
    assert pipeline.get_all_metrics()["mine.masked"] == 1
    assert not pipeline.modifiers[0]._metrics["loss"].requires_grad  # which would hold the graph
    with pytest.raises(TypeError, match=r"NoMetrics\.get_metrics must return a mapping"):
        LossModifierPipeline([NoMetrics({})]).get_all_metrics()
    with pytest.raises(TypeError, match="config must be a mapping"):
        Same(3)


@pytest.mark.filterwarnings("ignore:MaskRatioWeightModifier weighs all samples alike")
def test_copies_keep_their_metrics():
    pipeline = LossModifierPipeline([EntropyModifier({}), MaskRatioWeightModifier({})])
    pipeline.modify_loss(torch.randn(2, 3, 5), torch.zeros(2, 3).long())
    expected = pipeline.get_all_metrics()
    for other in (copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
        assert other.get_all_metrics() == pytest.approx(expected)


def test_metrics_are_of_the_last_batch():
    pipeline = LossModifierPipeline([EntropyModifier({}), SequenceScorerVarianceModifier({})])
    pipeline.modify_loss(torch.randn(2, 3, 5), torch.zeros(2, 3).long())
    assert all(name.startswith("EntropyModifier") for name in pipeline.get_all_metrics())
    pipeline.modify_loss(torch.rand(3), torch.rand(3))
    assert all(name.startswith("SequenceScorer") for name in pipeline.get_all_metrics())


def test_weights_do_not_depend_on_the_order_to_the_last_bit(rng):
    judge = SequenceScoringJudgeWeightModifier({"judge": lambda ids: torch.linspace(0.1, 0.9, len(ids))})
    weighers = [EntropyModifier({}), MaskRatioWeightModifier({}), judge]
    logits = torch.randn(5, 7, 11, generator=rng)
    targets = torch.randint(11, (5, 7), generator=rng).masked_fill(
        torch.rand(5, 7, generator=rng) < 0.3, -100
    )
    losses = [
        LossModifierPipeline(order).modify_loss(logits, targets) for order in (weighers, weighers[::-1])
    ]
    assert torch.equal(*losses)
