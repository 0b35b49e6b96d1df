"""What a subclass of an objective may override: the targets that count, and the weights of tokens."""

import pytest
import torch

from lossmith import (
    ComposedLoss,
    LossModifierPipeline,
    MaskRatioWeightModifier,
    Objective,
    TargetSmoothingModifier,
    Term,
    linear_cross_entropy,
)

IGNORE = -100


class WithoutClassZero(Objective):
    """Plain cross-entropy of all targets but 0, where later tokens of a sample weigh more."""

    def __init__(self, weighs: bool = True):
        super().__init__([Term("cross_entropy", lambda s, b: s.nll, reads=("nll",), scope="token")])
        self.weighs = weighs

    def kept(self, targets, ignore_index):
        return targets.masked_fill(targets == 0, ignore_index)

    @property
    def weigh(self):
        return self._by_position if self.weighs else None

    def _by_position(self, stats, batch):
        assert not stats.nll.requires_grad
        width = batch.shape[-1]
        return torch.arange(1, width + 1).repeat(len(batch.targets) // width).to(stats.nll)


@pytest.fixture
def case(rng):
    logits = torch.randn(3, 4, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0, 1, 2, 3], [4, 0, IGNORE, 5], [1, 2, 0, 0]])
    valid = (targets != IGNORE) & (targets != 0)
    losses = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none", ignore_index=IGNORE)
    return logits, targets, valid, torch.where(valid, losses, 0.0)


@pytest.mark.parametrize("weighs", [True, False])
def test_both_hooks_are_asked_however_the_objective_is_wrapped(weighs, case):
    logits, targets, valid, losses = case
    weight = torch.arange(1.0, 5) if weighs else torch.ones(4)
    expected = (losses * weight).sum() / valid.sum()
    objective = WithoutClassZero(weighs)
    for wrapped in (objective, ComposedLoss(objective), LossModifierPipeline(base=objective)):
        output = wrapped.evaluate(logits, targets)
        torch.testing.assert_close(output.total, expected)
        torch.testing.assert_close(
            torch.autograd.grad(output.total, logits, retain_graph=True),
            torch.autograd.grad(expected, logits, retain_graph=True),
        )
        assert output.num_tokens == wrapped.count(targets) == valid.sum()


def test_a_pipelines_own_weights_and_targets_come_on_top(case):
    logits, targets, valid, losses = case
    modifiers = [MaskRatioWeightModifier(power=1.0), TargetSmoothingModifier(factor=1e-12, padding_token=1)]
    pipeline = LossModifierPipeline(modifiers, base=WithoutClassZero(), reduction="sum")
    valid = valid & (targets != 1)
    ratio = valid.sum(-1, keepdim=True) / 4
    expected = (torch.where(valid, losses, 0.0) * torch.arange(1.0, 5) / ratio).sum()
    torch.testing.assert_close(pipeline(logits, targets, ignore_index=IGNORE), expected)
    other = targets.masked_fill(targets == IGNORE, -1)
    torch.testing.assert_close(pipeline(logits, other, ignore_index=-1), expected)
    assert pipeline.count(other, ignore_index=-1) == valid.sum()


def test_a_linear_head_is_swept_twice_where_tokens_are_weighed(rng):
    hidden = torch.randn(8, 4, generator=rng, requires_grad=True)
    head = {"hidden_states": hidden, "lm_head_weight": torch.randn(5, 4, generator=rng, requires_grad=True)}
    targets = torch.randint(1, 5, (8,), generator=rng)
    assert WithoutClassZero(False).plan(targets=targets, **head).strategy == "one_sweep"
    assert WithoutClassZero().plan(targets=targets, **head).strategy == "two_sweep"
    plain = linear_cross_entropy(hidden, head["lm_head_weight"], targets)
    torch.testing.assert_close(WithoutClassZero(False)(targets=targets, **head), plain)
