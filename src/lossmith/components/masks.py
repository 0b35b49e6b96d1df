"""Which tokens a component counts: padding is left out of what it measures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossmith.equation.batch import check_mask


def token_mask(attention_mask: Any, shape: torch.Size, device: torch.device) -> Tensor:
    """[N] bool, which tokens count; all of them without a mask.

    Args:
        attention_mask: [B, T] bool or integers, or floats that are 0 or 1, 0 at padding; or None.
        shape: of the tokens, [B, T] or [N].
        device: of the tokens.

    Raises:
        TypeError: not a tensor.
        ValueError: another number of tokens, or a float that is neither 0 nor 1.
    """
    if attention_mask is None:
        return torch.ones(shape.numel(), dtype=torch.bool, device=device)
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, 0 at padding; got {type(attention_mask).__name__}")
    if attention_mask.numel() != shape.numel() or (len(shape) == 2 and attention_mask.shape != shape):
        raise ValueError(
            f"attention_mask must be that of the tokens, {list(shape)}; got {list(attention_mask.shape)}. "
            "Pass the [B, T] mask that the model had"
        )
    check_mask("attention_mask", attention_mask)
    return (attention_mask != 0).reshape(-1).to(device)


def masked(values: Tensor, kept: Tensor) -> Tensor:
    """[N, ...] values, 0 at ignored tokens, so that NaN in padding spreads neither forward nor backward."""
    return torch.where(kept.reshape(-1, *[1] * (values.dim() - 1)), values, 0.0)


def mean_of_kept(values: Tensor, kept: Tensor) -> Tensor:
    """The mean of values [N, ...] over the tokens that count; 0, connected to the graph, if none does."""
    return masked(values, kept).sum(0) / kept.sum().clamp(min=1)
