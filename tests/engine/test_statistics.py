"""Every statistic, its value and its gradient, against the formulas."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import lossmith
import reference
from lossmith.engine.predictions import Logits
from lossmith.engine.statistics.stats import STATISTIC_NAMES
from lossmith.engine.sweep_options import SweepOptions
from reference import COUNTED, DIFFERENTIABLE, IGNORE, Case

pytestmark = pytest.mark.usefixtures("arithmetic")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
READINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "both": {"temperature": 1.6, "softcap": 5.0},
}


def random_batch(
    rng: torch.Generator, shape: tuple[int, ...], num_classes: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated rows, some targets ignored, candidates of every kind: target, top class, -1, repeated."""
    rows = torch.randn(*shape, num_classes, generator=rng) + 2 * torch.randn(num_classes, generator=rng)
    logits = (2 * rows).to(dtype)
    targets = torch.randint(num_classes, shape, generator=rng)
    candidates = torch.randint(-1, num_classes, (*shape, 5), generator=rng)
    candidates[..., 0] = targets
    candidates[..., 1] = logits.argmax(-1)
    candidates[..., 4] = candidates[..., 3]
    targets[torch.rand(shape, generator=rng) < 0.25] = IGNORE
    return logits, targets, candidates


def read(
    names: tuple[str, ...], targets: Tensor, candidates: Tensor, **options: float
) -> Callable[[Tensor], Tensor]:
    """logits -> the statistics side by side, [N, number of columns]."""

    def function(z: Tensor) -> Tensor:
        stats = lossmith.token_stats(z, targets, candidates=candidates, **options)
        return side_by_side([getattr(stats, name) for name in names], targets)

    return function


def read_reference(
    names: tuple[str, ...], targets: Tensor, candidates: Tensor, **options: float
) -> Callable[[Tensor], Tensor]:
    def function(z: Tensor) -> Tensor:
        stats = reference.statistics(z, targets, candidates=candidates, **options)
        return side_by_side([stats[name] for name in names], targets)

    return function


def side_by_side(columns: list[Tensor], targets: Tensor) -> Tensor:
    return torch.cat([c.reshape(targets.numel(), -1) for c in columns], -1)


def case(
    names: tuple[str, ...], logits: Tensor, targets: Tensor, candidates: Tensor, **options: float
) -> Case:
    width = sum(candidates.shape[-1] if "candidate" in name else 1 for name in names)
    upstream = torch.randn(targets.numel(), width, generator=torch.Generator().manual_seed(1))
    return Case(
        read(names, targets, candidates, **options),
        read_reference(names, targets, candidates, **options),
        logits,
        upstream,
    )


def test_the_reference_knows_every_statistic():
    assert frozenset(DIFFERENTIABLE + COUNTED) == STATISTIC_NAMES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_statistic_and_its_gradient(name, reading, dtype, rng):
    case((name,), *random_batch(rng, (4, 9), 19, dtype), **READINGS[reading]).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reading", READINGS)
def test_all_statistics_mixed_in_one_scalar(reading, dtype, rng):
    case(DIFFERENTIABLE, *random_batch(rng, (36,), 23, dtype), **READINGS[reading]).check(atol=32)


