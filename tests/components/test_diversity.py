"""Diversity of experts against a loop over tokens and pairs."""

import pytest
import torch

from lossmith import ComposedLoss, CrossEntropyLoss, ExpertDiversity, Weighted
from lossmith.components.diversity import unit_vectors
from reference_components import diversity as naive

B, T, E, D, V = 2, 3, 4, 5, 7
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def composed(weight=1.0) -> ComposedLoss:
    return ComposedLoss(CrossEntropyLoss(), {"part": Weighted(ExpertDiversity(), weight)})


def part_of(expert_outputs, attention_mask=None) -> torch.Tensor:
    rows = torch.zeros(B, T, V, dtype=torch.float64), torch.zeros(B, T, dtype=torch.long)
    inputs = {"expert_outputs": expert_outputs, "attention_mask": attention_mask}
    return composed().evaluate(*rows, **inputs).parts["part"]


def outputs_of(rng, *shape, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=rng, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("experts", [2, E])
def test_diversity_is_its_formula(rng, mask, experts):
    outputs = outputs_of(rng, B, T, experts, D)
    found, expected = part_of(outputs, mask), naive(outputs, mask)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, outputs)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, outputs))
    assert (gradient != 0).any()
    flat = part_of(outputs.reshape(-1, experts, D), mask)
    torch.testing.assert_close(flat, expected)
    torch.testing.assert_close(part_of(list(outputs.unbind(-2)), mask), expected)
    torch.testing.assert_close(part_of(outputs.reshape(-1, experts, D).unbind(-2), mask), expected)
    torch.autograd.gradcheck(lambda x: part_of(x, mask), outputs)


def test_from_orthogonal_to_parallel():
    assert part_of(torch.eye(3).expand(2, 3, 3)) == 0
    alike = torch.tensor([[3.0, 4.0], [-6.0, -8.0]]).expand(1, 2, 2)
    torch.testing.assert_close(part_of(alike), torch.tensor(1.0))


def test_fewer_than_two_experts_cost_nothing(rng):
    for outputs in (outputs_of(rng, B, T, 1, D), outputs_of(rng, B, T, 0, D)):
        found = part_of(outputs)
        (gradient,) = torch.autograd.grad(found, outputs)
        assert found == 0
        assert (gradient == 0).all()


def test_padding_changes_nothing_and_gets_nothing(rng):
    outputs = outputs_of(rng, B, T, E, D)
    kept = MASK.bool()
    garbage = outputs.detach().masked_fill(~kept[..., None, None], torch.nan).requires_grad_()
    found = part_of(garbage, MASK)
    assert found == part_of(outputs, kept)
    torch.testing.assert_close(found, part_of(outputs[kept]))
    (gradient,) = torch.autograd.grad(found, garbage)
    assert (gradient[~kept] == 0).all()
    assert (gradient[kept] != 0).all()
    assert part_of(garbage, torch.zeros_like(MASK)) == 0


def test_an_expert_that_was_not_asked_is_orthogonal_to_all(rng):
    outputs = outputs_of(rng, 1, 3, D).detach()
    outputs[0, 1] = 0
    outputs.requires_grad_()
    found = part_of(outputs)
    torch.testing.assert_close(found, naive(outputs[:, [0, 2]]) / 3)
    (gradient,) = torch.autograd.grad(found, outputs)
    assert gradient.isfinite().all()
    assert (gradient[0, 1] == 0).all()
    zeros = torch.zeros(2, E, D, requires_grad=True)
    (gradient,) = torch.autograd.grad(part_of(zeros), zeros)
    assert (gradient == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_length_does_not_matter_however_long(rng, scale):
    outputs = outputs_of(rng, 2, E, D, dtype=torch.float32).detach()
    found = part_of((outputs * scale).requires_grad_())
    torch.testing.assert_close(found, part_of(outputs))
    lengths = unit_vectors(outputs * scale).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_compared_in_full(rng, dtype):
    outputs = outputs_of(rng, B, T, E, D, dtype=dtype)
    found = part_of(outputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), naive(outputs.double()), rtol=1e-6, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert part_of(outputs) == found


def test_micro_batches_add_up(rng):
    logits = torch.randn(3, T, V, generator=rng, dtype=torch.float64)
    targets, outputs = torch.zeros(3, T, dtype=torch.long), outputs_of(rng, 3, T, E, D)
    whole = composed(0.3)(logits, targets, expert_outputs=outputs)
    split = [
        composed(0.3)(logits[part], targets[part], expert_outputs=outputs[part], denominator=3 * T)
        for part in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(split), whole)


def test_a_weight_of_zero_is_as_good_as_absent(rng):
    logits = torch.randn(B, T, V, generator=rng, requires_grad=True)
    targets = torch.zeros(B, T, dtype=torch.long)
    plain, without = CrossEntropyLoss()(logits, targets), composed(0.0)(logits, targets)
    assert torch.equal(plain, without)
    assert all(map(torch.equal, torch.autograd.grad(plain, logits), torch.autograd.grad(without, logits)))
    with pytest.raises(ValueError, match="needs expert_outputs; pass expert_outputs="):
        composed()(logits, targets)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (torch.zeros(3, D), r"\[B, T, E, D\] or \[N, E, D\]; got \[3, 5\]"),
        (torch.zeros(2, 3, D, dtype=torch.long), "floating-point tensor .* got torch.int64"),
        ([None], "a list of E tensors .* got NoneType"),
        ([], r"one shape.*got \[\]"),
        ([torch.zeros(3, D), torch.zeros(2, D)], r"one shape.*got \[\[2, 5\], \[3, 5\]\]"),
        ([torch.zeros(2, 3, E, D)] * 2, r"\[B, T, D\] or \[N, D\]; got \[\[2, 3, 4, 5\]\]"),
    ],
)
def test_bad_outputs(outputs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        part_of(outputs)
