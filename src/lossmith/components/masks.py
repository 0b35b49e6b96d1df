"""Which tokens a component counts: padding has no say in what it measures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def token_mask(attention_mask: Any, shape: torch.Size, device: torch.device) -> Tensor:
    """[N] bool, which tokens count: all of them where there is no mask.

    Args:
        attention_mask: [B, T] bool or integers, 0 at padding; or None.
        shape: [B, T] or [N] of the tokens.
        device: where they are.

    Raises:
        TypeError: not a tensor of bools or integers.
        ValueError: another number of tokens.
    """
    if attention_mask is None:
        return torch.ones(shape.numel(), dtype=torch.bool, device=device)
    if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point():
        got = attention_mask.dtype if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise TypeError(
            f"attention_mask must be a bool or integer tensor, 0 at padding; got {got}. Pass mask.bool()"
        )
    if attention_mask.numel() != shape.numel() or (len(shape) == 2 and attention_mask.shape != shape):
        raise ValueError(
            f"attention_mask must be that of the tokens, {list(shape)}; got {list(attention_mask.shape)}. "
            "Pass the [B, T] mask that the model had"
        )
    return (attention_mask != 0).reshape(-1).to(device)


def masked(values: Tensor, kept: Tensor) -> Tensor:
    """[N, ...] values, 0 at tokens that do not count: NaN in padding goes nowhere, forwards or backwards."""
    return torch.where(kept.reshape(-1, *[1] * (values.dim() - 1)), values, 0.0)


def mean_of_kept(values: Tensor, kept: Tensor) -> Tensor:
    """The mean of values [N, ...] over the tokens that count; a connected 0 if none does."""
    return masked(values, kept).sum(0) / kept.sum().clamp(min=1)
