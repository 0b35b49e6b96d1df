"""A fused loss in a graph: scaled, reused, retained, frozen, tied, in micro-batches, under autocast."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import linear_case
import lossmith
from linear_case import IGNORE, STRATEGIES, B, D, Head, T, V
from lossmith.engine.head import upstream

pytestmark = [
    pytest.mark.parametrize("strategy", STRATEGIES),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # forward mode's own imports
]


def loss_of(head: Head, targets: Tensor, strategy: str, rows: int | None = 2, **options) -> Tensor:
    return lossmith.linear_cross_entropy(
        head.hidden,
        head.weight,
        targets,
        bias=head.bias,
        strategy=strategy,
        memory_budget=head.budget(rows),
        **options,
    )


def case(dtype: torch.dtype = torch.float64, **options) -> tuple[Head, Tensor]:
    return linear_case.head(dtype=dtype, **options), linear_case.targets()


# -- the loss in a graph ----------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, -3.0, 0.0, 1e-3, 65536.0])
def test_scaling_the_loss_scales_the_gradient(factor, strategy):
    head, targets = case()
    plain = torch.autograd.grad(loss_of(head, targets, strategy), head.leaves)
    scaled = torch.autograd.grad(loss_of(head, targets, strategy) * factor, head.leaves)
    torch.testing.assert_close(scaled, tuple(g * factor for g in plain))


@pytest.mark.parametrize("factor", [1 / 3, 1 / 7, 65536.0])
def test_a_factor_is_not_rounded_to_half_precision(factor, strategy):
    """1/3 in bf16 is .2% too large, and would make every gradient .2% too large."""
    sizes = {"size": 32, "num_classes": 50}
    head = linear_case.head(16, 8, dtype=torch.bfloat16, **sizes)
    targets = linear_case.targets(16, 8, num_classes=50)
    plain = torch.autograd.grad(loss_of(head, targets, strategy), head.leaves)
    scaled = torch.autograd.grad(loss_of(head, targets, strategy) * factor, head.leaves)
    for one, other in zip(plain, scaled, strict=True):
        one, other = one.double(), other.double()
        # (each gradient is rounded by itself, so that a sum of few of them is off a little)
        assert ((one * other).sum() / (one * one).sum()).item() == pytest.approx(factor, rel=1.5e-3)


def test_a_factor_reaches_every_element_piece_by_piece(strategy, monkeypatch):
    """A narrow gradient is scaled some elements at a time; each is rounded once."""
    monkeypatch.setattr(upstream, "PIECE", 5)
    head, targets = case(torch.bfloat16)
    plain = torch.autograd.grad(loss_of(head, targets, strategy), head.leaves)
    scaled = torch.autograd.grad(loss_of(head, targets, strategy) * 3.0, head.leaves)
    for one, other in zip(plain, scaled, strict=True):
        largest = float(one.abs().max())
        torch.testing.assert_close(other.float(), 3.0 * one.float(), rtol=0.0, atol=largest / 32)
        if strategy == "auto":  # two sweeps have the factor in every gradient from the first
            assert torch.equal(other, (3.0 * one.float()).bfloat16())


def test_one_loss_used_twice(strategy):
    head, targets = case()
    once = torch.autograd.grad(loss_of(head, targets, strategy), head.leaves)
    loss = loss_of(head, targets, strategy)
    used = torch.autograd.grad(loss + 2 * loss.exp(), head.leaves)
    factor = 1 + 2 * loss.detach().exp()
    torch.testing.assert_close(used, tuple(g * factor for g in once))


def test_two_losses_of_one_head(strategy):
    head, targets = case()
    other = linear_case.targets(seed=9)
    loss = loss_of(head, targets, strategy) - 0.5 * loss_of(head, other, strategy, z_loss=0.1)
    expected = lossmith.cross_entropy(head.logits(), targets) - 0.5 * lossmith.cross_entropy(
        head.logits(), other, z_loss=0.1
    )
    torch.testing.assert_close(
        torch.autograd.grad(loss, head.leaves), torch.autograd.grad(expected, head.leaves)
    )


def test_retaining_the_graph_gives_the_same_bits_again(strategy):
    head, targets = case(torch.float32)
    fresh = torch.autograd.grad(loss_of(head, targets, strategy) * 0.3, head.leaves)
    loss = loss_of(head, targets, strategy) * 0.3
    for retain in (True, True, False):
        again = torch.autograd.grad(loss, head.leaves, retain_graph=retain)
        for ours, expected in zip(again, fresh, strict=True):
            assert torch.equal(ours, expected)


def test_backward_twice_without_retaining_raises(strategy):
    head, targets = case()
    loss = loss_of(head, targets, strategy)
    loss.backward()
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()


def test_gradients_belong_to_their_leaves_alone(strategy):
    """Whoever writes over a gradient changes no other, nor what the next backward gives."""
    head, targets = case()
    loss = loss_of(head, targets, strategy)
    expected = torch.autograd.grad(loss_of(head, targets, strategy), head.leaves)
    for _ in range(2):
        loss.backward(retain_graph=True)
        for leaf, gradient in zip(head.leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, gradient)
            leaf.grad.fill_(float("nan"))
        for leaf in head.leaves:
            leaf.grad = None
    storages = {gradient.untyped_storage().data_ptr() for gradient in expected}
    assert len(storages) == len(expected)


def test_a_gradient_that_is_written_over_leaves_the_next_alone(strategy):
    head, targets = case()
    loss = loss_of(head, targets, strategy)
    expected = torch.autograd.grad(loss_of(head, targets, strategy), head.leaves)
    for _ in range(3):
        found = torch.autograd.grad(loss, head.leaves, retain_graph=True)
        torch.testing.assert_close(found, expected)
        for gradient in found:
            gradient.fill_(float("nan"))


def test_gradients_accumulate(strategy):
    head, targets = case()
    expected = torch.autograd.grad(loss_of(head, targets, strategy), head.leaves)
    for _ in range(3):
        loss_of(head, targets, strategy).backward()
    torch.testing.assert_close([x.grad for x in head.leaves], [3 * g for g in expected])


def test_inputs_are_not_modified(strategy):
    head, targets = case(torch.float32)
    before = [x.detach().clone() for x in (*head.leaves, targets)]
    versions = [x._version for x in head.leaves]
    loss_of(head, targets, strategy, z_loss=0.1).backward()
    assert [x._version for x in head.leaves] == versions
    for now, then in zip((*head.leaves, targets), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("which", range(3))
def test_a_gradient_of_some_inputs_alone(which, strategy):
    head, targets = case()
    expected = torch.autograd.grad(lossmith.cross_entropy(head.logits(), targets), head.leaves[which])
    torch.testing.assert_close(
        torch.autograd.grad(loss_of(head, targets, strategy), head.leaves[which]), expected
    )


# -- what cannot be ---------------------------------------------------------------------------


def test_second_derivatives_are_refused_not_wrong(strategy):
    head, targets = case()
    loss = loss_of(head, targets, strategy)
    gradients = torch.autograd.grad(loss, head.leaves, create_graph=True)
    expected = torch.autograd.grad(lossmith.cross_entropy(head.logits(), targets), head.leaves)
    torch.testing.assert_close(gradients, expected)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="once, not twice"):
            gradient.square().sum().backward(retain_graph=True)


def test_second_derivatives_of_a_part_are_refused(strategy):
    head, targets = case()
    output = lossmith.CrossEntropyLoss(z_loss=0.1).evaluate(
        targets=targets, **head.inputs(rows=2, strategy=strategy)
    )
    (gradient,) = torch.autograd.grad(output.parts["z_loss"], head.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("which", range(3))
def test_forward_mode_is_refused(which, strategy):
    head, targets = case()
    with torch.autograd.forward_ad.dual_level():
        leaves = list(head.leaves)
        leaves[which] = torch.autograd.forward_ad.make_dual(leaves[which], torch.ones_like(leaves[which]))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            loss_of(Head(*leaves), targets, strategy)


def test_a_weight_that_changes_before_backward(strategy):
    """One sweep has the gradient of the weight as it was; two sweeps would need it, and say so."""
    head, targets = case()
    weight = head.weight * 1.0
    loss = loss_of(Head(head.hidden, weight), targets, strategy)
    expected = torch.autograd.grad(lossmith.cross_entropy(head.hidden @ weight.T, targets), head.hidden)
    with torch.no_grad():
        weight.zero_()
    if strategy == "two_sweep":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        torch.testing.assert_close(torch.autograd.grad(loss, head.hidden), expected)


# -- what is frozen costs nothing -----------------------------------------------------------------


def num_products(counts) -> int:
    return sum(number for name, number in counts.items() if name.split(".")[0] in ("aten::mm", "aten::addmm"))


@pytest.mark.parametrize("rows", [4, None])
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_a_frozen_input_takes_no_product(frozen, rows, strategy, count_ops):
    head, targets = case(num_classes=V)
    for which in frozen:
        head.leaves[which].requires_grad_(False)
    expected = lossmith.cross_entropy(head.logits(), targets)
    plan = lossmith.linear_cross_entropy.explain(
        head.hidden,
        head.weight,
        targets,
        bias=head.bias,
        strategy=strategy,
        memory_budget=head.budget(rows),
    )
    with count_ops as ops:
        loss = loss_of(head, targets, strategy, rows)
        if len(frozen) < 3:
            loss.backward()
    one_each = 1 + (0 not in frozen) + (1 not in frozen)
    again = plan.num_chunks - 1 if plan.strategy == "two_sweep" and len(frozen) < 3 else 0
    assert plan.num_chunks == (1 if rows is None else 2)
    assert num_products(ops.counts) == one_each * plan.num_chunks + again
    if len(frozen) < 3:
        expected.backward()
    torch.testing.assert_close(loss, expected)
    for which in frozen:
        assert head.leaves[which].grad is None


def test_evaluation_takes_one_product(strategy, count_ops):
    head, targets = case()
    with count_ops as ops, torch.no_grad():
        output = lossmith.CrossEntropyLoss(label_smoothing=0.1, z_loss=0.1).evaluate(
            targets=targets, **head.inputs(strategy=strategy)
        )
        output.metrics.to_dict()
    assert num_products(ops.counts) == 1


def test_training_takes_three_products_metrics_included(strategy, count_ops):
    head, targets = case()
    with count_ops as ops:
        output = lossmith.CrossEntropyLoss(label_smoothing=0.1, temperature=0.7).evaluate(
            targets=targets, **head.inputs(strategy=strategy)
        )
        output.total.backward()
        output.metrics.to_dict()
    assert num_products(ops.counts) == 3


# -- around it --------------------------------------------------------------------------------


def test_a_tied_embedding(strategy):
    ids, targets = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(4)), linear_case.targets()
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        embedding = nn.Embedding(V, D).double()
        hidden = torch.tanh(embedding(ids))
        if fused:
            loss = loss_of(Head(hidden, embedding.weight), targets, strategy)
        else:
            loss = lossmith.cross_entropy(hidden @ embedding.weight.T, targets)
        loss.backward()
        found.append((loss.detach(), embedding.weight.grad))
    torch.testing.assert_close(*found)


def test_micro_batches_add_up(strategy):
    head, targets = linear_case.head(8, 6), linear_case.targets(8, 6)
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    whole = lossmith.cross_entropy(head.logits(), targets, **options)
    expected = torch.autograd.grad(whole, head.leaves)
    count, total = (targets != IGNORE).sum(), 0.0
    for rows in (slice(0, 1), slice(1, 6), slice(6, 7), slice(7, 8)):
        part = Head(head.hidden[rows], head.weight, head.bias)
        loss = loss_of(part, targets[rows], strategy, denominator=count, **options)
        loss.backward()
        total = total + loss.detach()
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close([x.grad for x in head.leaves], list(expected))


def test_autocast(strategy):
    """Gradients come in fp32, and are no worse than those of F.linear under autocast."""
    sizes = {"size": 32, "num_classes": 50}
    head, targets = linear_case.head(64, 8, **sizes), linear_case.targets(64, 8, num_classes=50)
    expected = torch.autograd.grad(lossmith.cross_entropy(head.logits(), targets), head.leaves)
    errors = []
    for fused in (True, False):
        single = head.to(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if fused:
                loss = loss_of(single, targets, strategy, rows=100)
            else:
                loss = functional.cross_entropy(single.logits().float().flatten(0, 1), targets.flatten())
        assert loss.dtype == torch.float32
        found = torch.autograd.grad(loss, single.leaves)
        assert all(g.dtype == torch.float32 for g in found)
        errors.append([(g - e).norm() / e.norm() for g, e in zip(found, expected, strict=True)])
    for ours, naive in zip(*errors, strict=True):
        assert ours <= 1.02 * naive


def test_autocast_takes_a_weight_of_another_dtype(strategy):
    hidden, weight = torch.randn(6, D).bfloat16().requires_grad_(), torch.randn(V, D, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(Head(hidden, weight), linear_case.targets(6), strategy)
    loss.backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


def test_statistics_are_those_of_autocast_also_when_they_are_read_after_it(strategy):
    head, targets = case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, stats = lossmith.linear_cross_entropy(
            head.hidden, head.weight, targets, strategy=strategy, return_stats=True
        )
        _, same = lossmith.linear_cross_entropy(
            head.hidden, head.weight, targets, strategy=strategy, return_stats=True
        )
        inside = same.entropy
    assert torch.equal(stats.entropy, inside)


def test_gradients_through_the_model_below(strategy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, D)).double()
    other = copy.deepcopy(model)
    inputs, targets = torch.randn(B, T, 3, dtype=torch.float64), linear_case.targets()
    weight = linear_case.head().weight
    loss_of(Head(model(inputs), weight), targets, strategy).backward()
    lossmith.cross_entropy(other(inputs) @ weight.T, targets).backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_an_activation_checkpoint(reentrant, strategy):
    head, targets = case()
    loss = torch.utils.checkpoint.checkpoint(
        lambda h, w, b: loss_of(Head(h, w, b), targets, strategy), *head.leaves, use_reentrant=reentrant
    )
    expected = lossmith.cross_entropy(head.logits(), targets)
    torch.testing.assert_close(
        torch.autograd.grad(loss * 2, head.leaves) if not reentrant else backward(loss * 2, head),
        torch.autograd.grad(expected * 2, head.leaves),
    )


def backward(loss: Tensor, head: Head) -> tuple[Tensor, ...]:
    loss.backward()
    return tuple(x.grad for x in head.leaves)


def test_plans_and_objectives_can_be_copied(strategy):
    head, targets = case()
    plan = lossmith.linear_cross_entropy.explain(head.hidden, head.weight, targets, strategy=strategy)
    assert pickle.loads(pickle.dumps(plan)) == copy.deepcopy(plan) == plan
    criterion = lossmith.CrossEntropyLoss(z_loss=0.1)
    inputs = head.inputs(strategy=strategy)
    expected = criterion(targets=targets, **inputs)
    assert torch.equal(copy.deepcopy(criterion)(targets=targets, **inputs), expected)
    assert torch.equal(pickle.loads(pickle.dumps(criterion))(targets=targets, **inputs), expected)
