"""Options of a linear head: which tokens its products have, and the dtype of its logits."""

import pytest
import torch

import linear_case
import lossmith
import meta_case
from linear_case import STRATEGIES, Ledger
from lossmith.engine.head import products
from lossmith.engine.head.linear_head import LinearHead
from lossmith.engine.head.packing import Packing

HALVES = [torch.bfloat16, torch.float16]
N, V, D = 64, 300, 16
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-3}


def case(dtype: torch.dtype) -> tuple[linear_case.Head, torch.Tensor]:
    head = linear_case.head(4, N // 4, dtype=dtype, size=D, num_classes=V)
    return head, linear_case.targets(4, N // 4, num_classes=V)


def found(head: linear_case.Head, targets: torch.Tensor, **options) -> list[torch.Tensor]:
    loss = lossmith.linear_cross_entropy(
        head.hidden, head.weight, targets, bias=head.bias, **OPTIONS, **options
    )
    return [loss.detach(), *torch.autograd.grad(loss, head.leaves)]


# -- which tokens take part ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [5, None])
def test_tokens_without_a_target_change_nothing(rows, strategy, dtype):
    head, targets = case(dtype)
    head.hidden.data[targets == -100] = torch.nan
    ways = [
        found(head, targets, strategy=strategy, memory_budget=head.budget(rows), skip_ignored=skip)
        for skip in (True, False, None)
    ]
    assert all(torch.equal(a, b) for a, b in zip(ways[0], ways[2], strict=True))
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 1e-4}
    torch.testing.assert_close(ways[0], ways[1], **close)


def test_how_many_take_part_is_planned():
    head, targets = case(torch.float32)
    valid = int((targets != -100).sum())
    for skip, expected in ((None, valid), (True, valid), (False, N)):
        plan = lossmith.linear_cross_entropy.explain(head.hidden, head.weight, targets, skip_ignored=skip)
        assert plan.num_tokens == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("skip", "waits"), [(True, 1), (False, 0), (None, 0)])
def test_an_accelerator_is_waited_for_once_and_only_where_it_is_asked_for(skip, waits, strategy):
    head = meta_case.head((256, 512, 64), torch.bfloat16)
    with (
        torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True),
        meta_case.launches().kernels(),
        Ledger(*head) as ledger,
    ):
        lossmith.linear_cross_entropy(*head[:2], head[3], strategy=strategy, skip_ignored=skip).backward()
    assert ledger.counts["nonzero"] == waits
    assert not {"item", "_local_scalar_dense", "is_nonzero"} & ledger.counts.keys()


def test_not_while_a_graph_is_captured(monkeypatch):
    class Targets:
        device = torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not Packing.of(Targets(), -100, None).is_packed
    with pytest.raises(ValueError, match="skip_ignored=True needs to know how many tokens"):
        Packing.of(Targets(), -100, True)


# -- the dtype of the logits --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [5, None])
@pytest.mark.usefixtures("arithmetic")
def test_logits_of_halves_are_rounded_once_and_the_loss_is_not(rows, strategy, dtype):
    head, targets = case(dtype)
    options = {"strategy": strategy, "memory_budget": head.budget(rows), "logits_dtype": "input"}
    loss, *gradients = found(head, targets, **options)
    exact = head.to(torch.float64)
    logits = exact.logits()
    rounded = logits + (logits.to(dtype).double() - logits).detach()
    expected = lossmith.cross_entropy(rounded, targets, **OPTIONS)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    for ours, of in zip(gradients, torch.autograd.grad(expected, exact.leaves), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - of).norm() <= 2 * torch.finfo(dtype).eps * of.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_dtypes_are_wide_anyway(dtype):
    head, targets = case(dtype)
    ways = [found(head, targets, logits_dtype=of) for of in ("input", "wide")]
    assert all(torch.equal(a, b) for a, b in zip(*ways, strict=True))


def test_statistics_stay_fp32():
    head, targets = case(torch.bfloat16)
    stats = lossmith.linear_token_stats(head.hidden, head.weight, targets, logits_dtype="input")
    assert stats.nll.dtype == torch.float32
    wide = lossmith.linear_token_stats(head.hidden, head.weight, targets)
    assert 0 < (stats.nll - wide.nll).abs().max() < 0.1


@pytest.mark.skipif(products.VERSION < products.ON_META, reason="this PyTorch copies some products")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("budget", [40 * 2**20, 2**34])
def test_half_the_memory(budget, strategy, dtype):
    head = meta_case.head((4096, 50257, 1024), dtype)
    wide, _, _ = meta_case.step(*head, strategy=strategy, memory_budget=budget)
    plan, peak, _ = meta_case.step(*head, strategy=strategy, memory_budget=budget // 2, logits_dtype="input")
    assert plan.chunk_rows == wide.chunk_rows
    assert plan.logits_bytes * 2 == wide.logits_bytes
    assert peak == pytest.approx(plan.peak_bytes, rel=0.05)


def test_a_sample_is_of_the_wide_logits():
    head, _ = case(torch.bfloat16)
    drawn = []
    for dtype in ("wide", "input"):
        torch.manual_seed(0)
        drawn.append(LinearHead(head.hidden, head.weight, logits_dtype=dtype, skip_ignored=True).sample(None))
    assert torch.equal(*drawn)


# -- where they are given -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("skip_ignored", "yes"),
        ("skip_ignored", 1),
        ("logits_dtype", "bf16"),
        ("skip_small_gradients", True),
        ("skip_small_gradients", 0.5),
        ("skip_small_gradients", -0.1),
    ],
)
def test_values_that_mean_nothing(name, value):
    head, targets = case(torch.float32)
    for entrance in (
        lossmith.linear_cross_entropy,
        lossmith.linear_cross_entropy.explain,
        lossmith.linear_token_stats,
    ):
        with pytest.raises((TypeError, ValueError), match=rf"\b{name} must be "):
            entrance(head.hidden, head.weight, targets, **{name: value})
    with pytest.raises((TypeError, ValueError), match=rf"\b{name} must be "):
        LinearHead(head.hidden, head.weight, **{name: value})
    with pytest.raises((TypeError, ValueError), match=rf"\b{name} must be "):
        lossmith.CrossEntropyLoss()(targets=targets, **{**head.inputs(), name: value})


def test_a_unified_loss_passes_them_on_to_all_its_heads(monkeypatch):
    head, targets = case(torch.bfloat16)
    criterion = lossmith.UnifiedLoss(V, hidden_size=D, use_mtp=True, shared_projection=True).bfloat16()
    asked = []
    made = LinearHead.__post_init__

    def see(self) -> None:
        made(self)
        asked.append((self.logits_dtype, self.skip_ignored, self.skip_small_gradients))

    monkeypatch.setattr(LinearHead, "__post_init__", see)
    inputs = {**head.inputs(), "logits_dtype": "input", "skip_ignored": False, "skip_small_gradients": 0.1}
    criterion(targets=targets, **inputs)
    assert len(asked) > 1
    assert set(asked) == {("input", False, 0.1)}
