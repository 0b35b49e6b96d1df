"""Nasty rows, half precision, split batches, and inputs that are none."""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

import lossmith
import reference_modifiers as ref
from lossmith import (
    CrossEntropyLoss,
    EntropyModifier,
    LossModifierPipeline,
    MaskRatioWeightModifier,
    MetricsCollectorModifier,
    SequenceScoringJudgeWeightModifier,
    TargetSmoothingModifier,
)

IGNORE = -100


def all_modifiers() -> list:
    judge = SequenceScoringJudgeWeightModifier({"judge": lambda ids: torch.full((len(ids),), 0.4)})
    return [
        EntropyModifier({}),
        TargetSmoothingModifier({}),
        MaskRatioWeightModifier({}),
        judge,
        MetricsCollectorModifier({}),
    ]


def expected_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    valid = ref.valid_of(targets)
    weights = ref.entropy_factor(logits, targets) * ref.mask_ratio_factor(valid)
    weights = weights * ref.judge_factor(torch.full((len(targets),), 0.4, dtype=torch.float64), valid)
    return ref.sequence_mean(ref.smoothed(logits.double(), targets, 0.1), valid, weights)


@pytest.mark.filterwarnings("ignore:(Entropy|MaskRatioWeight)Modifier (has no|weighs all)")
@settings(max_examples=settings().max_examples // 2)  # each makes a pipeline of all modifiers
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(2, 6),
    st.integers(0, 2**31),
    st.sampled_from([0.1, 3.0, 40.0]),
    st.booleans(),
)
def test_any_shape_and_any_mask(num_rows, length, num_classes, seed, scale, has_masked_class):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_rows, length, num_classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(num_classes, (num_rows, length), generator=generator)
    if has_masked_class and num_classes > 2:
        logits[..., 0] = -torch.inf
        targets = targets.clamp(min=1)
    targets[torch.rand(num_rows, length, generator=generator) < 0.4] = IGNORE
    logits.requires_grad_()
    pipeline = LossModifierPipeline(all_modifiers())
    loss = pipeline.modify_loss(logits, targets)
    torch.testing.assert_close(loss, expected_loss(logits, targets), rtol=1e-6, atol=1e-9)
    loss.backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[targets == IGNORE].any()
    assert all(abs(value) < float("inf") for value in pipeline.get_all_metrics().values())


