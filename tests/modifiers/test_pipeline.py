"""The pipeline: every combination is the closed form, in one pass, and nothing waits for the device."""

import contextlib
import itertools
from unittest import mock

import pytest
import torch

import lossmith
import reference_modifiers as ref
from lossmith import (
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
)

IGNORE = -100


def judge(ids: torch.Tensor) -> torch.Tensor:
    """Wrongness that differs from row to row and not with what is drawn."""
    return torch.linspace(0.2, 0.9, len(ids), dtype=torch.float64)


ALL = {
    "entropy": lambda: EntropyModifier({"threshold": 0.1, "weight": 0.8}),
    "smoothing": lambda: TargetSmoothingModifier({"factor": 0.2}),
    "mask ratio": lambda: MaskRatioWeightModifier({"power": 0.7}),
    "judge": lambda: SequenceScoringJudgeWeightModifier({"judge": judge, "exponent": 0.5}),
    "variance": lambda: SequenceScorerVarianceModifier({}),
    "correlation": lambda: SequenceScorerCorrelationModifier({}),
    "metrics": lambda: MetricsCollectorModifier({}),
}
OF_TOKENS = ["entropy", "smoothing", "mask ratio", "judge", "metrics"]


def pipeline_of(*names: str, **options) -> LossModifierPipeline:
    return LossModifierPipeline([ALL[name]() for name in names], **options)


def closed_form(names, logits, targets) -> torch.Tensor:
    """The loss that these modifiers make of a batch."""
    valid = ref.valid_of(targets)
    losses = ref.token_loss(logits, targets)
    if "smoothing" in names:
        losses = ref.smoothed(logits, targets, 0.2)
    weights = torch.ones(len(targets), dtype=torch.float64)
    if "entropy" in names:
        weights = weights * ref.entropy_factor(logits, targets, threshold=0.1, weight=0.8)
    if "mask ratio" in names:
        weights = weights * ref.mask_ratio_factor(valid, power=0.7)
    if "judge" in names:
        weights = weights * ref.judge_factor(judge(targets), valid, exponent=0.5)
    if set(names) & {"entropy", "mask ratio", "judge"}:
        return ref.sequence_mean(losses, valid, weights)
    return ref.token_mean(losses, valid)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_combination_in_every_order_is_the_closed_form(size, batch):
    logits, targets = batch
    plain = closed_form((), logits, targets)
    for names in itertools.combinations(OF_TOKENS, size):
        expected = closed_form(names, logits, targets)
        (gradient,) = torch.autograd.grad(expected, logits)
        if names != ("metrics",):
            assert abs(expected - plain) > 1e-3, "the case shows no effect"
        orders = itertools.permutations(names) if size < 4 else [names, names[::-1]]
        for order in orders:
            loss = pipeline_of(*order).modify_loss(logits, targets)
            torch.testing.assert_close(loss, expected, msg=str(order))
            torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], gradient, msg=str(order))


