"""Rows on which naive formulas fail: certainty, impossibility, offsets, masked classes, ties, NaN."""

import functools
import math

import pytest
import torch
from torch import Tensor

import lossmith
import reference
from reference import COUNTED, DIFFERENTIABLE, IGNORE

pytestmark = pytest.mark.usefixtures("arithmetic")

INF, NAN = float("inf"), float("nan")
TARGET, TOP_WRONG, OTHER = 1, 3, 4
WRONG = [-1.0, None, -0.25, 0.5, -3.0, 0.25]  # None: the target's place
GAPS = [15, 20, 50, 100]


def row_with_gap(gap: float, offset: float = 0.0) -> list[float]:
    """A target ``gap`` above the top wrong answer (below it, if negative)."""
    return [offset + (0.5 + gap if x is None else x) for x in WRONG]


exact = functools.cache(reference.exact_with_gradient)


def ours(name: str, row: list[float], candidate: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    z = torch.tensor([row], dtype=dtype, requires_grad=True)
    stats = lossmith.token_stats(z, torch.tensor([TARGET]), candidates=torch.tensor([[candidate]]))
    value = getattr(stats, name).reshape(())
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient[0]


def check_relative(
    name: str, row: list[float], candidate: int, dtype: torch.dtype, ulps: float, floor: float = 0.0
) -> None:
    """Every entry, however small next to the others, to ``ulps`` units in its last place."""
    values, gradients = exact(tuple(row), TARGET, candidate)
    value, gradient = ours(name, row, candidate, dtype)
    eps = torch.finfo(dtype).eps
    close = {"rtol": ulps * eps, "atol": max(floor * eps, float(torch.finfo(dtype).tiny))}
    torch.testing.assert_close(value.double().item(), values[name], **close)
    torch.testing.assert_close(gradient.double().tolist(), gradients[name], **close)


# -- the reference itself ------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0.25, 15, 50, -15, -50])
@pytest.mark.parametrize("candidate", [TARGET, TOP_WRONG, OTHER])
def test_the_reference_is_right_to_fp64_precision(gap, candidate):
    row = row_with_gap(gap)
    values, gradients = exact(tuple(row), TARGET, candidate)
    z = torch.tensor([row], dtype=torch.float64, requires_grad=True)
    stats = reference.statistics(z, torch.tensor([TARGET]), candidates=torch.tensor([[candidate]]))
    for name in DIFFERENTIABLE:
        (gradient,) = torch.autograd.grad(stats[name].sum(), z, retain_graph=True)
        assert stats[name].item() == pytest.approx(values[name], rel=1e-13, abs=1e-15), name
        assert gradient[0].tolist() == pytest.approx(gradients[name], rel=1e-13, abs=1e-15), name


# -- p_y -> 1 and p_y -> 0 -----------------------------------------------------------------

CERTAIN = [
    "nll",
    "target_prob",
    "target_log1m_prob",
    "entropy",
    "wrong_entropy",
    "wrong_logsumexp",
    "logsumexp",
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gap", [g for g in GAPS if g < 87])  # exp(-87) is fp32's smallest normal number
@pytest.mark.parametrize("name", CERTAIN)
def test_certain_targets_keep_every_digit(name, gap, dtype):
    check_relative(name, row_with_gap(gap), OTHER, dtype, ulps=64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gap", [-15, -20, -50])
@pytest.mark.parametrize("name", ["nll", "target_prob", "target_log1m_prob", "wrong_entropy", "entropy"])
def test_improbable_targets_keep_every_digit(name, gap, dtype):
    check_relative(name, row_with_gap(gap), OTHER, dtype, ulps=64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gap", [15, 20, 50, -15, -20, -50])
@pytest.mark.parametrize("candidate", [TARGET, TOP_WRONG, OTHER])
def test_unlikelihood_keeps_every_digit(candidate, gap, dtype):
    check_relative("candidate_log1m_prob", row_with_gap(gap), candidate, dtype, ulps=64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("top", [15.0, 20.0, 50.0])
def test_unlikelihood_of_a_dominant_wrong_answer(top, dtype):
    """p_c -> 1 for a class other than the target: the case where log1p(-p) is -inf."""
    row = row_with_gap(0.0)
    row[TOP_WRONG] = top
    check_relative("candidate_log1m_prob", row, TOP_WRONG, dtype, ulps=64)
    check_relative("candidate_log1m_prob", row, OTHER, dtype, ulps=64)


@pytest.mark.parametrize("gap", [*GAPS, 1000, -100, -1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_gap_makes_a_nan(gap, dtype):
    rows = torch.tensor([row_with_gap(gap), row_with_gap(0)], dtype=dtype).requires_grad_()
    candidates = torch.tensor([[TARGET, TOP_WRONG, OTHER, -1]] * 2)
    stats = lossmith.token_stats(rows, torch.tensor([TARGET, TARGET]), candidates=candidates)
    for name in DIFFERENTIABLE:
        value = getattr(stats, name)
        (gradient,) = torch.autograd.grad(
            torch.where(value.isfinite(), value, 0.0).sum(), rows, retain_graph=True
        )
        assert not value.isnan().any(), name
        assert gradient.isfinite().all(), name
    truth = reference.statistics(
        rows.detach().double(), torch.tensor([TARGET, TARGET]), candidates=candidates
    )
    for name in DIFFERENTIABLE:
        if "logits" not in name:
            reference.assert_accurate(getattr(stats, name).detach(), truth[name])


@pytest.mark.parametrize("gap", [15, 20])
def test_wrong_entropy_where_subtracting_from_the_whole_fails(gap):
    """Naive fp32 is 14% off at 15 and NaN at 20; ours does not depend on the gap at all."""
    values = [ours("wrong_entropy", row_with_gap(g), OTHER, torch.float32)[0].item() for g in (0, gap, 1000)]
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_true_class_gradient_survives_half_precision(dtype):
    """p_y = .999: the gradient p - 1 is -.001, not 0 as when p is rounded before 1 is subtracted."""
    gap = math.log(0.999 / 0.001)
    z = torch.tensor([[gap / 2, -gap / 2]], dtype=dtype, requires_grad=True)
    lossmith.cross_entropy(z, torch.tensor([0])).backward()
    p = torch.softmax(z.detach().double(), -1)[0, 0]
    assert z.grad[0, 0].item() == pytest.approx((p - 1).item(), rel=torch.finfo(dtype).eps)


# -- a common offset -----------------------------------------------------------------------


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("gap", [0, 1, 15, -15])
def test_a_common_offset_changes_nothing(gap, offset):
    """Bit by bit: the logits are multiples of 1/4, so that adding the offset does not round them."""
    for name in DIFFERENTIABLE:
        if name in (
            "logsumexp",
            "target_logit",
            "wrong_logsumexp",
            "mean_logit",
            "top_wrong_logit",
            "candidate_logits",
        ):
            continue
        value, gradient = ours(name, row_with_gap(gap), OTHER, torch.float32)
        moved_value, moved_gradient = ours(name, row_with_gap(gap, offset), OTHER, torch.float32)
        assert torch.equal(value, moved_value), name
        assert torch.equal(gradient, moved_gradient), name


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_statistics_that_carry_the_offset_carry_it_once(offset):
    for name in (
        "logsumexp",
        "target_logit",
        "wrong_logsumexp",
        "mean_logit",
        "top_wrong_logit",
        "candidate_logits",
    ):
        value, gradient = ours(name, row_with_gap(1), OTHER, torch.float32)
        moved_value, moved_gradient = ours(name, row_with_gap(1, offset), OTHER, torch.float32)
        assert moved_value.item() == pytest.approx(value.item() + offset, abs=1e-3), name
        assert torch.equal(gradient, moved_gradient), name


# -- masked classes, ties, NaN --------------------------------------------------------------


def masked_batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Wrong classes at -inf; all wrong classes at -inf; candidates at -inf; an ignored row of -inf."""
    z = torch.tensor(
        [[1.0, -INF, 2.0, 0.5, -INF], [0.5, -INF, -INF, -INF, -INF], [-INF] * 5, [0.1, 3.0, -INF, 1.0, 2.0]]
    )
    targets = torch.tensor([2, 0, IGNORE, 4])
    candidates = torch.tensor([[0, 1, 2], [0, 1, -1], [0, 1, 2], [1, 2, 2]])
    candidates[1, 0] = 1  # of a certain token, log(1 - p) is -inf: asked for elsewhere
    return z.to(dtype), targets, candidates


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_masked_classes(name, temperature, dtype):
    z, targets, candidates = masked_batch(dtype)

    def read(logits: Tensor) -> Tensor:
        return getattr(
            lossmith.token_stats(logits, targets, candidates=candidates, temperature=temperature), name
        )

    def truth(logits: Tensor) -> Tensor:
        return reference.statistics(logits, targets, candidates=candidates, temperature=temperature)[name]

    reference.Case(
        read, truth, z, torch.randn(read(z).shape, generator=torch.Generator().manual_seed(2))
    ).check()


def test_masked_classes_are_not_counted():
    z, targets, _ = masked_batch(torch.float32)
    stats, truth = lossmith.token_stats(z, targets), reference.statistics(z, targets)
    for name in COUNTED:
        assert torch.equal(getattr(stats, name), truth[name]), name


def test_masked_classes_get_no_gradient():
    z, targets, candidates = masked_batch(torch.float32)
    z.requires_grad_()
    stats = lossmith.token_stats(z, targets, candidates=candidates)
    (
        stats.nll + stats.entropy + stats.logsumexp**2 + stats.candidate_log1m_prob.sum(-1) + stats.total_nll
    ).sum().backward()
    assert torch.equal(z.grad[z.detach() == -INF], torch.zeros(int((z == -INF).sum())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"class_weight": torch.linspace(0.5, 2.0, 5)}], ids=["", "weighed"])
def test_a_class_at_the_lowest_number_is_masked_like_one_at_minus_infinity(options, dtype):
    """Many models mask with finfo.min."""
    z, targets, _ = masked_batch(dtype)
    found = []
    for mask in (-INF, torch.finfo(dtype).min, -1e30):
        logits = z.masked_fill(z == -INF, mask).requires_grad_()
        loss = lossmith.cross_entropy(
            logits, targets, label_smoothing=0.1, z_loss=0.1, confidence_penalty=0.1, **options
        )
        found.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    for loss, gradient in found:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])
        assert not gradient[z == -INF].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("mask", [-INF, -1e30])
def test_no_gradient_is_nan_where_little_is_left(mask, num_classes, dtype):
    """A masked target or nothing but the target, and candidates that are either, the top answer or none."""
    z = torch.zeros(3, num_classes, dtype=dtype)
    z[0, 0], z[1, 1:] = mask, mask
    z.requires_grad_()
    candidates = torch.arange(-1, num_classes).expand(3, -1)
    stats = lossmith.token_stats(z, torch.zeros(3, dtype=torch.long), candidates=candidates)
    stats.compute(*DIFFERENTIABLE)
    for name in DIFFERENTIABLE:
        value = getattr(stats, name)
        (gradient,) = torch.autograd.grad(value.clamp(-99, 99).sum(), z, retain_graph=True)
        assert not value.isnan().any(), name
        assert gradient.isfinite().all(), name


def test_softcap_lifts_masked_classes_to_minus_the_cap():
    z, targets, _ = masked_batch(torch.float64)
    z = z[[0, 1, 3]]
    lifted = torch.where(z == -INF, -2.0, 2.0 * torch.tanh(z / 2.0))
    torch.testing.assert_close(
        lossmith.token_stats(z, targets[[0, 1, 3]], softcap=2.0).entropy,
        lossmith.token_stats(lifted, targets[[0, 1, 3]]).entropy,
    )


@pytest.mark.parametrize(
    "name", ["nll", "target_prob", "target_log1m_prob", "entropy", "logsumexp", "wrong_entropy"]
)
def test_a_masked_target_is_impossible_but_not_nan(name):
    z = torch.tensor([[1.0, -INF, 0.5], [0.0, 1.0, 2.0]], requires_grad=True)
    targets = torch.tensor([1, 1])
    value = getattr(lossmith.token_stats(z, targets), name)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    truth_z = z.detach().double().requires_grad_()
    truth = reference.statistics(truth_z, targets)[name]
    (true_gradient,) = torch.autograd.grad(truth.sum(), truth_z)
    reference.assert_accurate(value.detach(), truth.detach())
    reference.assert_accurate(gradient, true_gradient)


def test_a_masked_target_costs_infinity():
    z = torch.tensor([[1.0, -INF, 0.5], [0.0, 1.0, 2.0]], requires_grad=True)
    assert lossmith.cross_entropy(z, torch.tensor([1, 1]), reduction="none").tolist()[0] == INF
    assert lossmith.cross_entropy(z, torch.tensor([1, 1])).item() == INF


def test_ties_of_the_maximum():
    z = torch.tensor([[2.0, 2.0, 0.0, 2.0], [2.0, 2.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    stats = lossmith.token_stats(z, torch.tensor([3, 2, 1]), candidates=torch.tensor([[0], [1], [1]]))
    assert stats.correct.tolist() == [True, False, True]  # the target wins a tie
    assert stats.predicted.tolist() == [3, 0, 1]  # otherwise the first
    truth = reference.statistics(
        z.detach().double(), torch.tensor([3, 2, 1]), candidates=torch.tensor([[0], [1], [1]])
    )
    for name in DIFFERENTIABLE:
        reference.assert_accurate(getattr(stats, name).detach(), truth[name])
    (gradient,) = torch.autograd.grad(stats.top_wrong_logit.sum(), z, retain_graph=True)
    assert torch.equal(gradient.sum(-1), torch.ones(3))  # a subgradient: it sums to 1


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("num_rows", [6, 40])  # many ignored rows are left out, a few computed and cleared
def test_whatever_stands_in_ignored_rows_their_gradient_is_zero(poison, dtype, options, num_rows, rng):
    z = torch.randn(num_rows, 7, generator=rng).to(dtype)
    clean = z.clone().requires_grad_()
    z[1], z[4, 2] = poison, poison
    z.requires_grad_()
    targets = torch.arange(num_rows) % 7
    targets[[1, 4]] = IGNORE
    found = []
    for logits in (z, clean):
        stats = lossmith.token_stats(
            logits, targets, candidates=targets.clamp(min=0).unsqueeze(-1), **options
        )
        values = torch.cat([getattr(stats, name).reshape(-1) for name in DIFFERENTIABLE])
        weight = torch.arange(1.0, values.numel() + 1)
        torch.where(values.isfinite(), values * weight, 0.0).sum().backward()
        found.append(values.detach())
    assert torch.equal(*found)
    assert torch.equal(z.grad, clean.grad)
    assert torch.equal(z.grad[[1, 4]], torch.zeros(2, 7, dtype=dtype))


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("place", [0, 1])
def test_a_broken_logit_is_not_hidden(poison, place):
    """A NaN or +inf in a supervised row must show in the loss, at the target or elsewhere."""
    z = torch.tensor([[0.0, 1.0, 2.0]])
    z[0, place] = poison
    stats = lossmith.token_stats(z, torch.tensor([1]))
    for name in ("nll", "logsumexp", "entropy"):
        assert not getattr(stats, name).isfinite().any(), name


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("place", [0, 2])
def test_a_broken_row_is_never_right(poison, place):
    """Also where the target is above all that can be compared: accuracy would hide what the loss shows."""
    z = torch.tensor([[3.0, 1.0, 0.5, 0.0]])
    z[0, place] = poison
    stats = lossmith.token_stats(z, torch.tensor([0]))
    assert not stats.nll.isfinite()
    assert not stats.correct


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_class_costs_nothing(dtype):
    z = torch.tensor([[3.0], [-7.0]], dtype=dtype, requires_grad=True)
    stats = lossmith.token_stats(z, torch.tensor([0, 0]))
    for name in ("nll", "entropy", "wrong_entropy", "normalized_wrong_entropy", "total_nll"):
        assert torch.equal(getattr(stats, name), torch.zeros(2, dtype=stats.nll.dtype)), name
        (gradient,) = torch.autograd.grad(getattr(stats, name).sum(), z, retain_graph=True)
        assert torch.equal(gradient, torch.zeros_like(z)), name
    assert stats.correct.all()
    assert stats.predicted.tolist() == [0, 0]
    assert torch.equal(stats.top_prob, torch.ones(2, dtype=stats.nll.dtype))
    assert torch.equal(stats.logsumexp, z.detach().to(stats.nll.dtype).squeeze(-1))


def test_a_row_that_nobody_has_a_gradient_for_gets_none(arithmetic):
    """Also where its logits are no numbers: 0 * NaN would be NaN."""
    logits = torch.randn(3, 6)
    logits[1] = torch.nan
    logits.requires_grad_()
    stats = lossmith.token_stats(logits, torch.tensor([1, 2, 3]))
    kept = stats.restrict(torch.tensor([1, IGNORE, 3]), IGNORE)
    loss = (kept.nll + kept.entropy + kept.total_nll).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient[[0, 2]].isfinite().all()
    assert not gradient[1].any()
