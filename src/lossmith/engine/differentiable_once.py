"""Gradients that cannot be differentiated again: trying raises an error that says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossmith.engine.sweep import Maybe


def once(gradients: Maybe, depend_on: Maybe) -> list[Tensor | None]:
    """The gradients; with ``create_graph`` connected to all that they depend on."""
    if not torch.is_grad_enabled():
        return list(gradients)
    return [None if g is None else _DifferentiableOnce.apply(g.detach(), *depend_on) for g in gradients]


class _DifferentiableOnce(torch.autograd.Function):
    """The identity on a gradient, whose own gradient is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_depends_on: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(
            "lossmith's losses can be differentiated once, not twice: the gradient of their gradient is not "
            "implemented. Use torch.nn.functional.cross_entropy where a second derivative is needed"
        )