def test_nothing_to_learn_is_a_connected_zero():
    logits = torch.randn(3, 4, 5, requires_grad=True)
    logits.data[0] = torch.nan  # whatever stands there
    targets = torch.full((3, 4), IGNORE)
    pipeline = LossModifierPipeline(all_modifiers())
    loss = pipeline.modify_loss(logits, targets)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
    metrics = pipeline.get_all_metrics()
    assert all(value == value for value in metrics.values())
    assert metrics["EntropyModifier.loss_fallback"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, 5, 50, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(50, (4, 5), generator=generator)
    targets[1, 2:] = IGNORE
    loss = LossModifierPipeline(all_modifiers()).modify_loss(logits, targets)
    assert loss.dtype == torch.float32
    exact = logits.detach().double().requires_grad_()
    expected = expected_loss(exact, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    (truth,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_flat_logits_are_one_sample():
    logits, targets = torch.randn(6, 9, dtype=torch.float64), torch.randint(9, (6,))
    targets[4:] = IGNORE
    pipeline = LossModifierPipeline([TargetSmoothingModifier({}), MetricsCollectorModifier({})])
    torch.testing.assert_close(pipeline(logits, targets), pipeline(logits[None], targets[None]))


# ── reductions and split batches ──────────────────────────────────────────────────────────────────


def test_the_reductions(batch):
    logits, targets = batch
    valid = ref.valid_of(targets)
    losses = torch.where(valid, ref.token_loss(logits, targets), 0.0)
    weights = ref.mask_ratio_factor(valid).unsqueeze(-1)
    pipeline = LossModifierPipeline([MaskRatioWeightModifier({})])
    expected = {
        "auto": ref.sequence_mean(losses, valid, weights.squeeze(-1)),
        "sequence_mean": ref.sequence_mean(losses, valid, weights.squeeze(-1)),
        "mean": (weights * losses).sum() / valid.sum(),
        "token_mean": (weights * losses).sum() / valid.sum(),
        "sum": (weights * losses).sum(),
        "none": weights * losses,
    }
    for reduction, value in expected.items():
        found = pipeline.modify_loss(logits, targets, reduction=reduction)
        torch.testing.assert_close(found, value, msg=reduction)
        fixed = LossModifierPipeline([MaskRatioWeightModifier({})], reduction=reduction)
        torch.testing.assert_close(fixed(logits, targets), value, msg=reduction)
    summing = LossModifierPipeline([MaskRatioWeightModifier({})], base=CrossEntropyLoss(reduction="sum"))
    torch.testing.assert_close(summing(logits, targets), expected["sum"])
    with pytest.raises(ValueError, match="reduction must be one of"):
        pipeline.modify_loss(logits, targets, reduction="average")


@pytest.mark.parametrize("names", [("mask ratio",), ("smoothing",), ("mask ratio", "smoothing")])
def test_micro_batches_add_up(names, batch):
    """With the denominator that the pipeline itself counts."""
    made = {
        "mask ratio": MaskRatioWeightModifier({}),
        "smoothing": TargetSmoothingModifier({"padding_token": 4}),
    }
    logits, targets = batch
    pipeline = LossModifierPipeline([made[name] for name in names])
    whole = pipeline(logits, targets)
    denominator = sum(pipeline.count(targets[rows]) for rows in (slice(0, 1), slice(1, 4)))
    parts = [pipeline(logits[r], targets[r], denominator=denominator) for r in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), whole)
    rows = (targets != IGNORE).any(-1).sum()
    assert denominator == (rows if "mask ratio" in names else ((targets != IGNORE) & (targets != 4)).sum())


def test_an_objective_counts_what_it_divides_by(batch):
    _, targets = batch
    assert CrossEntropyLoss().count(targets) == 14
    assert CrossEntropyLoss(reduction="sequence_mean").count(targets) == 4
    assert CrossEntropyLoss(shift=True).count(targets) == 14 - 4
    mask = torch.zeros_like(targets)
    mask[0] = 1
    assert CrossEntropyLoss().count(targets, mask=mask) == 6
    weight = torch.arange(9.0)
    counted = CrossEntropyLoss(class_weight=weight).count(targets)
    assert counted == weight[targets[targets != IGNORE]].sum()


# ── around another objective ──────────────────────────────────────────────────────────────────────


def test_weights_weigh_every_term_of_a_token(batch):
    logits, targets = batch
    base = CrossEntropyLoss(z_loss=0.1, confidence_penalty=0.2)
    output = LossModifierPipeline([MaskRatioWeightModifier({})], base=base).evaluate(logits, targets)
    weights = ref.mask_ratio_factor(ref.valid_of(targets))
    parts = [base.evaluate(logits[b : b + 1], targets[b : b + 1]).parts for b in range(4)]
    for name in ("cross_entropy", "z_loss", "confidence_penalty"):
        expected = sum(weights[b] * parts[b][name] for b in range(4)) / 4
        torch.testing.assert_close(output.parts[name], expected)
    torch.testing.assert_close(sum(output.parts.values()), output.total)


def test_terms_with_candidates_and_scalars_go_through(batch):
    logits, targets = batch
    unlikely = lossmith.Term(
        "unlikely",
        lambda s, b: -s.candidate_log1m_prob.sum(-1),
        0.3,
        candidates=lambda b: ((b.targets + 1) % 9).unsqueeze(-1),
    )
    base = lossmith.Objective([lossmith.Term("nll", lambda s, b: s.nll), unlikely])
    scalars = {"router": torch.tensor(0.5, dtype=torch.float64)}
    plain = base.evaluate(logits, targets, scalars=scalars)
    smoothed = LossModifierPipeline([TargetSmoothingModifier({"factor": 0.2})], base=base)
    output = smoothed.evaluate(logits, targets, scalars=scalars)
    assert set(output.parts) == {"nll", "unlikely", "router"}
    torch.testing.assert_close(output.parts["unlikely"], plain.parts["unlikely"])
    expected = ref.token_mean(ref.smoothed(logits, targets, 0.2), ref.valid_of(targets))
    torch.testing.assert_close(output.parts["nll"], expected)


def test_a_pipeline_of_a_pipeline():
    inner = LossModifierPipeline([TargetSmoothingModifier({"factor": 0.2})])
    with pytest.raises(TypeError, match="a pipeline cannot be the base of another"):
        LossModifierPipeline([MaskRatioWeightModifier({})], base=inner)


def test_the_objectives_own_call(batch):
    logits, targets = batch
    pipeline = LossModifierPipeline(all_modifiers())
    torch.manual_seed(0)
    loss = pipeline(logits, targets, attention_mask=torch.ones_like(targets), num_items_in_batch=4)
    detailed = pipeline(logits, targets, return_detailed=True, denominator=4)
    torch.testing.assert_close(detailed["total_loss"], loss)
    assert set(detailed) == {"cross_entropy", "total_loss"}


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────


def test_bad_input(batch):
    logits, targets = batch
    pipeline = LossModifierPipeline(all_modifiers())
    cases = [
        (
            {"per_position_loss": torch.zeros(4, 5)},
            ValueError,
            "per_position_loss must have",
        ),
        ({"mask": torch.full((4, 6), 0.5)}, ValueError, "mask must be 0 or 1"),
        ({"mask": torch.ones(4, 5, dtype=torch.bool)}, ValueError, "mask must have the targets' shape"),
        ({"modelmode": 1}, TypeError, "no option 'modelmode'"),
        ({"denominators": 1}, TypeError, "Did you mean 'denominator'"),
        ({"model_mode": "scorer"}, ValueError, "model_mode must be one of 'language_model'"),
        ({"denominator": -1}, ValueError, "denominator"),
        (
            {"stats": lossmith.token_stats(logits[:2], targets[:2])},
            ValueError,
            r"stats must be those of the targets, \[4, 6\]",
        ),
        (
            {"stats": lossmith.token_stats(logits, targets.roll(1, 1))},
            ValueError,
            "of other targets.*shift=True",
        ),
    ]
    for inputs, error, message in cases:
        with pytest.raises(error, match=message):
            pipeline.modify_loss(logits, targets, **inputs)
    with pytest.raises(ValueError, match="shape"):
        pipeline.modify_loss(logits, targets[:2])
    with pytest.raises(ValueError, match=r"9"):
        pipeline.modify_loss(logits, targets.masked_fill(targets == IGNORE, 9))


def test_every_order_of_every_pair_gives_the_same_parts(batch):
    logits, targets = batch
    for pair in itertools.combinations(range(5), 2):
        made = all_modifiers()
        one = LossModifierPipeline([made[i] for i in pair]).evaluate(logits, targets)
        two = LossModifierPipeline([made[i] for i in reversed(pair)]).evaluate(logits, targets)
        assert torch.allclose(one.total, two.total, rtol=1e-14)
