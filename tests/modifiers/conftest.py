"""Batches for the modifiers' tests."""

import pytest
import torch
from torch import Tensor

IGNORE = -100


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """fp64 logits [4, 6, 9] that need a gradient; rows of 6, 4, 1 and 3 supervised tokens."""
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(4, 6, 9, generator=generator, dtype=torch.float64)
    logits = logits * torch.tensor([0.3, 1.0, 2.0, 3.0], dtype=torch.float64).view(4, 1, 1)
    targets = torch.randint(9, (4, 6), generator=generator)
    for row, count in enumerate((6, 4, 1, 3)):
        targets[row, count:] = IGNORE
    return logits.requires_grad_(), targets
