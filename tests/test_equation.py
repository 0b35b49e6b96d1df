"""What the equation has to carry: objectives and weights of other shapes than a plain mean."""

import torch

import lossmith
from lossmith import Objective, Term


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
