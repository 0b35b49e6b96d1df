"""The Triton kernels of tokens, interpreted: the formulas, in double precision, rounded once."""

import itertools

import pytest
import torch
from interpreted_case import patched_once, quiet  # noqa: F401
from token_case import nasty_logits
from torch.testing import assert_close

from lossmith.engine.predictions import Logits
from lossmith.engine.sweep_options import SweepOptions
from lossmith.engine.tokens import triton_tokens
from lossmith.engine.tokens.derivation import DERIVED, Derivation
from lossmith.equation.weighing import weighed_sums

pytestmark = quiet
INF = float("inf")


def raw_statistics(name):
    """fp32 raw statistics of nasty rows, and the derivation of one statistic of them."""
    logits, targets = nasty_logits()
    targets[13:15] = -100
    candidates = torch.stack([targets.clamp(min=0), *(torch.full_like(targets, i) for i in (0, 3, 5, -1))], 1)
    weight = torch.rand(logits.shape[1])
    weight[2] = 0.0
    options = SweepOptions(backend="torch", class_weight=weight)
    stats = options.stats(Logits(logits.float()), targets, ignore_index=-100, candidates=candidates)
    stats.compute(name)
    derivation = Derivation((name,), targets, candidates, -100, "triton")
    return derivation, [stats._raw.read(0, raw) for raw in derivation.made_of]


@pytest.mark.parametrize("name", DERIVED)
def test_a_derived_statistic_is_its_formula(name):
    derivation, raw = raw_statistics(name)
    found = []
    for backend, given in (("triton", raw), ("native", [value.double() for value in raw])):
        one = Derivation((name,), derivation.targets, derivation.candidates, -100, backend)
        leaves = [value.clone().requires_grad_() for value in given]
        (value,) = one.of(leaves).values()
        upstream = torch.randn(value.shape, generator=torch.manual_seed(1)).to(value.dtype)
        grads = torch.autograd.grad(value, leaves, upstream, allow_unused=True)
        found.append([value.detach(), *grads])
    for ours, truth in zip(*found, strict=True):
        assert (ours is None) == (truth is None)
        if ours is not None:
            assert_close(ours, truth.float(), rtol=3e-7, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(("num_terms", "has_weight"), [(1, False), (1, True), (3, False), (3, True)])
def test_weighed_sums(num_terms, has_weight, monkeypatch):
    monkeypatch.setattr(triton_tokens, "TOKENS_OF_A_SUM", 16)
    torch.manual_seed(0)
    scale = torch.rand(50)
    scale[::7] = 0.0
    weight = torch.rand(50) if has_weight else None
    if weight is not None:
        weight[::5] = 0.0
    found = []
    for backend in ("triton", "native"):
        values = [torch.randn(50, generator=torch.manual_seed(k)) for k in range(num_terms)]
        values[0][0], values[-1][7] = INF, float("nan")  # where the scale is 0
        leaves = [value.requires_grad_() for value in values]
        total, sums, shares = weighed_sums(leaves, scale, weight, backend=backend)
        loss = 1.7 * total + (sums * torch.arange(1.0, num_terms + 1)).sum()
        found.append((total, sums, shares, *torch.autograd.grad(loss, leaves)))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=3e-7, atol=0.0)


def test_several_statistics_of_many_tokens_are_one_launch(monkeypatch):
    calls = []
    launch = triton_tokens.launch
    monkeypatch.setattr(triton_tokens, "launch", lambda *given: (calls.append(given[0]), launch(*given)))
    monkeypatch.setattr(triton_tokens, "TOKENS", 16)
    torch.manual_seed(0)
    logits, targets = torch.randn(50, 9, requires_grad=True), torch.randint(9, (50,))
    names = ("nll", "entropy", "total_nll", "top_prob")
    found = []
    for backend in ("triton", "native"):
        stats = SweepOptions(backend=backend).stats(Logits(logits), targets, ignore_index=-100)
        stats.compute(*names)
        values = [getattr(stats, name) for name in names]
        found.append([*values, *torch.autograd.grad(sum(value.sum() for value in values), logits)])
    assert len(calls) == 2  # there and back
    for ours, theirs in itertools.zip_longest(*found):
        assert_close(ours, theirs)
