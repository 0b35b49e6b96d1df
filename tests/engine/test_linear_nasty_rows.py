"""Rows on which naive formulas fail, made by a head: certainty, masked classes, offsets, NaN, nothing."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import linear_case
import lossmith
import reference
from linear_case import IGNORE, STRATEGIES, D, Head, V

pytestmark = [pytest.mark.usefixtures("arithmetic"), pytest.mark.parametrize("strategy", STRATEGIES)]

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
OPTIONS = {"z_loss": 0.01, "label_smoothing": 0.1, "focal_gamma": 2.0, "confidence_penalty": 0.1}


@pytest.fixture(params=["packed", "unpacked"])
def packing(request, monkeypatch) -> str:
    """On an accelerator ignored tokens are computed too: the host would have to know how many there are."""
    if request.param == "unpacked":
        monkeypatch.setattr("lossmith.engine.head.packing.packs", lambda targets: False)
    return request.param


def run(head: Head, targets: Tensor, strategy: str, **options) -> tuple[Tensor, ...]:
    loss = lossmith.linear_cross_entropy(
        head.hidden,
        head.weight,
        targets,
        bias=head.bias,
        strategy=strategy,
        memory_budget=head.budget(2),
        **options,
    )
    return (loss.detach(), *torch.autograd.grad(loss.sum(), head.leaves))


def run_logits(head: Head, targets: Tensor, **options) -> tuple[Tensor, ...]:
    loss = lossmith.cross_entropy(head.logits(), targets, **options)
    return (loss.detach(), *torch.autograd.grad(loss.sum(), head.leaves))


def identity(logits: Tensor) -> Head:
    """A head whose logits are these, whatever the dtype."""
    weight = torch.eye(logits.shape[-1], dtype=logits.dtype)
    return Head(logits.clone().requires_grad_(), weight.requires_grad_())


# -- certainty ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [15.0, 20.0, 50.0, 100.0, 1000.0, -20.0, -100.0, -1000.0])
def test_certain_and_improbable_targets(gap, dtype, strategy):
    rows = torch.tensor([[0.5 + gap, 0.25, 0.5, -1.0], [0.0, 0.5, -2.0, 0.5 + gap]], dtype=dtype)
    targets = torch.tensor([0, 3])
    for options in ({}, OPTIONS):
        ours = run(identity(rows), targets, strategy, **options)
        truth = rows.double().requires_grad_()
        expected = reference.cross_entropy(truth, targets, **options)
        (gradient,) = torch.autograd.grad(expected, truth)
        reference.assert_accurate(ours[0], expected.detach(), atol=32.0)
        reference.assert_accurate(ours[1], gradient, atol=64.0)


@pytest.mark.parametrize("gap", [15.0, 20.0, 50.0])
def test_a_certain_target_keeps_every_digit(gap, strategy):
    """Not only those that count next to the largest entry."""
    rows = torch.tensor([[0.5 + gap, 0.25, 0.5, -1.0]])
    loss, gradient, _ = run(identity(rows), torch.tensor([0]), strategy)
    truth = rows.double().requires_grad_()
    expected = reference.cross_entropy(truth, torch.tensor([0]))
    (exact,) = torch.autograd.grad(expected, truth)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_likely_target_is_summed_in_fp32(dtype, strategy):
    """The rounding of the target's logit, .03 at 9 in bf16, is most of what is wrong with a loss of .06."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 64, generator=rng).to(dtype)
    targets = torch.randint(500, (50,), generator=rng)
    hidden = (weight[targets] * 0.15).to(dtype)
    head = Head(hidden.requires_grad_(), weight.requires_grad_())
    ours = run(head, targets, strategy, reduction="none")[0]
    exact = reference.cross_entropy(head.to(torch.float64).logits(), targets, reduction="none")
    rounded = functional.cross_entropy(head.logits().float(), targets, reduction="none")
    assert (ours - exact).abs().mean() < 0.3 * (rounded - exact).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_changes_nothing(offset, dtype, strategy):
    """Logits and offset are multiples of 1/4, so that adding them does not round."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randint(-8, 8, (6, D), generator=rng).to(dtype) / 2
    weight = torch.randint(-8, 8, (V, D), generator=rng).to(dtype) / 2
    targets = torch.randint(V, (6,), generator=rng)
    found = []
    for shift in (0.0, offset):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, torch.full((V,), shift, dtype=dtype))]
        found.append(run(Head(*leaves), targets, strategy, focal_gamma=2.0, confidence_penalty=0.1))
    for plain, moved in zip(*found, strict=True):
        torch.testing.assert_close(plain, moved)
    assert torch.equal(found[0][0], found[1][0])


# -- classes that are not there ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, OPTIONS, {"softcap": 3.0}, {"temperature": 0.5}], ids=str)
def test_a_bias_of_minus_infinity_masks_a_class(options, dtype, strategy):
    head = linear_case.head(8, dtype=dtype)
    head.bias.data[[1, 4]] = -INF
    targets = torch.tensor([0, 2, 3, 5, 6, 0, 2, 3])
    found, expected = run(head, targets, strategy, **options), run_logits(head, targets, **options)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    if dtype == torch.bfloat16:
        tolerance = {"rtol": 0, "atol": 0.03}
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, **tolerance)
    if "softcap" not in options:
        assert torch.equal(found[2][[1, 4]], torch.zeros(2, D, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_masked_target_costs_infinity(dtype, strategy):
    head = linear_case.head(4, dtype=dtype)
    head.bias.data[2] = -INF
    targets = torch.tensor([0, 2, 1, 3])
    ours = run(head, targets, strategy, reduction="none")[0]
    assert ours.isinf().tolist() == [False, True, False, False]
    assert run(head, targets, strategy)[0] == INF
    weight = torch.ones(V)
    weight[2] = 0.0
    weighted = run(head, targets, strategy, class_weight=weight)
    assert all(x.isfinite().all() for x in weighted)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    rtol, atol = {torch.bfloat16: (2e-2, 1e-2), torch.float32: (1e-5, 1e-6)}.get(dtype, (1e-10, 1e-12))
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", [1, 2])
def test_one_and_two_classes(num_classes, dtype, strategy, packing):
    head = linear_case.head(5, dtype=dtype, num_classes=num_classes)
    targets = torch.tensor([0, num_classes - 1, IGNORE, 0, num_classes - 1])
    found, expected = run(head, targets, strategy, **OPTIONS), run_logits(head, targets, **OPTIONS)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, dtype)
    if num_classes == 1:
        plain = run(head, targets, strategy)
        assert not any(x.any() for x in plain)


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_or_two(num_tokens, dtype, strategy, packing):
    head, targets = linear_case.head(num_tokens, dtype=dtype), torch.tensor([3, IGNORE][:num_tokens])
    for ours, theirs in zip(run(head, targets, strategy), run_logits(head, targets), strict=True):
        assert_close(ours, theirs, dtype)


# -- what stands where there is no target ----------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, OPTIONS, {"softcap": 3.0}, {"reduction": "none"}], ids=str)
def test_whatever_stands_in_ignored_rows_leaks_nowhere(poison, dtype, options, strategy, packing):
    clean = linear_case.head(9, dtype=dtype)
    targets = torch.arange(9) % V
    targets[[1, 4, 5]] = IGNORE
    dirty = clean.hidden.detach().clone()
    dirty[1], dirty[4, 2], dirty[5] = poison, poison, -poison
    poisoned = Head(dirty.requires_grad_(), clean.weight, clean.bias)
    found = run(poisoned, targets, strategy, **options)
    for ours, theirs in zip(found, run(clean, targets, strategy, **options), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(found[1][[1, 4, 5]], torch.zeros(3, D, dtype=dtype))


@pytest.mark.parametrize("poison", [NAN, INF])
def test_statistics_and_parts_see_nothing_of_ignored_rows(poison, strategy, packing):
    head, targets = linear_case.head(9), torch.arange(9) % V
    targets[[1, 4]] = IGNORE
    with torch.no_grad():
        head.hidden[[1, 4]] = poison
    output = lossmith.CrossEntropyLoss(z_loss=0.1).evaluate(targets=targets, **head.inputs(2, strategy))
    value = output.stats.nll.sum() + output.parts["z_loss"] + output.stats.entropy.sum()
    assert value.isfinite()
    for gradient in torch.autograd.grad(value, head.leaves):
        assert gradient.isfinite().all()
    assert all(x == x for x in output.metrics.to_dict().values())


def test_an_all_ignored_batch_of_nan(strategy, packing):
    head = linear_case.head(5)
    with torch.no_grad():
        head.hidden.fill_(NAN)
    loss, *gradients = run(head, torch.full((5,), IGNORE), strategy)
    assert loss == 0
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_broken_row_is_not_hidden(poison, dtype, strategy, packing):
    head, targets = linear_case.head(5, dtype=dtype), torch.arange(5)
    with torch.no_grad():
        head.hidden[2, 1] = poison
    losses = run(head, targets, strategy, reduction="none")[0]
    assert losses.isfinite().tolist() == [True, True, False, True, True]
    loss, hidden, weight, _ = run(head, targets, strategy)
    assert not loss.isfinite()
    assert not hidden[2].isfinite().all()
    assert not weight.isfinite().all()


def test_accelerators_compute_the_ignored_rows_too(strategy, monkeypatch):
    """Their way gives the same numbers."""
    head, targets = linear_case.head(4, 6), linear_case.targets(4, 6)
    expected = run(head, targets, strategy, **OPTIONS)
    monkeypatch.setattr("lossmith.engine.head.packing.packs", lambda targets: False)
    plan = lossmith.linear_cross_entropy.explain(head.hidden, head.weight, targets)
    assert plan.num_tokens == 24
    for ours, theirs in zip(run(head, targets, strategy, **OPTIONS), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# -- a scale and a cap of the model's own ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{"lm_head_scale": 0.25}, {"lm_head_softcap": 2.0}], ids=str)
def test_the_models_own_scale_and_cap(options, dtype, strategy):
    head, targets = linear_case.head(6, dtype=dtype), linear_case.targets(6)
    z = head.logits() * options.get("lm_head_scale", 1.0)
    cap = options.get("lm_head_softcap")
    expected = lossmith.cross_entropy(z if cap is None else cap * torch.tanh(z / cap), targets, z_loss=0.1)
    criterion = lossmith.CrossEntropyLoss(z_loss=0.1)
    loss = criterion(targets=targets, **head.inputs(2, strategy), **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, head.leaves), torch.autograd.grad(expected, head.leaves)
    )
