"""The terms of the cross-entropy family in one step, by each arithmetic, are the formulas of the terms in
fp64, on nasty rows too, and so are their gradients."""

import pytest
import torch
from interpreted_case import patched_once, quiet  # noqa: F401
from token_case import nasty_logits
from torch.testing import assert_close

import lossmith
from lossmith.engine.predictions import Logits
from lossmith.engine.sweep_options import SweepOptions
from lossmith.engine.tokens import native_tokens, triton_tokens
from lossmith.engine.tokens.family import CrossEntropyFamily, FamilyTerms
from lossmith.equation.batch import align

pytestmark = [
    *quiet,
    pytest.mark.skipif(not native_tokens.takes(torch.zeros(1)), reason="no C++ compiler"),
]
FAMILIES = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "smoothed, target excluded": {"label_smoothing": 0.3, "smoothing_mode": "exclude_target"},
    "focal": {"focal_gamma": 2.0},
    "focal root, smoothed": {"focal_gamma": 0.5, "label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.03},
    "confidence": {"confidence_penalty": 0.2},
    "everything": {"label_smoothing": 0.1, "focal_gamma": 2.0, "z_loss": 0.03, "confidence_penalty": -0.2},
}


def terms_in_fp64(options, temperature, class_weight):
    """Values [K, N] and gradients of the raw statistics, by the formulas; and what they are made of."""
    logits, targets = nasty_logits()
    targets[13:15] = -100
    criterion = lossmith.CrossEntropyLoss(class_weight=class_weight, backend="torch", **options)
    batch = align(targets, class_weight=class_weight, num_classes=7, dtype=torch.float64)
    reading = SweepOptions(temperature, class_weight=class_weight, backend="torch")
    stats = reading.stats(Logits(logits.float()), targets, ignore_index=-100)
    family = criterion.family
    stats.compute(*family.reads)
    raw = stats._raw
    terms = FamilyTerms(family, targets, batch.target_weight, -100, raw.has_temperature, "native")
    made_of = [(view, name) for view, names in enumerate(terms.made_of) for name in names]
    leaves = [raw.read(view, name).double().requires_grad_() for view, name in made_of]
    for (view, name), leaf in zip(made_of, leaves, strict=True):
        raw._values[view][name] = leaf
    values = torch.stack([term.values(stats, batch) for term in criterion.terms() if not term.is_off])
    return terms, leaves, values


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("weighed", [False, True])
def test_it_is_the_formulas(backend, name, temperature, weighed, monkeypatch):
    monkeypatch.setattr(triton_tokens, "TOKENS", 16)
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 1.0]) if weighed else None
    terms, leaves, expected = terms_in_fp64(FAMILIES[name], temperature, weight)
    upstream = torch.randn(expected.shape, generator=torch.manual_seed(1)).double()
    upstream[:, 3] = 0.0
    grads = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
    kind = torch.float32 if backend == "triton" else torch.float64
    precise = {"rtol": 3e-7, "atol": 1e-12} if backend == "triton" else {"rtol": 1e-10, "atol": 1e-13}
    given = terms.target_weight
    ours = FamilyTerms(
        terms.family,
        terms.targets,
        None if given is None else given.to(kind),
        -100,
        terms.has_temperature,
        backend,
    )
    own = [leaf.detach().to(kind).requires_grad_() for leaf in leaves]
    values = ours.of(own)
    assert_close(values, expected.to(kind), equal_nan=True, **precise)
    found = torch.autograd.grad(values, own, upstream.to(kind), allow_unused=True)
    for has, one, truth in zip(ours.has_gradient, found, grads, strict=True):
        assert has == (one is not None)
        if has and truth is not None:
            finite = truth.isfinite()
            assert_close(one[finite], truth[finite].to(kind), **precise)
        elif has:
            assert not one.any()


def test_the_family_of_a_loss_is_of_its_options():
    criterion = lossmith.CrossEntropyLoss(label_smoothing=0.1, smoothing_mode="exclude_target", z_loss=0.5)
    assert criterion.family == CrossEntropyFamily(0.1, True, 0.0, 0.5, 0.0)
    assert criterion.family.names == ("cross_entropy", "z_loss")


@pytest.mark.parametrize("strategy", ["one_sweep", "two_sweep"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_head_has_it_chunk_by_chunk(strategy, reduction, monkeypatch):
    if strategy == "one_sweep" and reduction == "none":
        pytest.skip("which a gradient for every token forbids")
    calls = []
    family = native_tokens.family
    monkeypatch.setattr(native_tokens, "family", lambda *given: (calls.append(1), family(*given)))
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 6), torch.randn(31, 6)
    targets = torch.randint(31, (20,))
    targets[:3] = -100
    options = {"reduction": reduction, "temperature": 0.9, "class_weight": torch.rand(31)}
    found = []
    for kind in (torch.float32, torch.float64):
        leaves = [one.to(kind).requires_grad_() for one in (hidden, weight)]
        loss = lossmith.linear_cross_entropy(
            *leaves,
            targets,
            strategy=strategy,
            memory_budget=4 * 31 * 5,
            **FAMILIES["everything"],
            **options,
            backend=None if kind == torch.float32 else "torch",
        )
        upstream = torch.randn(loss.shape, generator=torch.manual_seed(1)).to(kind)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves, upstream)])
    assert len(calls) > (strategy == "one_sweep")
    for ours, truth in zip(*found, strict=True):
        assert_close(ours, truth.float(), rtol=1e-4, atol=1e-5)
