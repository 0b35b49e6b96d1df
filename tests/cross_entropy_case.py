"""A small batch of logits and targets that the tests of cross-entropy share."""

import torch
from torch import Tensor

IGNORE, INF = -100, float("inf")
B, T, V = 3, 5, 7
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def batch(seed: int = 0, dtype: torch.dtype = torch.float32, masked: float = 0.0) -> tuple[Tensor, Tensor]:
    """[B, T, V] logits with masked classes, and targets, some ignored; the last sample has none."""
    rng = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(B, T, V, generator=rng)).to(dtype)
    targets = torch.randint(V - 1, (B, T), generator=rng)
    hidden = torch.rand(B, T, V, generator=rng) < masked
    hidden[0, 1, V - 1] = True
    logits[hidden & (torch.arange(V) != targets.unsqueeze(-1))] = -INF
    targets[0, ::2], targets[-1] = IGNORE, IGNORE
    return logits, targets


def weights(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) + 0.25
