"""What the equation has to carry: objectives and weights of other shapes than a plain mean."""

import pytest
import torch

import lossmith
from lossmith import Objective, Term
from lossmith.engine.predictions import Logits
from lossmith.engine.sweep_options import SweepOptions
from lossmith.equation.batch import align
from lossmith.equation.evaluation import evaluate
from lossmith.equation.output import with_parts

NLL = Term("nll", lambda s, b: s.nll)


def test_a_maximum_is_a_term_whose_weight_is_its_subgradient():
    """gamma * max over the valid tokens, undivided, next to a mean: value and gradient."""

    def at_the_maximum(stats, batch):
        hardest = torch.where(batch.valid, stats.nll, -torch.inf).argmax()
        return torch.arange(len(batch.targets)).eq(hardest) / batch.scale.clamp(min=1e-30)

    terms = [
        Term("mean", lambda s, b: s.nll),
        Term("max", lambda s, b: s.nll, 0.3, token_weight=at_the_maximum, scope="batch"),
    ]
    logits = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, (3, 4))
    targets[0] = -100
    output = Objective(terms).evaluate(logits, targets)
    naive = torch.nn.functional.cross_entropy(
        logits[1:].flatten(0, 1), targets[1:].flatten(), reduction="none"
    )
    expected = naive.mean() + 0.3 * naive.max()
    torch.testing.assert_close(output.total, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output.total, logits), torch.autograd.grad(expected, logits)
    )


def test_weights_of_samples_are_weights_of_their_tokens():
    """Each sample weighed by the inverse of its mean entropy, under the mean of samples' means."""

    def by_entropy(stats, batch):
        per_row = batch.rows(stats.wrong_entropy).sum(1) / batch.rows(batch.valid).sum(1)
        return (1 / per_row).repeat_interleave(batch.shape[-1])

    term = Term("weighed", lambda s, b: s.nll, token_weight=by_entropy, scope="batch")
    logits = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, (3, 4))
    targets[1, 2:] = -100
    total = Objective([term], reduction="sequence_mean")(logits, targets)
    valid = targets != -100
    stats = lossmith.token_stats(logits, targets)
    entropy = (stats.wrong_entropy.detach() * valid).sum(1) / valid.sum(1)
    expected = ((stats.nll * valid).sum(1) / valid.sum(1) / entropy).mean()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, logits), torch.autograd.grad(expected, logits))


def test_a_term_may_index_with_the_prediction():
    table = torch.rand(7, dtype=torch.float64)
    term = Term("by_prediction", lambda s, b: s.nll * table[s.predicted.clamp(min=0)])
    logits = torch.randn(3, 4, 7, dtype=torch.float64)
    targets = torch.randint(7, (3, 4))
    stats = lossmith.token_stats(logits, targets)
    expected = (stats.nll * table[logits.argmax(-1)]).mean()
    torch.testing.assert_close(Objective([term])(logits, targets), expected)


def test_an_objective_with_every_term_off_is_a_connected_zero():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = Objective([Term("off", lambda s, b: s.nll, 0.0)])(logits, torch.randint(5, (2, 3)))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


# -- weights are constants ------------------------------------------------------------------------


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 7, dtype=torch.float64, generator=rng, requires_grad=True)
    targets = torch.randint(7, (3, 4), generator=rng)
    targets[0, 1] = -100
    return logits, targets, torch.tensor(0.7, dtype=torch.float64, requires_grad=True)


def evaluated(terms: list[Term], **options) -> lossmith.LossOutput:
    logits, targets, _ = case()
    batch = align(targets, dtype=torch.float64)
    return evaluate(terms, Logits(logits.detach()), batch, SweepOptions(), **options)


WEIGHTS = {
    "a parameter": lambda s, b, slope: slope * s.nll,
    "a parameter alone": lambda s, b, slope: slope.expand_as(s.nll),
    "a feature": lambda s, b, slope: b.features["scores"] * s.nll,
}


@pytest.mark.parametrize("of", WEIGHTS)
def test_a_weight_is_no_way_down(of):
    """What could be lowered by gradient descent would be lowered instead of the loss."""
    logits, targets, slope = case()
    scores = slope.expand(3, 4).clone()
    term = Term("weighed", lambda s, b: s.nll, token_weight=lambda s, b: WEIGHTS[of](s, b, slope))
    batch = align(targets, dtype=torch.float64, features={"scores": scores})
    total = evaluate([term], Logits(logits), batch, SweepOptions()).total
    nll = lossmith.token_stats(logits, targets).nll
    weight = torch.full_like(nll, 0.7) if of == "a parameter alone" else 0.7 * nll.detach()
    expected = (nll * weight).sum() / 11
    gradient, of_slope = torch.autograd.grad(total, (logits, slope), allow_unused=True)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    assert of_slope is None


def test_what_weighs_all_terms_is_no_way_down_and_stays_out_of_the_contributions():
    logits, targets, slope = case()
    batch = align(targets, dtype=torch.float64)
    terms, seen = [NLL, Term("flat", lambda s, b: -s.entropy, 0.5)], []

    def weigh(stats, batch):
        seen.append(stats)
        return slope * stats.top_prob * (torch.arange(12) != 5)

    output = evaluate(terms, Logits(logits), batch, SweepOptions(), weigh=weigh)
    stats = lossmith.token_stats(logits, targets).flat()
    each = (stats.nll - 0.5 * stats.entropy) * batch.valid / 11
    weight = (0.7 * stats.top_prob * (torch.arange(12) != 5)).detach()
    torch.testing.assert_close(output.total, (each * weight).sum())
    torch.testing.assert_close(output.contributions, each.detach())
    torch.testing.assert_close(output.batch.scale, batch.scale * weight)
    gradient, of_slope = torch.autograd.grad(output.total, (logits, slope), allow_unused=True)
    torch.testing.assert_close(gradient, torch.autograd.grad((each * weight).sum(), logits)[0])
    assert of_slope is None
    assert not seen[0].nll.requires_grad
    assert not output.batch.scale.requires_grad


# -- parts have names of their own ------------------------------------------------------------------


def test_no_part_takes_the_place_of_another():
    message = "the parts of an objective need distinct names; 'nll' is there twice"
    logits, targets, _ = case()
    one = {"nll": torch.tensor(1.0, dtype=torch.float64)}
    with pytest.raises(ValueError, match=message):
        Objective([NLL, Term("nll", lambda s, b: s.entropy)])(logits, targets)
    with pytest.raises(ValueError, match=message):
        evaluated([NLL], scalars=one)
    with pytest.raises(ValueError, match=message):
        with_parts(evaluated([NLL]), one)
    off = Term("nll", lambda s, b: s.entropy, 0.0)  # which is as good as absent
    assert Objective([NLL, off])(logits, targets) == Objective([NLL])(logits, targets)


def test_parts_of_no_token_have_no_place_among_tokens():
    one = {"more": torch.tensor(1.0, dtype=torch.float64)}
    with pytest.raises(ValueError, match="the scalars more belong to no token; reduction='none'"):
        evaluated([NLL], scalars=one, per_token=True)
    with pytest.raises(ValueError, match="the parts more belong to no token; reduction='none'"):
        with_parts(evaluated([NLL], per_token=True), one)


def test_further_parts_are_in_the_total_and_the_metrics():
    before = evaluated([NLL])
    after = with_parts(before, {"more": torch.tensor(0.5, dtype=torch.float64)})
    assert after.total == before.total + 0.5
    assert after.metrics.to_dict() == {
        **before.metrics.to_dict(),
        "loss": pytest.approx(before.total.item() + 0.5),
        "more": 0.5,
    }
