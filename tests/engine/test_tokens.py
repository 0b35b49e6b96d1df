"""Statistics that are derived in one step, and sums of terms, are those of the formulas on nasty rows too."""

import pytest
import torch
from token_case import nasty_logits
from torch.testing import assert_close

import lossmith
from lossmith.engine.predictions import Logits
from lossmith.engine.sweep_options import SweepOptions
from lossmith.engine.tokens import arithmetic, native_tokens
from lossmith.engine.tokens.derivation import DERIVED, RAW, Derivation
from lossmith.equation.weighing import weighed_sums

NAMES = tuple(DERIVED)
INF = float("inf")
needs_compiler = pytest.mark.skipif(not native_tokens.takes(torch.zeros(1)), reason="no C++ compiler")


def stats_of(logits, targets, backend, *, candidates=None, **reading):
    leaf = logits.clone().requires_grad_()
    options = SweepOptions(backend=backend, **reading)
    return leaf, options.stats(Logits(leaf), targets, ignore_index=-100, candidates=candidates)


def gradient_of(leaf, value, upstream):
    (gradient,) = torch.autograd.grad(value, leaf, upstream, retain_graph=True)
    return gradient


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reading", [{}, {"temperature": 0.7}, {"class_weight": True}], ids=str)
def test_a_derived_statistic_is_its_formula(name, reading):
    logits, targets = nasty_logits()
    targets[13:15] = -100
    candidates = torch.stack([targets.clamp(min=0), *(torch.full_like(targets, i) for i in (0, 3, 5, -1))], 1)
    if "class_weight" in reading:
        weight = torch.rand(logits.shape[1], dtype=torch.float64)
        weight[2] = 0.0
        reading = {"class_weight": weight}
    values, gradients = [], []
    for backend in (None, "torch"):
        leaf, stats = stats_of(logits, targets, backend, candidates=candidates, **reading)
        value = getattr(stats, name)
        upstream = torch.randn(value.shape, dtype=value.dtype, generator=torch.manual_seed(1))
        values.append(value.detach())
        gradients.append(gradient_of(leaf, value, upstream))
    assert_close(*values, rtol=1e-12, atol=1e-14, equal_nan=True)
    assert_close(*gradients, rtol=1e-10, atol=1e-13, equal_nan=True)


@needs_compiler
def test_announced_statistics_are_derived_in_one_step(monkeypatch):
    calls = []
    derive = native_tokens.derive
    monkeypatch.setattr(
        native_tokens, "derive", lambda of, *rest: (calls.append(of.names), derive(of, *rest))
    )
    logits, targets = nasty_logits()
    stats = lossmith.token_stats(logits, targets).compute("nll", "entropy", "total_nll")
    together = {name: getattr(stats, name) for name in ("nll", "entropy", "total_nll")}
    assert calls == [("nll", "entropy", "total_nll")]
    for name, value in together.items():  # alone they have the same bits
        assert torch.equal(getattr(lossmith.token_stats(logits, targets), name), value)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_terms", "has_weight"), [(1, False), (1, True), (3, False), (3, True)])
def test_weighed_sums_are_those_of_pytorch(num_terms, has_weight, dtype):
    torch.manual_seed(0)
    scale = torch.rand(50, dtype=dtype)
    scale[::7] = 0.0
    weight = torch.rand(50, dtype=dtype) if has_weight else None
    if weight is not None:
        weight[::5] = 0.0
    found = []
    for backend in (None, "torch"):
        values = [torch.randn(50, dtype=dtype, generator=torch.manual_seed(k)) for k in range(num_terms)]
        values[0][0], values[-1][7] = INF, float("nan")  # where the scale is 0
        leaves = [value.requires_grad_() for value in values]
        total, sums, shares = weighed_sums(leaves, scale, weight, backend=backend)
        assert not shares.requires_grad
        loss = 1.7 * total + (sums * torch.arange(1.0, num_terms + 1, dtype=dtype)).sum()
        found.append((total, sums, shares, *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*found, strict=True):
        assert_close(one, other)
        assert one.isfinite().all()


@pytest.mark.parametrize("weight", [torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64), torch.tensor(2.0)])
def test_weights_of_another_kind_are_pytorchs_business(weight):
    total, *_ = weighed_sums([torch.arange(3.0)], torch.ones(3), weight)
    assert total == (torch.arange(3.0) * weight).sum()


@needs_compiler
def test_many_tokens_on_several_threads_have_the_bits_of_one():
    torch.manual_seed(0)
    logits, targets = torch.randn(9000, 11, requires_grad=True), torch.randint(11, (9000,))
    found = []
    for num_threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            stats = lossmith.token_stats(logits, targets).compute("entropy", "nll")
            value = stats.entropy * stats.nll
            found.append((value.detach(), *torch.autograd.grad(value.sum(), logits)))
        finally:
            torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@needs_compiler
def test_compiled_code_refuses_what_does_not_fit():
    raw = [torch.zeros(3) for _ in range(3)]
    derivation = Derivation(("nll",), torch.zeros(4, dtype=torch.long), None, -100, None)
    with pytest.raises(ValueError, match="takes reference as 4"):
        derivation.of(raw)
    half = [torch.zeros(4, dtype=torch.bfloat16) for _ in range(3)]
    with pytest.raises(ValueError, match="float32 or float64"):
        native_tokens.derive(derivation, half, [half[0].clone()])
    with pytest.raises(ValueError, match="float32 or float64"):
        native_tokens.weigh(half[:1], half[0], None, half[0].reshape(1, 4))
    with pytest.raises(ValueError, match="takes values as 4"):
        native_tokens.weigh([torch.zeros(3)], torch.zeros(4), None, torch.zeros(1, 4))


def test_the_compiled_code_has_the_same_lists():
    assert native_tokens.RAW == RAW
    assert native_tokens.DERIVED == NAMES


def test_without_an_arithmetic_pytorch_does_it(monkeypatch):
    monkeypatch.setattr(arithmetic, "ARITHMETICS", {})
    logits, targets = nasty_logits()
    leaf, stats = stats_of(logits[:4], targets[:4], None)
    assert type(stats.nll.grad_fn).__name__ == "SoftplusBackward0"
    assert_close(gradient_of(leaf, stats.nll.sum(), None), logits[:4].softmax(-1) - torch.eye(7)[targets[:4]])
