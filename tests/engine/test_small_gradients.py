"""Small gradients that a head leaves out of its products: how large the error may be, and where it is 0."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import linear_case
import lossmith
import meta_case
from linear_case import STRATEGIES, Ledger
from lossmith.engine.head import products, small_gradients
from lossmith.engine.head.linear_head import LinearHead
from lossmith.engine.head.small_gradients import SmallGradients, permute_rows, threshold

N, V = 60, 40
SHARE = 2**-5
CRITERIA = {
    "cross_entropy": lambda: lossmith.CrossEntropyLoss(),
    "smoothing": lambda: lossmith.CrossEntropyLoss(label_smoothing=0.2),
    "z_loss": lambda: lossmith.CrossEntropyLoss(z_loss=0.1, temperature=0.7),
    "focal": lambda: lossmith.CrossEntropyLoss(focal_gamma=2.0, confidence_penalty=0.1),
    "class_weight": lambda: lossmith.CrossEntropyLoss(class_weight=torch.linspace(0.5, 2.0, V).double()),
    "softcap": lambda: lossmith.CrossEntropyLoss(softcap=30.0),
    "none": lambda: lossmith.CrossEntropyLoss(reduction="none"),
    "nvamp": lambda: lossmith.NVAMPLoss(),
    "unified": lambda: lossmith.UnifiedLoss(V, use_focal_loss=True, use_auxiliary_loss=True),
    "pipeline": lambda: lossmith.LossModifierPipeline([lossmith.EntropyModifier({})]),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """As much is left out as may be, of small chunks too."""
    monkeypatch.setattr(small_gradients, "WORTH_IT", 0.0)
    monkeypatch.setattr(small_gradients, "BLOCK_ROWS", 8)
    monkeypatch.setattr(small_gradients, "PIECE_ELEMENTS", 5 * V)


@pytest.fixture
def shares(monkeypatch):
    """What has been left out, chunk by chunk, of all until then."""
    found: list[float] = []
    add = SmallGradients.add

    def seen(self, *given):
        is_done = add(self, *given)
        found.append(self.num_left_out / self.num_parts)
        return is_done

    monkeypatch.setattr(SmallGradients, "add", seen)
    return found


def peaked(peak: float = 3.0, seed: int = 0, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Logits [4, N / 4, V] of any peakedness, and targets of which some are ignored."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, N // 4, V, generator=rng, dtype=torch.float64) * peak
    logits *= torch.rand(4, N // 4, 1, generator=rng, dtype=torch.float64) * 2
    return logits.to(dtype), linear_case.targets(4, N // 4, num_classes=V)


def gradients(logits: Tensor, targets: Tensor, criterion, **options) -> tuple[Tensor, Tensor]:
    """Those of hidden states and weight where the logits are the hidden states: the first is that of the
    logits [N, V], the second the same, transposed, times the logits."""
    hidden = logits.clone().requires_grad_()
    weight = torch.eye(logits.shape[-1], dtype=logits.dtype, requires_grad=True)
    loss = criterion(targets=targets, hidden_states=hidden, lm_head_weight=weight, **options)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.autograd.grad(loss, (hidden, weight), upstream.to(loss.dtype))
    return found[0].flatten(0, -2), found[1]


def budget(rows: int | None) -> int | None:
    return None if rows is None else rows * V * 8


# -- the bound ----------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    share=st.floats(1e-4, 0.49),
    peak=st.floats(0.0, 12.0),
    rows=st.sampled_from([3, 20, None]),
    strategy=st.sampled_from(STRATEGIES),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", CRITERIA)
def test_the_error_is_at_most_twice_the_share(name, share, peak, rows, strategy, seed):
    logits, targets = peaked(peak, seed)
    criterion, how = CRITERIA[name]().double(), {"strategy": strategy, "memory_budget": budget(rows)}
    exact, exact_weight = gradients(logits, targets, criterion, **how)
    ours, ours_weight = gradients(logits, targets, criterion, skip_small_gradients=share, **how)
    error = (ours - exact).abs().sum()
    assert error <= 2 * share * exact.abs().sum() * (1 + 1e-9)
    # what is left out of a token stays in it, and both products are of the same gradient
    torch.testing.assert_close(ours.sum(1), exact.sum(1), rtol=0, atol=1e-10 * float(exact.abs().max() + 1))
    torch.testing.assert_close(ours_weight, ours.t() @ logits.flatten(0, 1), rtol=1e-9, atol=1e-10)
    moved = (ours_weight - exact_weight).norm(dim=1).sum()
    assert moved <= 2 * share * exact.abs().sum() * logits.norm(dim=-1).max() * (1 + 1e-9)
    assert not ours[targets.flatten() == -100].any()


def test_it_leaves_out_what_it_may(shares):
    """Not much less than the share, which is most of the classes."""
    logits, targets = peaked(6.0)
    exact, _ = gradients(logits, targets, lossmith.CrossEntropyLoss())
    ours, _ = gradients(logits, targets, lossmith.CrossEntropyLoss(), skip_small_gradients=SHARE)
    assert shares[-1] > 0.5
    assert 0.5 * SHARE * exact.abs().sum() < (ours - exact).abs().sum()


def test_a_rank_one_gradient_has_no_error(shares):
    """What all tokens give alike to the classes that are left out is there, as of smoothing."""
    logits, targets = torch.zeros(N, V, dtype=torch.float64), torch.zeros(N, dtype=torch.long)
    for criterion in (lossmith.CrossEntropyLoss(), lossmith.CrossEntropyLoss(label_smoothing=0.5)):
        exact = gradients(logits, targets, criterion)
        ours = gradients(logits, targets, criterion, skip_small_gradients=0.49)
        assert shares[-1] > 0
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("peak", [0.0, 1.0, 8.0])
def test_a_threshold(peak):
    masses = (torch.randn(3, 500, generator=torch.Generator().manual_seed(0)) * peak).exp()
    for share in (0.001, 0.1, 0.4):
        most = share * float(masses.sum(dtype=torch.float64))
        least = threshold(masses, most)
        assert masses[masses < least].sum(dtype=torch.float64) <= most
        if least < most / 1.1 and peak:  # no mass above all that may be left out can be
            assert masses[masses < 1.1 * least].sum(dtype=torch.float64) > most
    assert threshold(masses, math.nan) == threshold(masses, math.inf) == threshold(masses, 0.0) == 0.0


def test_rows_in_another_order():
    rng = torch.Generator().manual_seed(0)
    for num_rows in (0, 1, 2, 7, 40):
        values, order = torch.randn(num_rows, 3, generator=rng), torch.randperm(num_rows, generator=rng)
        expected = values[order]
        permute_rows(values, order)
        assert torch.equal(values, expected)


# -- where nothing is left out ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("peak", "smoothing", "share"), [(0.1, 0.0, 2**-6), (8.0, 0.3, 2**-6), (2.0, 0.0, 1e-9)]
)
def test_where_it_does_not_pay_nothing_changes(peak, smoothing, share, strategy, dtype, shares, monkeypatch):
    monkeypatch.setattr(small_gradients, "WORTH_IT", 1 / 4)
    logits, targets = peaked(peak, dtype=dtype)
    how = {"strategy": strategy, "memory_budget": budget(5)}
    criterion = lossmith.CrossEntropyLoss(label_smoothing=smoothing)
    exact = gradients(logits, targets, criterion, **how)
    ours = gradients(logits, targets, criterion, skip_small_gradients=share, **how)
    assert shares
    assert not any(shares)
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


def test_who_finds_little_does_not_look_at_every_chunk(monkeypatch):
    monkeypatch.setattr(small_gradients, "WORTH_IT", 1.0)
    looks, found = [], small_gradients.threshold
    monkeypatch.setattr(small_gradients, "threshold", lambda *of: looks.append(of) or found(*of))
    logits, _ = peaked()
    gradients(
        logits,
        torch.zeros(4, N // 4, dtype=torch.long),
        lossmith.CrossEntropyLoss(),
        memory_budget=budget(5),
        skip_small_gradients=SHARE,
    )
    assert len(looks) == N // 5 // (1 + small_gradients.UNSEEN_CHUNKS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stays(value):
    logits, targets = peaked(6.0)
    for share in (0.0, SHARE):
        hidden = logits.clone().requires_grad_()
        weight = torch.eye(V, dtype=torch.float64, requires_grad=True)
        loss = lossmith.linear_cross_entropy(
            hidden, weight, targets, skip_small_gradients=share, reduction="none"
        )
        upstream = torch.ones_like(loss)
        upstream[1, 3] = value
        loss.backward(upstream)
        assert not hidden.grad[1, 3].isfinite().all()
        assert hidden.grad[2].isfinite().all()
        assert not weight.grad.isfinite().all()


# -- what it meets ------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [7, None])
def test_frozen(rows, strategy):
    logits, targets = peaked(6.0)
    how = {"strategy": strategy, "memory_budget": budget(rows), "skip_small_gradients": SHARE}
    both = gradients(logits, targets, lossmith.CrossEntropyLoss(), **how)
    for frozen in (0, 1):
        leaves = [logits.clone(), torch.eye(V, dtype=torch.float64)]
        leaves[1 - frozen].requires_grad_()
        lossmith.linear_cross_entropy(*leaves, targets, **how).backward()
        assert leaves[frozen].grad is None
        found = leaves[1 - frozen].grad
        upstream = torch.randn((), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        torch.testing.assert_close(found.view_as(both[1 - frozen]) * upstream, both[1 - frozen])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_add_up(strategy):
    logits, targets = peaked(6.0)
    hidden, weight = logits.clone().requires_grad_(), torch.eye(V, dtype=torch.float64, requires_grad=True)
    how = {"strategy": strategy, "memory_budget": budget(20), "skip_small_gradients": SHARE}
    lossmith.linear_cross_entropy(hidden, weight, targets, **how).backward()
    once = [hidden.grad.clone(), weight.grad.clone()]
    loss = lossmith.linear_cross_entropy(hidden, weight, targets, **how)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close([hidden.grad, weight.grad], [3 * g for g in once])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("skip", [True, False])
def test_tokens_without_a_target_change_nothing(skip, strategy):
    logits, targets = peaked(6.0)
    logits[targets == -100] = torch.nan
    how = {"strategy": strategy, "memory_budget": budget(9), "skip_small_gradients": SHARE}
    ours = gradients(logits, targets, lossmith.CrossEntropyLoss(), skip_ignored=skip, **how)
    assert ours[1].isfinite().all()
    assert not ours[0][targets.flatten() == -100].any()


def test_the_bias_has_its_whole_gradient():
    head = linear_case.head(4, 8, size=5, num_classes=V)
    targets = linear_case.targets(4, 8, num_classes=V)
    found = []
    for share in (0.0, SHARE):
        lossmith.linear_cross_entropy(
            head.hidden, head.weight, targets, bias=head.bias, skip_small_gradients=share
        ).backward()
        found.append(head.bias.grad)
        head.bias.grad = None
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("logits_dtype", ["wide", "input"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_dtypes(strategy, logits_dtype, dtype, shares):
    logits, targets = peaked(4.0, dtype=dtype)
    how = {"strategy": strategy, "memory_budget": budget(20), "skip_small_gradients": SHARE}
    exact = gradients(logits.double(), targets, lossmith.CrossEntropyLoss())
    ours = gradients(logits, targets, lossmith.CrossEntropyLoss(), logits_dtype=logits_dtype, **how)
    assert min(shares) > 0.2
    assert [g.dtype for g in ours] == [dtype, dtype]
    error = (ours[0].double() - exact[0]).abs().sum() / exact[0].abs().sum()
    rounded = logits.abs().max().item() * torch.finfo(dtype).eps if logits_dtype == "input" else 0
    assert error <= 2 * SHARE + torch.finfo(dtype).eps + rounded
    torch.testing.assert_close(
        ours[1].double(), ours[0].double().t() @ logits.flatten(0, 1).double(), rtol=2e-2, atol=2e-3
    )


def test_autocast():
    logits, targets = peaked(4.0, dtype=torch.float32)
    exact = gradients(logits, targets, lossmith.CrossEntropyLoss())
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(logits, targets, lossmith.CrossEntropyLoss(), skip_small_gradients=SHARE)
    assert (ours[0] - exact[0]).abs().sum() <= (2 * SHARE + 0.05) * exact[0].abs().sum()


@pytest.mark.slow
def test_compiled():
    logits, targets = peaked(4.0)
    hidden, weight = logits.clone().requires_grad_(), torch.eye(V, dtype=torch.float64, requires_grad=True)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return lossmith.linear_cross_entropy(
            hidden, weight, targets, skip_small_gradients=SHARE, strategy="two_sweep"
        )

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(hidden, weight), (hidden, weight))
    torch.testing.assert_close(found, expected)


# -- what is said of it -------------------------------------------------------------------------


def test_a_plan_says_at_most():
    hidden, weight = torch.zeros(100, 8, requires_grad=True), torch.zeros(600, 8, requires_grad=True)
    targets = torch.zeros(100, dtype=torch.long)
    explain = lossmith.linear_cross_entropy.explain
    plan = explain(hidden, weight, targets, skip_small_gradients=SHARE)
    assert (plan.num_products, plan.skip_small_gradients) == (3, SHARE)
    assert "at most 3 products" in str(plan)
    assert plan.peak_bytes > explain(hidden, weight, targets).peak_bytes
    assert "at most" not in str(explain(hidden, weight, targets))
    with torch.no_grad():
        assert "at most" not in str(explain(hidden, weight, targets, skip_small_gradients=SHARE))


@pytest.mark.parametrize("strategy", ["one_sweep", "two_sweep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_memory_is_that_of_the_plan(dtype, strategy, shares, monkeypatch):
    monkeypatch.setattr(small_gradients, "BLOCK_ROWS", 64)
    monkeypatch.setattr(small_gradients, "PIECE_ELEMENTS", 2**15)
    monkeypatch.setattr(products, "PIECE_ELEMENTS", 2**14)
    monkeypatch.setattr(products, "SHORTEST_PIECE", 16)
    num_classes, size = 4000, 64
    head = linear_case.head(256, dtype=dtype, size=size, num_classes=num_classes, bias=False)
    targets = linear_case.targets(256, num_classes=num_classes)
    how = {"strategy": strategy, "memory_budget": 128 * num_classes * 4, "skip_small_gradients": SHARE}
    plan = lossmith.linear_cross_entropy.explain(head.hidden, head.weight, targets, **how)
    with Ledger(*head.leaves, targets) as ledger:
        lossmith.linear_cross_entropy(head.hidden, head.weight, targets, **how).backward()
        grads = head.hidden.grad.nbytes + head.weight.grad.nbytes
    assert min(shares) > 0.2
    assert 0.8 * plan.peak_bytes <= ledger.peak - grads <= 1.05 * plan.peak_bytes


def test_elsewhere_it_is_refused():
    hidden, weight, *_ = meta_case.head((16, 32, 8), torch.bfloat16)
    for share in (0.0, SHARE):
        if share:
            with pytest.raises(ValueError, match=r"skip_small_gradients works on a CPU alone.*on meta"):
                LinearHead(hidden, weight, skip_small_gradients=share)
        else:
            LinearHead(hidden, weight, skip_small_gradients=share)
