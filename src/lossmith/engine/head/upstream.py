"""Gradients that are known, times an upstream gradient."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of a gradient that are scaled at a time on a CPU where it is narrower than the factor.
PIECE = 2**22


def times(gradient: Tensor, factor: Tensor, into: Tensor) -> Tensor:
    """gradient * factor, rounded once; a factor of 1/3 in bf16 would be off by the same .2% everywhere.

    On an accelerator it is one launch, without a temporary, and the host does not wait for the factor.
    """
    gradient, factor = gradient.detach(), factor.detach()
    if gradient.dtype == factor.dtype:
        return torch.mul(gradient, factor, out=into)
    if gradient.device.type != "cpu":
        # a factor with a dimension promotes, so that the arithmetic is in its dtype; one without would be
        # rounded to the gradient's first
        return torch.mul(gradient, factor.reshape(1), out=into)
    source, target = gradient.view(-1), into.view(-1)
    for start in range(0, source.numel(), PIECE):
        piece = slice(start, start + PIECE)
        target[piece] = source[piece].to(factor.dtype).mul_(factor)
    return into