@settings(max_examples=settings().max_examples // 2)  # with either arithmetic
@given(data=st.data())
def test_any_few_statistics_mixed_on_any_shape(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3), label="shape"))
    num_classes = data.draw(st.integers(2, 40), label="V")
    names = tuple(data.draw(st.lists(st.sampled_from(DIFFERENTIABLE), min_size=1, max_size=4, unique=True)))
    reading = READINGS[data.draw(st.sampled_from(sorted(READINGS)))]
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    dtype = data.draw(st.sampled_from(DTYPES))
    case(names, *random_batch(rng, shape, num_classes, dtype), **reading).check(atol=32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reading", READINGS)
def test_sums_counts_and_entropies_beside_candidates(reading, dtype, rng):
    """Where there are candidates the top wrong answer is taken out of all sums, and added at the end."""
    logits, targets, candidates = random_batch(rng, (36,), 19, dtype)
    weight, counts = torch.rand(19, generator=rng), ("num_wrong", "num_finite")
    sums = ("total_nll", "wrong_entropy", "entropy", "candidate_log1m_prob")
    weighed = SweepOptions(**READINGS[reading], class_weight=weight)

    def stats_of(z: Tensor) -> lossmith.TokenStats:
        stats = weighed.stats(Logits(z), targets, ignore_index=IGNORE, candidates=candidates)
        return stats.compute(*sums, *counts)

    def truth(z: Tensor) -> dict[str, Tensor]:
        given = READINGS[reading] | {"class_weight": weight.to(z.dtype)}
        return reference.statistics(z, targets, candidates=candidates, **given)

    def ours(z: Tensor) -> Tensor:
        stats = stats_of(z)
        return side_by_side([getattr(stats, name) for name in sums], targets)

    def theirs(z: Tensor) -> Tensor:
        stats = truth(z)
        return side_by_side([stats[name] for name in sums], targets)

    Case(ours, theirs, logits, torch.randn(36, 8, generator=rng)).check(atol=32)
    for name in counts:
        expected = truth(logits.to(torch.promote_types(dtype, torch.float32)))[name]
        assert torch.equal(getattr(stats_of(logits), name), expected), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reading", READINGS)
def test_counts_and_ids(reading, dtype, rng):
    logits, targets, _ = random_batch(rng, (60,), 17, dtype)
    stats = lossmith.token_stats(logits, targets, **READINGS[reading])
    wide = torch.promote_types(dtype, torch.float32)  # a tie after rounding in fp32 is a tie
    expected = reference.statistics(logits.to(wide), targets, **READINGS[reading])
    for name in COUNTED:
        value = getattr(stats, name)
        assert torch.equal(value, expected[name]), name
        assert not value.requires_grad


def test_num_wrong_leaves_out_negligible_answers():
    logits = torch.tensor([[50.0, 0.0, -5.0, -18.0, -18.8, -30.0]])
    stats = lossmith.token_stats(logits, torch.tensor([0]))
    assert stats.num_wrong.item() == 3  # e^-18 = 1.5e-8 counts, e^-18.8 = 7e-9 does not
    torch.testing.assert_close(stats.normalized_wrong_entropy, stats.wrong_entropy / torch.tensor(3.0).log())


def test_a_single_wrong_answer_has_no_normalized_entropy():
    logits = torch.tensor([[1.0, 0.0, -50.0], [1.0, 0.0, float("-inf")]], requires_grad=True)
    value = lossmith.token_stats(logits, torch.tensor([0, 0])).normalized_wrong_entropy
    assert torch.equal(value, torch.zeros(2))
    value.sum().backward()
    assert torch.equal(logits.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mask", [-torch.inf, -1e30, torch.finfo(torch.float32).min])
def test_a_masked_target_is_in_no_sum(mask, dtype):
    z = torch.tensor([[1.0, mask, 0.5, -2.0], [0.0, mask, 2.0, 3.0]], dtype=dtype).requires_grad_()
    stats = lossmith.token_stats(z, torch.tensor([1, 1]))
    others = z[:, [0, 2, 3]]
    assert stats.num_finite.tolist() == [3, 3]
    for ours, naive in (
        (stats.mean_logit, others.mean(-1)),
        (stats.total_nll, -others.log_softmax(-1).sum(-1)),
    ):
        torch.testing.assert_close(ours, naive)
        torch.testing.assert_close(
            torch.autograd.grad(ours.sum(), z, retain_graph=True),
            torch.autograd.grad(naive.sum(), z, retain_graph=True),
        )


def test_a_normalized_entropy_is_at_most_one():
    """That of answers too small to be counted is more than their share."""
    logits = torch.full((1, 50_000), -18.6)
    logits[0, :3] = 0.0
    logits.requires_grad_()
    stats = lossmith.token_stats(logits, torch.tensor([0]))
    assert stats.num_wrong.item() == 2
    assert stats.wrong_entropy > torch.tensor(2.0).log()
    assert stats.normalized_wrong_entropy.item() == 1
    (gradient,) = torch.autograd.grad(stats.normalized_wrong_entropy.sum(), logits)
    assert not gradient.any()


@pytest.mark.parametrize("num_classes", [2, 5, 300])
def test_equal_logits_have_normalized_entropy_one_with_a_finite_gradient(num_classes):
    logits = torch.zeros(3, num_classes, requires_grad=True)
    stats = lossmith.token_stats(logits, torch.tensor([0, 1, 1]))
    if num_classes > 2:
        torch.testing.assert_close(stats.normalized_wrong_entropy, torch.ones(3))
    torch.testing.assert_close(stats.entropy, torch.full((3,), float(num_classes)).log())
    (stats.normalized_wrong_entropy.sum() + stats.entropy.sum()).backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-7, rtol=0)


def test_the_worked_numbers_of_the_formulas():
    stats = lossmith.token_stats(torch.tensor([[2.0, 1.0, 4.0, 0.5]]), torch.tensor([2]))
    assert round(stats.wrong_entropy.item(), 3) == 0.906
    assert round(stats.normalized_wrong_entropy.item(), 3) == 0.825
    assert round(stats.target_prob.item(), 3) == 0.823


def test_ignored_positions_are_right_with_certainty(rng):
    logits, targets, candidates = random_batch(rng, (3, 4), 11)
    targets[1] = IGNORE
    stats = lossmith.token_stats(logits, targets, candidates=candidates)
    for name in DIFFERENTIABLE + COUNTED:
        value = getattr(stats, name)[1].detach()
        assert torch.equal(value, reference.at_ignored(name, value).expand_as(value)), name
    assert torch.equal(stats.is_valid, targets != IGNORE)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(  # announced, both views have one pass, and one gradient that is rounded once
    ("dtype", "is_announced"),
    [(torch.float64, False), *((dtype, True) for dtype in (torch.float64, torch.float32, torch.bfloat16))],
)
def test_the_unscaled_view_has_temperature_one(dtype, is_announced, softcap, rng):
    logits, targets, candidates = random_batch(rng, (4, 5), 13, dtype)
    both = ("nll", "entropy", "logsumexp", "candidate_log1m_prob")

    def ours(z: Tensor) -> Tensor:
        stats = lossmith.token_stats(z, targets, candidates=candidates, temperature=2.5, softcap=softcap)
        if is_announced:
            stats.compute(*both, *(f"unscaled.{name}" for name in both))
        views = [getattr(view, name) for name in both for view in (stats, stats.unscaled)]
        return side_by_side(views, targets)

    def truth(z: Tensor) -> Tensor:
        views = [
            reference.statistics(z, targets, candidates=candidates, temperature=t, softcap=softcap)
            for t in (2.5, 1.0)
        ]
        return side_by_side([view[name] for name in both for view in views], targets)

    Case(ours, truth, logits, torch.randn(20, 16, generator=rng)).check()


def test_a_temperature_in_a_tensor_is_the_number_and_is_not_differentiated(rng):
    logits, targets, _ = random_batch(rng, (6,), 9)
    temperature = torch.tensor(1.7, requires_grad=True)
    by_tensor = lossmith.token_stats(logits, targets, temperature=temperature).nll
    assert torch.equal(by_tensor, lossmith.token_stats(logits, targets, temperature=1.7).nll)
    assert not by_tensor.requires_grad


def test_statistics_have_the_shape_of_the_targets(rng):
    for shape in [(), (1,), (5,), (2, 3), (2, 1, 3), (1, 2, 2, 2)]:
        logits, targets, candidates = random_batch(rng, shape, 6)
        stats = lossmith.token_stats(logits, targets, candidates=candidates)
        for name in DIFFERENTIABLE + COUNTED:
            wide = (5,) if "candidate" in name else ()
            assert getattr(stats, name).shape == shape + wide, (name, shape)


def test_detached_statistics_have_the_same_values_and_no_gradient(rng):
    logits, targets, candidates = random_batch(rng, (6,), 9)
    stats = lossmith.token_stats(logits.requires_grad_(), targets, candidates=candidates)
    for name in DIFFERENTIABLE:
        assert getattr(stats, name).requires_grad, name
        assert not getattr(stats.detach(), name).requires_grad, name
        assert torch.equal(getattr(stats, name), getattr(stats.detach(), name))
        assert not getattr(stats.detach().flat(), name).requires_grad, name


def test_a_statistic_that_was_looked_at_without_gradients_has_one_all_the_same(rng):
    """As where it is logged before the loss is made of it."""
    logits, targets, candidates = random_batch(rng, (6,), 9)
    stats = lossmith.token_stats(logits.requires_grad_(), targets, candidates=candidates)
    stats.compute(*DIFFERENTIABLE)
    for name in DIFFERENTIABLE:
        with torch.no_grad():
            looked_at = getattr(stats, name)
        assert getattr(stats, name).requires_grad, name
        assert torch.equal(getattr(stats, name), looked_at), name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_restricted_statistics_are_those_of_fewer_targets(temperature, rng):
    """Values and gradients are those of a batch in which the others had been ignored from the first."""
    logits, targets, candidates = random_batch(rng, (12,), 9, torch.float64)
    fewer = targets.masked_fill(torch.rand(12, generator=rng) < 0.4, IGNORE)
    options = {"candidates": candidates, "temperature": temperature}
    found = []
    for is_restricted in (True, False):
        z = logits.clone().requires_grad_()
        stats = lossmith.token_stats(z, targets if is_restricted else fewer, **options)
        stats = stats.restrict(fewer, IGNORE) if is_restricted else stats
        columns = [getattr(v, name) for v in (stats, stats.unscaled) for name in DIFFERENTIABLE]
        values = side_by_side(columns, fewer)
        total = torch.where(values.isfinite(), values, 0.0).sum()
        counts = [getattr(stats, name) for name in COUNTED]
        found.append([values.detach(), *torch.autograd.grad(total, z), *counts])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_no_candidates_at_all_are_fine(rng):
    logits, targets, candidates = random_batch(rng, (2, 3), 7)
    stats = lossmith.token_stats(logits.requires_grad_(), targets, candidates=candidates[..., :0])
    assert stats.candidate_log1m_prob.shape == (2, 3, 0)
    (stats.candidate_log1m_prob.sum() + stats.nll.sum()).backward()
    assert logits.grad.isfinite().all()


def test_another_ignore_index_of_logits_and_of_a_head(rng):
    hidden, weight = torch.randn(4, 3, generator=rng), torch.randn(5, 3, generator=rng)
    targets = torch.tensor([1, 2, 0, 2])
    for ignored in (2, -1):
        moved = targets.masked_fill(targets == 2, ignored)
        expected = lossmith.token_stats(hidden @ weight.t(), targets.masked_fill(targets == 2, -100)).nll
        assert torch.equal(expected == 0, targets == 2)
        for stats in (
            lossmith.token_stats(hidden @ weight.t(), moved, ignore_index=ignored),
            lossmith.linear_token_stats(hidden, weight, moved, ignore_index=ignored),
        ):
            torch.testing.assert_close(stats.nll, expected)


def test_statistics_of_a_head_are_capped_like_those_of_its_logits(rng):
    hidden, weight = 5 * torch.randn(4, 3, generator=rng), torch.randn(5, 3, generator=rng)
    targets = torch.tensor([1, 2, 0, 2])
    expected = lossmith.token_stats(2 * torch.tanh(hidden @ weight.t() / 2), targets).nll
    torch.testing.assert_close(
        lossmith.linear_token_stats(hidden, weight, targets, softcap=2.0).nll, expected
    )
