"""The compiled row kernels: equal to rows_torch, whatever the rows are."""

import itertools

import pytest
import torch

import lossmith
from lossmith.engine.native import build
from lossmith.engine.rows import native_rows
from lossmith.engine.statistics.stats import STATISTIC_NAMES

NAMES = sorted(STATISTIC_NAMES)


def everything(monkeypatch, native, num_classes, dtype, temperature):
    """All statistics of a batch with nasty rows, and the gradient of a random mix of them."""
    generator = torch.Generator().manual_seed(num_classes)
    logits = (torch.randn(5, 7, num_classes, generator=generator) * 3).to(dtype)
    targets = torch.randint(num_classes, (5, 7), generator=generator)
    candidates = torch.randint(-1, num_classes, (5, 7, 4), generator=generator)
    candidates[..., 0] = logits.argmax(-1)
    if num_classes > 5:
        logits[0, 0, 3] = float("-inf")
        logits[1, 1, :2] = float("-inf")
        logits[3, :, 4] += 60
    logits[2, 2], targets[2, 2] = float("nan"), -100
    targets[0, :3] = -100
    logits.requires_grad_()
    with monkeypatch.context() as patch:
        if not native:
            patch.setattr(native_rows, "takes", lambda *_: False)
        assert native_rows.takes(logits.flatten(0, 1), None) is native
        stats = lossmith.token_stats(logits, targets, candidates=candidates, temperature=temperature)
        values = {name: getattr(stats.compute(*NAMES), name) for name in NAMES}
        values |= {
            f"unscaled {name}": getattr(stats.unscaled, name) for name in ("nll", "logsumexp", "entropy")
        }
        mixed = torch.zeros(())
        for value in values.values():
            if value.requires_grad:
                weight = torch.rand(value.shape, generator=generator)
                mixed = mixed + torch.where(value.isfinite(), value * weight, 0.0).sum()
        mixed.backward()
    return values, logits.grad


@pytest.mark.skipif(build.library() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_classes", [1, 2, 3, 15, 16, 17, 33, 1000, 5003])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_native_rows_equal_torch_rows(monkeypatch, num_classes, dtype, temperature):
    ours, our_grad = everything(monkeypatch, True, num_classes, dtype, temperature)
    theirs, their_grad = everything(monkeypatch, False, num_classes, dtype, temperature)
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=2e-5, atol=2e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    exact = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 1e-5}
    torch.testing.assert_close(our_grad, their_grad, **exact)
    assert not our_grad[2, 2].any()


@pytest.mark.skipif(build.library() is None, reason="no C++ compiler here")
def test_threads_change_nothing():
    logits = torch.randn(300, 1001, requires_grad=True)
    targets = torch.randint(1001, (300,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            loss = lossmith.cross_entropy(logits, targets, label_smoothing=0.1, z_loss=1e-3)
            results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    finally:
        torch.set_num_threads(before)
    for one, other in itertools.pairwise(results):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.skipif(build.library() is None, reason="no C++ compiler here")
def test_row_strides_are_read_where_they_are():
    wide = torch.randn(6, 40)
    part = wide[:, 3:36].detach().requires_grad_()
    targets = torch.randint(33, (6,))
    assert native_rows.takes(part, None)
    loss = lossmith.cross_entropy(part, targets)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(part, targets))


@pytest.mark.parametrize("native", [True, False], ids=["compiled", "pytorch"])
@pytest.mark.parametrize("num_classes", [1, 7, 16, 17, 50257])
@pytest.mark.parametrize("temperature", [0.3, 1.5, 3.0, 10.0])
def test_padding_and_masked_classes_stay_so_at_any_temperature(monkeypatch, native, num_classes, temperature):
    """-1e30 over a temperature of 3 would count as a finite logit."""
    if not native:
        monkeypatch.setattr(native_rows, "takes", lambda *_: False)
    logits = torch.randn(4, num_classes)
    if num_classes > 1:
        logits[0, 1:] = float("-inf")
        logits[1, 1] = float("-inf")
    targets = torch.zeros(4, dtype=torch.long)
    scaled = (logits.double() / temperature).requires_grad_()
    logits.requires_grad_()
    stats = lossmith.token_stats(logits, targets, temperature=temperature)
    finite = logits.isfinite()
    assert torch.equal(stats.num_finite, finite.sum(-1))
    torch.testing.assert_close(stats.logsumexp, scaled.logsumexp(-1).float())
    log_p = scaled.log_softmax(-1)
    expected = torch.where(finite, -log_p, 0.0).sum(-1)
    torch.testing.assert_close(stats.total_nll, expected.float(), rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(stats.total_nll.sum(), logits)[0]
    theirs = torch.autograd.grad(expected.sum(), scaled)[0] / temperature
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4 * num_classes**0.5)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
def test_a_temperature_rounds_alike_both_ways(offset):
    """The rows of the gradient of a cross-entropy sum to 0, whatever the offset."""
    logits = (torch.randn(32, 37) + offset).requires_grad_()
    targets = torch.randint(37, (32,))
    loss = lossmith.cross_entropy(logits, targets, temperature=0.3, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.sum(-1).abs().max() < 1e-5


@pytest.mark.skipif(build.library() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_whose_rows_are_contiguous_need_no_copy(dtype):
    whole = torch.randn(3, 6, 2, 40).to(dtype)
    views = [
        whole[:, :-1],
        whole.transpose(0, 2),
        whole[0:1].expand(4, 6, 2, 40),
        whole[..., 3:37],
        whole[1, 2, 1],
    ]
    for view in views:
        logits = view.detach().requires_grad_()
        assert native_rows.takes(logits, None)
        targets = torch.randint(34, logits.shape[:-1])
        loss = lossmith.cross_entropy(logits, targets)
        copy = view.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        again = lossmith.cross_entropy(copy, targets)
        assert torch.equal(loss, again)
        assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(again, copy)[0])
