"""A composition is its parts, each with its own coefficient: terms, scalars and sums over tokens."""

import pytest
import torch

import reference
import reference_components as naive
from lossmith import MTP, Component, ComposedLoss, CrossEntropyLoss, LossModifierPipeline, Term, Weighted

IGNORE, B, T, V = -100, 3, 4, 6


@pytest.fixture
def case(rng):
    logits = torch.randn(B, T, V, generator=rng, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (B, T), generator=rng)
    targets[0, 1:3] = IGNORE
    return logits, targets


class Entropy(Component):
    """A term with a coefficient of its own."""

    def term(self):
        return Term("whatever", lambda s, b: s.entropy, 3.0, reads=("entropy",), scope="token")


class Both(Component):
    """A number and a sum over tokens, of what neither term nor objective reads."""

    reads = ("unscaled.logsumexp", "top_prob")

    def scalar(self, inputs, output):
        return torch.tensor(2.0, dtype=torch.float64)

    def token_sum(self, inputs, output):
        return (output.stats.unscaled.logsumexp * output.stats.top_prob * output.batch.scale).sum()


def made(**components) -> ComposedLoss:
    return ComposedLoss(CrossEntropyLoss(label_smoothing=0.1, z_loss=0.2), components)


def mean(values, targets):
    valid = targets != IGNORE
    return torch.where(valid, values, 0.0).sum() / valid.sum()


def formulas(logits, targets) -> dict:
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return {
        "main": reference.cross_entropy(logits, targets, label_smoothing=0.1, z_loss=0.2),
        "entropy": mean(entropy, targets),
        "token_sum": mean(logits.logsumexp(-1) * log_p.exp().amax(-1), targets),
    }


@pytest.mark.parametrize("weight", [0.5, torch.tensor(0.5)])
def test_a_components_own_coefficient_and_its_weight_multiply(case, weight):
    logits, targets = case
    expected = formulas(logits, targets)
    output = made(entropy=Weighted(Entropy(), weight)).evaluate(logits, targets)
    torch.testing.assert_close(output.parts["entropy"], 1.5 * expected["entropy"])
    total = expected["main"] + 1.5 * expected["entropy"]
    torch.testing.assert_close(output.total, total)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (output.total, total)]
    torch.testing.assert_close(*gradients)


def test_a_scalar_stands_beside_a_sum_over_tokens(case, count_ops):
    """What they read is computed in the one pass; of a part of a batch the scalar counts for its share."""
    logits, targets = case
    expected = formulas(logits, targets)["token_sum"]
    criterion = made(both=Weighted(Both(), 0.5))
    with count_ops as ops:
        output = criterion.evaluate(logits, targets)
        output.total.backward()
    assert ops.passes == (1, 1)
    torch.testing.assert_close(output.parts["both"], 0.5 * (2.0 + expected))
    part = criterion.evaluate(logits, targets, denominator=40).parts["both"]
    torch.testing.assert_close(part, 0.5 * 10 / 40 * (2.0 + expected))
    around = LossModifierPipeline(base=criterion).evaluate(logits, targets)
    torch.testing.assert_close(around.parts["both"], 0.5 * (2.0 + expected))


def test_a_composition_inside_another_keeps_all_of_its_parts(case):
    logits, targets = case
    expected = formulas(logits, targets)
    inner = made(entropy=Weighted(Entropy(), 0.5), both=Weighted(Both(), 0.1))
    output = ComposedLoss(inner, {"again": Weighted(Both(), 10.0)}).evaluate(logits, targets)
    own = 2.0 + expected["token_sum"]
    parts = {"entropy": 1.5 * expected["entropy"], "both": 0.1 * own, "again": 10.0 * own}
    torch.testing.assert_close({name: output.parts[name] for name in parts}, parts)
    torch.testing.assert_close(output.total, expected["main"] + sum(parts.values()))


def test_what_an_inner_composition_looks_at_without_a_target_is_read(case, rng):
    """Its heads weigh by the confidence of predictions of which nothing is learned."""
    logits, targets = case
    hidden = torch.randn(B, T, 5, generator=rng, dtype=torch.float64)
    heads = MTP(V, 5, num_future_tokens=1, adaptive=True).double()
    inner = ComposedLoss(CrossEntropyLoss(), {"mtp": heads})
    weight = naive.confidence_weight(logits.softmax(-1).amax(-1).detach())
    of_head = [hidden @ heads.heads[0].weight.t()]
    expected = naive.further_ahead(of_head, targets, naive.scale_of(targets), weight=weight)
    for criterion in (inner, ComposedLoss(inner, {"again": Entropy()}), LossModifierPipeline(base=inner)):
        part = criterion.evaluate(logits, targets, hidden_states=hidden).parts["mtp"]
        torch.testing.assert_close(part, expected)