@pytest.mark.parametrize("mode", list(ModelMode))
@pytest.mark.parametrize("pair", list(itertools.permutations(ALL, 2)), ids="-".join)
def test_pairs_across_modes_leave_out_what_does_not_apply(pair, mode, batch):
    """In a pair the effect of each is there, where it supports the mode, and only there."""
    if mode is ModelMode.SEQUENCE_SCORER:
        logits, targets = torch.rand(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
        factor = 1.0
        if "variance" in pair:
            factor *= ref.variance_factor(logits, targets, 2.0, 1.5)
        if "correlation" in pair:
            factor *= ref.correlation_factor(logits, targets, 4.0)
        expected = factor * (logits - targets).square().mean()
    else:
        logits, targets = batch
        applies = [
            n for n in pair if n in OF_TOKENS and not (n == "judge" and mode is ModelMode.TOKEN_CLASSIFIER)
        ]
        expected = closed_form(applies, logits, targets)
    torch.testing.assert_close(pipeline_of(*pair).modify_loss(logits, targets, model_mode=mode), expected)


NEUTRAL = {
    "entropy": lambda: EntropyModifier({"weight": 0.0}),
    "entropy, metrics only": lambda: EntropyModifier({"use_for_weighting": False}),
    "smoothing": lambda: TargetSmoothingModifier({"factor": 0.0, "padding_token": 3}),
    "mask ratio": lambda: MaskRatioWeightModifier({"power": 0.0, "min_weight": 2.0}),
    "judge": lambda: SequenceScoringJudgeWeightModifier({"judge": judge, "exponent": 0.0}),
    "collector": lambda: MetricsCollectorModifier({}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NEUTRAL)
def test_a_strength_of_zero_is_bit_identical_to_disabled(name, dtype, batch):
    logits, targets = batch[0].detach().to(dtype).requires_grad_(), batch[1]
    for others in ([], ["mask ratio", "smoothing"]):
        made = [ALL[other]() for other in others]
        off = LossModifierPipeline(made)
        on = LossModifierPipeline([*made, NEUTRAL[name]()])
        random = torch.get_rng_state()
        losses = [pipeline.modify_loss(logits, targets) for pipeline in (off, on)]
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.equal(losses[0], losses[1])
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
        assert torch.equal(gradients[0], gradients[1])
        loss = torch.tensor(1.25)
        assert others or on.modify_loss(logits, targets, loss) is loss


def test_with_nothing_enabled_the_loss_itself_comes_back(batch):
    logits, targets = batch
    loss = torch.tensor(2.0, requires_grad=True)
    for pipeline in (
        LossModifierPipeline(),
        lossmith.create_loss_modifier_pipeline({}),
        LossModifierPipeline([EntropyModifier({"enabled": False})]),
    ):
        assert pipeline.modify_loss(logits, targets, loss) is loss
        assert pipeline.is_empty()
        assert pipeline.get_enabled_modifier_names() == []
        assert pipeline.get_all_metrics() == {}
        expected = CrossEntropyLoss()(logits, targets)
        assert torch.equal(pipeline(logits, targets), expected)
        assert torch.equal(pipeline.modify_loss(logits, targets), expected)
    scores = torch.rand(3)
    unsupported = pipeline_of("entropy", "judge")
    assert unsupported.modify_loss(scores, scores, loss) is loss


def test_what_is_enabled(batch):
    logits, targets = batch
    pipeline = pipeline_of("entropy", "smoothing")
    pipeline.add_modifier(ALL["mask ratio"]())
    names = ["EntropyModifier", "TargetSmoothingModifier", "MaskRatioWeightModifier"]
    assert pipeline.get_enabled_modifier_names() == names
    assert not pipeline.is_empty()
    loss = torch.tensor(2.0)
    with pipeline.temporarily_disabled():
        assert pipeline.is_empty()
        assert pipeline.modify_loss(logits, targets, loss) is loss
        with pytest.raises(RuntimeError), pipeline.temporarily_disabled():
            raise RuntimeError
        assert pipeline.is_empty()
    assert pipeline.get_enabled_modifier_names() == names
    pipeline.modifiers[0].enabled = False
    torch.testing.assert_close(
        pipeline.modify_loss(logits, targets), closed_form(["smoothing", "mask ratio"], logits, targets)
    )
    with pytest.raises(TypeError, match="BaseLossModifier"):
        pipeline.add_modifier(torch.nn.Linear(1, 1))


# ── one pass, no waiting ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("base", [None, CrossEntropyLoss(label_smoothing=0.1, z_loss=0.1, temperature=2.0)])
def test_all_modifiers_share_one_pass_each_way(base, batch, count_ops):
    logits, targets = batch
    pipeline = LossModifierPipeline([ALL[name]() for name in OF_TOKENS], base=base)
    with count_ops as ops:
        pipeline.modify_loss(logits, targets).backward()
        pipeline.get_all_metrics()
    assert ops.passes == (1, 1)


def test_statistics_that_are_here_already_are_not_computed_again(batch, count_ops):
    logits, targets = batch
    stats = lossmith.token_stats(logits, targets)
    expected = closed_form(OF_TOKENS, logits, targets)
    with count_ops as ops:
        loss = pipeline_of(*OF_TOKENS).modify_loss(logits, targets, stats=stats)
    assert ops.passes == (1, 0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


@contextlib.contextmanager
def no_synchronisation():
    """Refuses whatever would wait for an accelerator."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this waits for the device")

    names = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(torch.Tensor, name, refuse))
        yield


def test_a_training_step_never_waits_for_the_device(batch):
    logits, targets = batch
    modifiers = [ALL[name]() for name in OF_TOKENS] + [EntropyModifier({"verbose": True})]
    pipeline = LossModifierPipeline(modifiers)
    scorer = pipeline_of("variance", "correlation", "metrics")
    scores, truth = torch.rand(6, requires_grad=True), torch.rand(6)
    given = {"input_ids": torch.zeros_like(targets), "mask": targets != IGNORE}
    with no_synchronisation():
        with pytest.raises(AssertionError, match="waits"):
            bool(logits.sum() > 0)
        loss = pipeline.modify_loss(logits, targets, **given)
        scored = scorer.modify_loss(scores, truth)
    loss.backward()
    scored.backward()
    assert logits.grad.any()
    assert scores.grad.any()


def test_metrics_are_plain_floats_from_one_synchronisation(batch):
    logits, targets = batch
    pipeline = pipeline_of(*OF_TOKENS)
    pipeline.modify_loss(logits, targets)
    reads = []
    tolist = torch.Tensor.tolist
    with mock.patch.object(torch.Tensor, "tolist", lambda self: reads.append(self) or tolist(self)):
        metrics = pipeline.get_all_metrics()
    assert len(reads) == 1
    assert {type(value) for value in metrics.values()} == {float}
    assert len(metrics) > 40
    assert metrics["SequenceScoringJudgeWeightModifier.max_wrongness"] == pytest.approx(0.9)
    pipeline.reset_all_metrics()
    assert pipeline.get_all_metrics() == {}


def test_metrics_do_not_hold_on_to_the_logits(batch):
    import gc
    import weakref

    logits, targets = batch[0].detach().clone().requires_grad_(), batch[1]
    pipeline = pipeline_of(*OF_TOKENS)
    pipeline.modify_loss(logits, targets).backward()
    gone = weakref.ref(logits)
    del logits
    gc.collect()
    assert gone() is None
    assert pipeline.get_all_metrics()


def test_two_of_a_class_have_metrics_of_their_own(batch):
    pipeline = LossModifierPipeline([MaskRatioWeightModifier({"power": p}) for p in (0.5, 1.0)])
    pipeline.modify_loss(*batch)
    metrics = pipeline.get_all_metrics()
    one, two = (metrics[f"MaskRatioWeightModifier{suffix}.max_weight"] for suffix in ("", "_2"))
    assert (one, two) == pytest.approx((6**0.5, 6.0))


def test_the_whole_pipeline_compiles(batch):
    logits, targets = batch
    pipeline = pipeline_of("entropy", "smoothing", "mask ratio", "metrics")
    compiled = torch.compile(lambda z, y: pipeline.modify_loss(z, y), backend="eager", fullgraph=True)
    loss = compiled(logits, targets)
    metrics = pipeline.get_all_metrics()
    torch.testing.assert_close(loss, pipeline.modify_loss(logits, targets))
    assert metrics == pytest.approx(pipeline.get_all_metrics())
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(pipeline.modify_loss(logits, targets), logits)[0]
    )


def test_loss_metrics_are_those_of_the_batch_whatever_it_is_divided_by(batch):
    """A part of a larger batch reports its own mean, not its share of the whole."""
    pipeline = pipeline_of("entropy", "smoothing")
    found = []
    for denominator in (None, 40):
        pipeline.modify_loss(*batch, denominator=denominator)
        found.append(pipeline.get_all_metrics())
    assert found[0] == pytest.approx(found[1])


def test_a_pipeline_can_be_copied_and_pickled(batch):
    import copy
    import pickle

    pipeline = LossModifierPipeline([EntropyModifier({"threshold": 0.2}), TargetSmoothingModifier({})])
    loss = pipeline(*batch)
    for other in (copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
        assert torch.equal(other(*batch), loss)


def test_a_modifier_is_in_a_pipeline_once():
    entropy = EntropyModifier({})
    with pytest.raises(ValueError, match="EntropyModifier is in the pipeline already"):
        LossModifierPipeline([entropy, entropy])


def test_the_names_that_other_libraries_use(batch):
    logits, targets = batch
    mask = torch.rand(targets.shape) > 0.3
    pipeline = pipeline_of("mask ratio")
    theirs = pipeline.modify_loss(logits, targets, attention_mask=mask, num_items_in_batch=9)
    torch.testing.assert_close(theirs, pipeline.modify_loss(logits, targets, mask=mask, denominator=9))
    with pytest.raises(TypeError, match="attention_mask is another name of mask"):
        pipeline.modify_loss(logits, targets, attention_mask=mask, mask=mask)
