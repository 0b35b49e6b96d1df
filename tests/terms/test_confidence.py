"""Confidence, the weight that it gives a token, and what a head of confidence learns from."""

import pytest
import torch
from hypothesis import given, strategies as st

import reference_components as naive
from lossmith import AdaptiveCrossEntropyLoss, ConfidenceCalibration, Objective, token_stats
from lossmith.equation.batch import align
from lossmith.terms.confidence_weight import SCORES, check_weight_range, confidence, confidence_weight

IGNORE, B, T, V = -100, 3, 5, 6


@pytest.fixture
def case(rng):
    logits = torch.randn(B, T, V, generator=rng, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (B, T), generator=rng)
    targets[:, ::2] = logits.detach().argmax(-1)[:, ::2]  # some are right
    targets[0, 3:] = IGNORE
    scores = torch.rand(B, T, generator=rng, dtype=torch.float64, requires_grad=True)
    return logits, targets, scores


def calibrated(logits, targets, scores) -> torch.Tensor:
    class Calibration(Objective):
        input_names = feature_names = (SCORES,)

    return Calibration([ConfidenceCalibration().term()])(logits, targets, confidence_scores=scores)


@given(st.floats(0, 1), st.floats(0.05, 0.95), st.floats(0, 1), st.floats(1, 3))
def test_the_weight_is_its_formula(c, tau, low, high):
    certainty = torch.tensor([c, 0.0, tau, 1.0], dtype=torch.float64)
    found = confidence_weight(certainty, threshold=tau, weight_range=(low, high))
    torch.testing.assert_close(found, naive.confidence_weight(certainty, tau, low, high))
    torch.testing.assert_close(found[1:], torch.tensor([low, 1.0, high], dtype=torch.float64))


def test_confidence_is_a_constant_of_the_untempered_prediction(case):
    logits, targets, scores = case
    top = logits.softmax(-1).amax(-1)[targets != IGNORE]
    for temperature in (1.0, 0.3):
        stats = token_stats(logits, targets, temperature=temperature).flat()
        found = confidence(stats, align(targets))
        torch.testing.assert_close(found[(targets != IGNORE).flatten()], top)
        given = confidence(stats, align(targets, features={SCORES: scores}))
        assert torch.equal(given, scores.flatten())
        assert not found.requires_grad
        assert not given.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("with_scores", [False, True])
def test_the_adaptive_loss_is_its_formula(case, with_scores, temperature):
    """Every part of it: z-loss and penalty are those of cross-entropy, unweighted."""
    logits, targets, scores = case
    options = {"label_smoothing": 0.1, "z_loss": 0.3, "confidence_penalty": 0.2, "temperature": temperature}
    criterion = AdaptiveCrossEntropyLoss(threshold=0.4, weight_range=(0.1, 1.7), **options)
    found = criterion.evaluate(logits, targets, confidence_scores=scores if with_scores else None)
    valid, scale = targets != IGNORE, naive.scale_of(targets)
    certainty = scores if with_scores else logits.softmax(-1).amax(-1)
    weight = naive.confidence_weight(certainty.detach(), 0.4, 0.1, 1.7)
    log_p = (logits / temperature).log_softmax(-1)
    nll = -log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = {
        "cross_entropy": weight * (0.9 * nll - 0.1 * log_p.mean(-1)),
        "z_loss": 0.3 * logits.logsumexp(-1) ** 2,
        "confidence_penalty": 0.2 * (log_p.exp() * log_p).sum(-1),
    }
    expected = {name: (torch.where(valid, part, 0.0) * scale).sum() for name, part in expected.items()}
    torch.testing.assert_close(found.parts, expected)
    torch.testing.assert_close(found.total, sum(expected.values()))
    gradients = [torch.autograd.grad(x, logits)[0] for x in (found.total, sum(expected.values()))]
    torch.testing.assert_close(*gradients)


def test_calibration_is_its_formula(case):
    logits, targets, scores = case
    valid = targets != IGNORE
    found = calibrated(logits, targets, scores)
    of_tokens = naive.calibration(logits, targets, scores)
    expected = (torch.where(valid, of_tokens, 0.0) * naive.scale_of(targets)).sum()
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, scores, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0][valid].all()
    # being surer costs less where the most likely token is the target, and more elsewhere
    is_right = (logits.argmax(-1) == targets)[valid]
    assert is_right.any()
    assert not is_right.all()
    assert torch.equal(gradients[0][valid] < 0, is_right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_score_that_is_certain_costs_a_finite_number(score, dtype):
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0]], dtype=dtype)
    scores = torch.full((2,), score, dtype=dtype, requires_grad=True)
    loss = calibrated(logits, torch.tensor([0, 1]), scores)  # the first is right, the second wrong
    (gradient,) = torch.autograd.grad(loss, scores)
    assert 7 < loss < 9  # half of -log of fp32's eps, for the one that is wrong about itself
    assert gradient.isfinite().all()


def test_scores_where_nothing_is_learned_may_be_anything(case):
    logits, targets, scores = case
    broken = scores.detach().masked_fill(targets == IGNORE, 7.0).requires_grad_()
    criterion = AdaptiveCrossEntropyLoss()
    found, expected = (criterion(logits, targets, confidence_scores=c) for c in (broken, scores))
    torch.testing.assert_close(found, expected)
    for outside in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"confidence_scores must be in \[0, 1\]"):
            criterion(logits, targets, confidence_scores=torch.full((B, T), outside))


@pytest.mark.parametrize("weight_range", [(0.5, 0.9), (1.1, 2.0)])
def test_a_range_without_one_is_refused(weight_range):
    with pytest.raises(ValueError, match="weight_range must hold 1"):
        check_weight_range(weight_range)
    with pytest.raises(ValueError, match="weight_range must hold 1"):
        AdaptiveCrossEntropyLoss(weight_range=weight_range)
    check_weight_range((1.0, 1.0))
