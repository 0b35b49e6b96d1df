"""Raw statistics as tensors with gradients, in eager mode. ``torch.compile`` and dispatch modes see the
operators in ``rows/operators.py`` and ``head/two_sweeps.py`` in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.checks import refuse_batched
from lossmith.engine.differentiable_once import once
from lossmith.engine.sweep import Maybe, Sweep, saved, unsaved

Tensors = Sequence["Tensor | None"]


@dataclass(frozen=True)
class Ways:
    """There and back, for one kind of predictions.

    Attributes:
        forward: (tensors, sweep) -> the raw statistics, in the operators' order; a buffer to keep, or None.
        backward: (tensors, sweep, raw, grads, needed, kept) -> the gradients of the tensors that need one.
    """

    forward: Callable[[Tensors, Sweep], tuple[list[Tensor], Tensor | None]]
    backward: Callable[[Tensors, Sweep, Maybe, Maybe, Sequence[bool], Tensor | None], Maybe]


def stats_with_gradients(
    ways: Ways, tensors: Tensors, sweep: Sweep, known: list[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """The raw statistics [N] of predictions, in the operators' order.

    Args:
        ways: how they are computed.
        tensors: what the predictions are made of.
        sweep: which statistics to compute.
        known: the statistics, where they are known already and only their gradients are missing.
    """
    return _Stats.apply(ways, sweep, known, *tensors)


class _Stats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ways: Ways, sweep: Sweep, known: list[Tensor] | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        outputs, ctx.kept = ways.forward(tensors, sweep) if known is None else (known, None)
        if not any(ctx.needs_input_grad):
            ctx.kept = None
        ctx.ways, ctx.sweep, ctx.is_saved, ctx.num_tensors = ways, sweep, sweep.is_saved, len(tensors)
        # all that the way back reads, so that autograd sees when it is written over before
        ctx.save_for_backward(*tensors, *sweep.tensors.values(), *saved(outputs, ctx.is_saved))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(out for out in outputs if not out.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_batched(*grads)
        everything = ctx.saved_tensors  # once: an activation checkpoint unpacks it a single time
        tensors = everything[: ctx.num_tensors]
        stats = everything[ctx.num_tensors + len(ctx.sweep.tensors) :]
        kept, ctx.kept = ctx.kept, None  # its memory is written over
        if all(g is None for g in grads):
            return (None,) * (3 + ctx.num_tensors)
        raw, needed = unsaved(stats, ctx.is_saved), ctx.needs_input_grad[3:]
        with torch.no_grad():  # with create_graph autograd would watch the products
            found = ctx.ways.backward(tensors, ctx.sweep, raw, grads, needed, kept)
        return (None, None, None, *once(found, (*tensors, *grads)))
