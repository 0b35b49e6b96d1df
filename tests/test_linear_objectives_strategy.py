"""Where one sweep would lose a gradient, or a term looks around: two sweeps, or an error that says why."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import linear_case
import lossmith
from linear_case import IGNORE, B, Head, T, V
from lossmith import (
    AdaptiveCrossEntropyLoss,
    ComposedLoss,
    CrossEntropyLoss,
    EntropyModifier,
    LossModifierPipeline,
    NVAMPLoss,
    Objective,
    Term,
    UnifiedLoss,
)
from lossmith.engine.head import chunks
from lossmith.testing import check_term

PLAIN = Term("plain", lambda s, b: s.nll, reads=("nll",), scope="token")


def batch() -> tuple[Head, Tensor]:
    return linear_case.head(), linear_case.targets()


def assert_same_gradients(criterion: nn.Module, also: list[Tensor], rows: int | None = 2, **inputs) -> None:
    head, targets = batch()
    losses = [
        criterion(targets=targets, **given, **inputs)
        for given in (head.inputs(rows), {"logits": head.logits()})
    ]
    torch.testing.assert_close(losses[0], losses[1])
    leaves = (*head.leaves, *also)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses))


def assert_refused(criterion: nn.Module, match: str, **inputs) -> None:
    head, targets = batch()
    with pytest.raises(ValueError, match=f"one_sweep.*{match}"):
        criterion(targets=targets, **head.inputs(2, "one_sweep"), **inputs)
    criterion(targets=targets, **head.inputs(2, "two_sweep"), **inputs)


# -- gradients in something else than the logits --------------------------------------------------


def learned(value: float = 0.3) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


def test_a_learned_coefficient():
    coefficient = learned()
    criterion = Objective([PLAIN, Term("z", lambda s, b: s.logsumexp**2, coefficient, scope="token")])
    assert_same_gradients(criterion, [coefficient])
    assert_refused(criterion, "coefficient of the term 'z' has a gradient")


def test_a_parameter_inside_a_term():
    slope = learned()
    criterion = Objective([Term("bent", lambda s, b: (slope * s.nll).sinh())])
    assert_same_gradients(criterion, [slope])
    assert_refused(criterion, "'bent' may depend on the whole batch")


@pytest.mark.parametrize("strategy", ["auto", "one_sweep"])
def test_a_parameter_inside_a_term_that_promises_to_have_none(strategy):
    slope = learned()
    criterion = Objective([PLAIN, Term("bent", lambda s, b: (slope * s.nll).sinh(), scope="token")])
    head, targets = batch()
    with pytest.raises(ValueError, match=r"'plain', 'bent' has a gradient in something else.*scope='batch'"):
        criterion(targets=targets, **head.inputs(2, strategy))


def test_a_parameter_that_only_some_tokens_meet():
    """Not those of the first chunk."""
    slope = learned()

    def loss(stats, batch):
        return stats.nll * slope if (batch.targets == 6).any() else stats.nll

    targets = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])
    head = linear_case.head(8)
    fused = Objective([Term("some", loss, scope="token")])
    with pytest.raises(ValueError, match="gradient in something else"):
        fused(targets=targets, **head.inputs(2, "one_sweep"))


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("learned_from", [{0, 1}, {2, 3}, {5, 6}, set()], ids=str)
def test_tokens_whose_terms_have_no_gradient_add_nothing_to_any(learned_from, ignored, monkeypatch):
    """In chunks of their own, whatever stands in the memory of the gradients before."""

    def filled(shape, *, dtype, device, zero):
        return torch.full(shape, 0.0 if zero else torch.nan, dtype=dtype, device=device)

    monkeypatch.setattr(chunks, "fresh", filled)

    def loss(stats, batch):
        learns = torch.isin(batch.targets, torch.tensor(sorted(learned_from), dtype=torch.long))
        return stats.nll * learns if learns.any() else stats.nll.detach() * learns

    head, targets = linear_case.head(8), torch.arange(8) % V
    if ignored:  # in between, which are packed away
        head, targets = linear_case.head(16), targets.repeat_interleave(2)
        targets[::2] = IGNORE
    criterion = Objective([Term("some", loss, scope="token")])
    found = criterion(targets=targets, **head.inputs(2, "one_sweep"))
    expected = criterion(head.logits(), targets) + 0 * head.logits().sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, head.leaves), torch.autograd.grad(expected, head.leaves)
    )


def test_a_coefficient_without_a_gradient_does_not_matter():
    frozen = learned().requires_grad_(False)
    criterion = Objective([PLAIN, Term("z", lambda s, b: s.logsumexp**2, frozen, scope="token")])
    head, targets = batch()
    loss = criterion(targets=targets, **head.inputs(2, "one_sweep"))
    torch.testing.assert_close(loss, criterion(head.logits(), targets))


@pytest.mark.parametrize("is_leaf", [True, False])
def test_confidence_scores_of_a_head_that_learns(is_leaf):
    raw = torch.randn(B, T, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(B, T, dtype=torch.float64, requires_grad=True) if is_leaf else raw.sigmoid()
    leaf = scores if is_leaf else raw
    criterion = UnifiedLoss(V, primary_loss_type="adaptive_mtp").double()
    head, targets = batch()
    found = []
    for given in (head.inputs(2), {"logits": head.logits()}):
        loss = criterion(targets=targets, confidence_scores=scores, **given)
        found.append((loss.detach(), *torch.autograd.grad(loss, (*head.leaves, leaf), retain_graph=True)))
    torch.testing.assert_close(*found)
    assert_refused(criterion, "gradient in something else", confidence_scores=scores)


def test_detached_confidence_scores_take_one_sweep():
    head, targets = batch()
    scores = torch.rand(B, T, dtype=torch.float64)
    criterion = AdaptiveCrossEntropyLoss()
    loss = criterion(targets=targets, confidence_scores=scores, **head.inputs(2, "one_sweep"))
    torch.testing.assert_close(loss, criterion(head.logits(), targets, confidence_scores=scores))


def test_nothing_to_learn_leaves_a_zero_in_other_gradients():
    """Data-parallel training waits for every parameter's gradient."""
    coefficient = learned()
    criterion = Objective([PLAIN, Term("z", lambda s, b: s.logsumexp**2, coefficient)])
    head = linear_case.head()
    loss = criterion(targets=torch.full((B, T), IGNORE), **head.inputs())
    for gradient in torch.autograd.grad(loss, (coefficient, *head.leaves)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


# -- terms that look at other tokens -----------------------------------------------------------------

WEIGHTS = torch.rand(B * T, dtype=torch.float64)
LOOKING_AROUND = {
    "in the loss": Term("x", lambda s, b: (s.nll - s.nll.mean()) ** 2),
    "in the weight": Term("x", lambda s, b: s.nll, token_weight=lambda s, b: s.nll / s.nll.max()),
    "at the rows": Term("x", lambda s, b: s.nll * b.rows(s.nll.detach()).cumsum(-1).reshape(-1)),
    "at the count": Term("x", lambda s, b: s.nll * b.num_tokens),
    "at its own numbers": Term("x", lambda s, b: s.nll * WEIGHTS),
    "at the others alone": Term("x", lambda s, b: s.nll.roll(1)),
}


@pytest.mark.parametrize("rows", [2, None])  # None: all of them at once, without those that are ignored
@pytest.mark.parametrize("name", LOOKING_AROUND)
def test_a_term_may_look_around_unless_it_promises_not_to(name, rows):
    term = LOOKING_AROUND[name]
    head, targets = batch()
    expected = Objective([PLAIN, term])(head.logits(), targets)
    loss = Objective([PLAIN, term])(targets=targets, **head.inputs(rows))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, head.leaves),
        torch.autograd.grad(expected, head.leaves, retain_graph=True),
    )
    assert_refused(Objective([PLAIN, term]), "'x' may depend on the whole batch")
    with pytest.raises(AssertionError, match="'x' has scope='token' and looks at other tokens"):
        check_term(replace(term, scope="token"), shape=(B, T))


