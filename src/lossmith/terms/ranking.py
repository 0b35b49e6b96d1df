"""Ranking: a positive's score should exceed a negative's by a margin."""

from __future__ import annotations

import torch
from torch import Tensor


def ranking(positive: Tensor, negative: Tensor, *, margin: float = 1.0) -> Tensor:
    """relu(margin - s_pos + s_neg), elementwise.

    Args:
        positive: [...] scores of what should rank higher.
        negative: [...] scores of what should rank lower; broadcast against ``positive``.
        margin: by how much; >= 0.
    """
    return torch.relu(margin - positive + negative)
