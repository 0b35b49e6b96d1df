"""NVAMP against its formula, written down in fp64."""

import pytest
import torch
from hypothesis import given, strategies as st

from lossmith import (
    CrossEntropyLoss,
    LossModifierPipeline,
    NVAMPLoss,
    Objective,
    TargetSmoothingModifier,
    token_stats,
)
from lossmith.equation.term import TokenLoss
from ranks import on_two_ranks

IGNORE = -100


def naive(logits, targets, alpha=1.0, beta=0.02, gamma=0.001, eps=1e-6, top_k=1):
    keep = targets.reshape(-1) != IGNORE
    ell = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1])[keep], targets.reshape(-1)[keep], reduction="none"
    )
    if not len(ell):
        return logits.sum() * 0
    fixed = ell.detach()
    d = (fixed - fixed.mean()).abs() / (fixed.var(unbiased=False) + eps).sqrt()
    weight = (1 + d) / (1 + d.mean())
    largest = ell.topk(min(top_k, len(ell))).values.mean()
    return alpha * (weight * ell).mean() + beta * ell.mean() + gamma * largest


def batch(seed=0, shape=(3, 5), num_classes=7, ignored=0.3):
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*shape, num_classes, generator=rng, dtype=torch.float64)
    targets = torch.randint(num_classes, shape, generator=rng)
    targets[torch.rand(shape, generator=rng) < ignored] = IGNORE
    return logits.requires_grad_(), targets


OPTIONS = [
    {},
    {"alpha": 0.5, "beta": 2.0, "gamma": 0.7},
    {"gamma": 1.0, "top_k": 4},
    {"gamma": 1.0, "top_k": 1000},
    {"eps": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_and_gradient_are_those_of_the_formula(options):
    logits, targets = batch()
    loss, expected = NVAMPLoss(**options)(logits, targets), naive(logits, targets, **options)
    torch.testing.assert_close(loss, expected)
    upstream = torch.tensor(-1.3, dtype=torch.float64)
    gradients = [torch.autograd.grad(x, logits, upstream, retain_graph=True)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients)


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 4), st.integers(2, 5), st.floats(0, 1))
def test_any_shape_and_any_mask(seed, rows, length, num_classes, ignored):
    logits, targets = batch(seed, (rows, length), num_classes, ignored)
    loss = NVAMPLoss(gamma=0.5)(logits, targets)
    torch.testing.assert_close(loss, naive(logits, targets, gamma=0.5))
    loss.backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[targets == IGNORE].any()


def test_equal_losses_have_weight_one():
    logits = torch.zeros(2, 3, 5)
    loss = NVAMPLoss()(logits, torch.ones(2, 3, dtype=torch.long))
    torch.testing.assert_close(loss, torch.tensor(5.0).log() * (1 + 0.02 + 0.001))


def test_the_parts_sum_to_the_loss_and_every_part_has_a_gradient():
    logits, targets = batch()
    output = NVAMPLoss(gamma=0.5).evaluate(logits, targets)
    assert list(output.parts) == ["variance", "cross_entropy", "max"]
    torch.testing.assert_close(sum(output.parts.values()), output.total)
    for name, part in output.parts.items():
        assert torch.autograd.grad(part, logits, retain_graph=True)[0].any(), name


def test_weights_of_zero_are_as_good_as_absent():
    logits, targets = batch()
    plain = CrossEntropyLoss()(logits, targets)
    assert torch.equal(NVAMPLoss(0.0, 1.0, 0.0)(logits, targets), plain)
    half, on = (NVAMPLoss(1.0, 0.02, gamma)(logits, targets) for gamma in (0.0, 0.5))
    assert half != on


@pytest.mark.parametrize("alias", ["denominator", "num_items_in_batch"])
def test_micro_batches_with_the_count_of_all(alias):
    """What is a statistic of the batch stays one; the rest adds up."""
    logits, targets = batch()
    criterion = NVAMPLoss(alpha=0.0, beta=1.0, gamma=0.3)
    count = (targets != IGNORE).sum()
    parts = [criterion(logits[b : b + 1], targets[b : b + 1], **{alias: count}) for b in range(3)]
    shares = [(targets[b] != IGNORE).sum() / count for b in range(3)]
    expected = naive(logits, targets, alpha=0.0, beta=1.0, gamma=0.0) + sum(
        share * naive(logits[b : b + 1], targets[b : b + 1], alpha=0.0, beta=0.0, gamma=0.3)
        for b, share in enumerate(shares)
    )
    torch.testing.assert_close(sum(parts), expected)