def test_a_mistake_in_a_term_is_still_an_error():
    def mistaken(stats, batch):
        return stats.nll.sum()

    def broken(stats, batch):
        raise KeyError("no such thing")

    head, targets = batch()
    with pytest.raises(ValueError, match="'x' must return a value per token"):
        Objective([Term("x", mistaken)])(targets=targets, **head.inputs(2))
    with pytest.raises(KeyError, match="no such thing"):
        Objective([Term("x", broken)])(targets=targets, **head.inputs(2))


# -- what is said beforehand -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "reason"),
    [
        (NVAMPLoss(), "the term 'variance' may depend on the whole batch"),
        (NVAMPLoss(alpha=0.0), "the term 'max' may depend on the whole batch"),
        (CrossEntropyLoss(reduction="none"), "reduction='none'"),
        (LossModifierPipeline([EntropyModifier({})]), "weigh"),
        (ComposedLoss(NVAMPLoss()), "the term 'variance'"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_what_forbids_one_sweep_is_named(criterion, reason):
    assert_refused(criterion, reason)
    head, targets = batch()
    given = {**head.inputs(), "targets": targets}
    plan = criterion.plan(**given)
    assert plan.strategy == "two_sweep"
    assert reason in str(plan)
    with pytest.raises(ValueError, match=reason):
        criterion.plan(**given | {"strategy": "one_sweep"})


class Custom(lossmith.BaseLossModifier):
    def modify_loss(self, logits, targets, loss, **kwargs):
        return 2 * loss


def test_custom_modifiers_take_logits_and_no_sweep_of_the_head():
    pipeline = LossModifierPipeline([Custom({})])
    head, targets = batch()
    with pytest.raises(ValueError, match=r"one_sweep.*the logits are asked for as a whole"):
        pipeline(targets=targets, **head.inputs(2, "one_sweep"))
    assert pipeline.plan(targets=targets, **head.inputs()).strategy == "two_sweep"
    torch.testing.assert_close(pipeline(targets=targets, **head.inputs()), pipeline(head.logits(), targets))


@pytest.mark.parametrize("strategy", ["one_sweep", "two_sweep"])
@pytest.mark.parametrize("share", [2.0**-24, 1.0])
def test_half_precision_neither_underflows_nor_overflows(strategy, share):
    """A gradient of 1e-9, scaled by 2^20 by whoever scales losses, must not be 0; nor one of a sum inf."""
    head, targets = linear_case.head(dtype=torch.float16), linear_case.targets()
    scale = 2.0**20 if share < 1 else 2.0**-12
    loss = CrossEntropyLoss()(targets=targets, **head.inputs(2, strategy), denominator=1 / share) * scale
    found = torch.autograd.grad(loss, [head.hidden, head.weight, head.bias], retain_graph=True)
    again = torch.autograd.grad(loss, [head.hidden, head.weight, head.bias])
    exact = head.to(torch.float64)
    expected = CrossEntropyLoss()(exact.logits(), targets, denominator=1 / share) * scale
    truth = torch.autograd.grad(expected, [exact.hidden, exact.weight, exact.bias])
    for gradient, same, true in zip(found, again, truth, strict=True):
        assert gradient.dtype == torch.float16
        assert torch.equal(gradient, same)
        torch.testing.assert_close(gradient.double(), true, rtol=2e-2, atol=1e-2 * float(true.abs().max()))


def test_a_sum_that_half_precision_does_not_hold_is_kept_wide_until_it_is_scaled():
    hidden = torch.full((64, 2), 60.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(3, 2, dtype=torch.float16, requires_grad=True)
    inputs = {"hidden_states": hidden, "lm_head_weight": weight, "strategy": "one_sweep"}
    CrossEntropyLoss()(targets=torch.zeros(64, dtype=torch.long), **inputs).backward()
    torch.testing.assert_close(
        weight.grad[0], torch.full((2,), -40.0, dtype=torch.float16), rtol=1e-2, atol=0
    )


def test_without_gradients_there_is_nothing_to_refuse():
    head, targets = batch()
    for criterion in (NVAMPLoss(), CrossEntropyLoss(reduction="none")):
        with torch.no_grad():
            criterion(targets=targets, **head.inputs(2, "one_sweep"))


@pytest.mark.parametrize(
    "criterion",
    [CrossEntropyLoss(z_loss=0.1), Objective([PLAIN]), UnifiedLoss(V), AdaptiveCrossEntropyLoss()],
)
def test_one_sweep_where_it_can_be(criterion):
    head, targets = batch()
    criterion(targets=targets, **head.inputs(2, "one_sweep")).backward()
    assert criterion.plan(targets=targets, **head.inputs(2)).strategy == "one_sweep"


def test_a_plan_takes_what_evaluate_takes_and_nothing_else():
    head, targets = batch()
    inputs = {"token_weight": torch.ones(B, T), "denominator": 3, "mask": torch.ones(B, T, dtype=torch.bool)}
    CrossEntropyLoss().plan(targets=targets, **head.inputs(), **inputs)
    with pytest.raises(TypeError, match="Did you mean 'mask'"):
        CrossEntropyLoss().plan(targets=targets, **head.inputs(), maks=inputs["mask"])
    with pytest.raises(TypeError, match="Did you mean 'mask'"):
        lossmith.linear_cross_entropy.explain(head.hidden, head.weight, targets, maks=inputs["mask"])
    assert lossmith.linear_cross_entropy.explain(head.hidden, head.weight, targets, **inputs).num_tokens == 7
