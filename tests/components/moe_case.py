"""Routers and what they route."""

import torch

from lossmith import ComposedLoss, CrossEntropyLoss, Weighted

B, T, E, V = 2, 5, 4, 7


def gates(rng, *shape, scale=2.0, dtype=torch.float64) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=rng, dtype=dtype)).requires_grad_()


def composed(component, weight=1.0, **options) -> ComposedLoss:
    return ComposedLoss(CrossEntropyLoss(**options), {"part": Weighted(component, weight)})


def batch(rng, rows=B):
    logits = torch.randn(rows, T, V, generator=rng, dtype=torch.float64, requires_grad=True)
    return logits, torch.randint(V, (rows, T), generator=rng)


def part_of(component, gate_logits, attention_mask=None, **inputs) -> torch.Tensor:
    """The component's part of a composed loss on some logits."""
    rows = torch.zeros(B, T, V, dtype=torch.float64), torch.zeros(B, T, dtype=torch.long)
    criterion = composed(component)
    if attention_mask is not None:  # the routers', while all targets count
        inputs |= {"attention_mask": attention_mask, "mask": torch.ones(B, T).bool()}
    return criterion.evaluate(*rows, gate_logits=gate_logits, **inputs).parts["part"]


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