def test_labels_as_hugging_face_has_them():
    logits, labels = batch(ignored=0.0)
    torch.testing.assert_close(
        NVAMPLoss(shift=True)(logits, labels), NVAMPLoss()(logits[:, :-1], labels[:, 1:])
    )


def test_sequence_mean_and_class_weights():
    logits, targets = batch()
    for reduction in ("sequence_mean", "sum"):
        parts = NVAMPLoss(0.0, 1.0, 0.5, reduction=reduction).evaluate(logits, targets).parts
        plain = CrossEntropyLoss(reduction=reduction)(logits, targets)
        torch.testing.assert_close(parts["cross_entropy"], plain)
        largest = naive(logits, targets, alpha=0.0, beta=0.0, gamma=0.5)
        torch.testing.assert_close(parts["max"], largest)


def test_modifiers_go_around_it():
    logits, targets = batch()
    pipeline = LossModifierPipeline([TargetSmoothingModifier({"factor": 0.2})], base=NVAMPLoss(gamma=0.5))
    keep = targets.reshape(-1) != IGNORE
    ell = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 7)[keep], targets.reshape(-1)[keep], reduction="none", label_smoothing=0.2
    )
    d = (ell - ell.mean()).abs() / (ell.var(unbiased=False) + 1e-6).sqrt()
    weight = ((1 + d) / (1 + d.mean())).detach()
    torch.testing.assert_close(
        pipeline(logits, targets), (weight * ell).mean() + 0.02 * ell.mean() + 0.5 * ell.max()
    )


def test_half_precision_and_one_pass(count_ops):
    logits, targets = batch()
    half = logits.detach().bfloat16().requires_grad_()
    with count_ops as ops:
        loss = NVAMPLoss()(half, targets)
        loss.backward()
    assert ops.passes == (1, 1)
    torch.testing.assert_close(loss.double(), naive(half.detach().double(), targets), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k"),
        ({"eps": 0.0}, "eps must be a number > 0"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"stats_scope": "rank"}, "stats_scope"),
        ({"bata": 0.1}, "Did you mean 'beta'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        NVAMPLoss(**options)


def share(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits, targets = batch(ignored=0.1)
    rows = slice(0, 1) if rank == 0 else slice(1, 3)
    criterion = NVAMPLoss(gamma=0.5, top_k=3, stats_scope="global")
    count = (targets != IGNORE).sum()
    loss = criterion(logits[rows], targets[rows], denominator=count)
    loss.backward()
    alone = criterion.evaluate(logits[rows], targets[rows]).parts["max"]
    return loss.detach(), logits.grad, alone.detach()


def test_global_statistics_are_those_of_the_whole_batch(tmp_path):
    found = on_two_ranks(share, tmp_path)
    logits, targets = batch(ignored=0.1)
    expected = naive(logits, targets, gamma=0.5, top_k=3)
    torch.testing.assert_close(found[0][0] + found[1][0], expected.detach())
    torch.testing.assert_close(found[0][1] + found[1][1], torch.autograd.grad(expected, logits)[0])
    # without a denominator each rank's loss is a mean, and those are averaged
    largest = naive(logits, targets, alpha=0.0, beta=0.0, gamma=0.5, top_k=3)
    torch.testing.assert_close((found[0][2] + found[1][2]) / 2, largest.detach())


def test_an_ignored_token_is_no_largest_loss_where_losses_are_negative():
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[0, 1, -100], [2, -100, 3]])
    criterion = NVAMPLoss(alpha=0.0, beta=0.0, gamma=1.0)
    below = TokenLoss(lambda stats, batch: stats.nll - 100, ("nll",))
    own = Objective(criterion.terms(below)).evaluate(logits, targets)
    nll = token_stats(logits, targets).nll[targets >= 0]
    torch.testing.assert_close(own.total, nll.max() - 100)
