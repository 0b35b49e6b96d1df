"""One sweep in a graph of ``torch.compile``: the chunks one after another, each as two opaque steps with the
terms of its tokens, which the compiler fuses, between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lossmith.engine.head.factors import Factors
from lossmith.engine.head.graph_operators import (
    head_chunk_grad_op,
    head_chunk_op,
    known_gradient_op,
    no_gradient_of_its_own_op,
    sizes_of,
)
from lossmith.engine.head.one_sweep import OtherGradient, lift_for
from lossmith.engine.head.products import VERSION
from lossmith.engine.head.two_sweeps import Gradients, Needed
from lossmith.engine.predictions import LossOf
from lossmith.engine.statistics.raw import CONSTANTS, raw_names
from lossmith.engine.statistics.raw_stats import ByView, RawStats
from lossmith.engine.statistics.stats import TokenStats
from lossmith.engine.sweep import Sweep

# Each chunk is a piece of the graph of its own; of more the compiler would take minutes.
MOST_CHUNKS = 16


def why_not_in_a_graph(factors: Factors, num_tokens: int) -> str | None:
    """Why the chunks cannot follow one another in a graph; None if they can."""
    if VERSION < (2, 9):
        return "torch.compile of PyTorch before 2.9 does not say whether the number of tokens is fixed"
    from torch.fx.experimental.symbolic_shapes import has_static_value

    if not has_static_value(num_tokens):
        return "torch.compile leaves the number of tokens open, and the graph of one sweep is for a fixed one"
    num_chunks = sizes_of(factors, num_tokens).num_chunks
    if num_chunks > MOST_CHUNKS:
        return (
            f"torch.compile makes a piece of graph for each of {num_chunks} chunks, which takes long for "
            f"over {MOST_CHUNKS}; a larger memory_budget makes fewer"
        )
    return None


@dataclass(frozen=True)
class SweptInGraph:
    """What one sweep leaves in a graph, as :class:`lossmith.engine.head.one_sweep.SweptOnce` does elsewhere.

    Attributes:
        total: the loss, with its gradient.
        known: the raw statistics, whose gradients are an error.
        shares: [K, N] what each token adds to each term.
        sweep: what they are statistics of.
    """

    total: Tensor
    known: ByView
    shares: Tensor
    sweep: Sweep

    def loss(self, sums: Tensor) -> Tensor:
        """The loss, whose gradient is known; it has been summed."""
        return self.total

    def part(self, value: Tensor, again: Callable[[TokenStats], Tensor]) -> Tensor:
        """``value``, a part of the loss, whose gradient is an error."""
        return no_gradient_of_its_own_op(value, self.total)

    def stats(self, views: ByView) -> TokenStats:
        """Statistics by name, of raw ones that are known."""
        return TokenStats(RawStats(self.sweep, lambda *_: views))


def sweep_in_graph(
    factors: Factors, sweep: Sweep, loss_of: LossOf, needed: Needed, scale: Tensor
) -> SweptInGraph:
    """As :func:`lossmith.engine.head.one_sweep.sweep_once`, for ``torch.compile`` to trace.

    Raises:
        OtherGradient: the loss has gradients that would be lost.
    """
    with torch.no_grad():
        lift = lift_for(scale) if factors.is_lifted else None
        raw, shares, gradients = _swept(factors, sweep, loss_of, needed, lift)
    total = known_gradient_op(shares.sum(-1).sum(), lift, *gradients, *factors.tensors)
    known = [no_gradient_of_its_own_op(v, total) if v.is_floating_point() else v for v in raw]
    return SweptInGraph(total, sweep.by_view(known), shares, sweep)


def _swept(
    factors: Factors, sweep: Sweep, loss_of: LossOf, needed: Needed, lift: Tensor | None
) -> tuple[list[Tensor], Tensor, Gradients]:
    """The raw statistics, the shares [K, N] and the gradients, which are multiplied by the lift."""
    num_tokens = sweep.targets.numel()
    sizes = sizes_of(factors, num_tokens)
    # once, not for every chunk
    tensors = tuple(
        None if t is None else t.detach().to(factors.compute_dtype).contiguous() for t in factors.tensors
    )
    dtype = factors.wide if sizes.accumulator_bytes else factors.weight.dtype
    weight_sum = torch.empty_like(factors.weight, dtype=dtype) if needed[1] else None
    *arguments, backend = sweep.arguments
    options = {
        "backend": backend,
        "skip_ignored": factors.skip_ignored,
        "narrow_logits": factors.narrow_logits,
    }
    found = []
    for start in range(0, num_tokens, sizes.rows):
        rows = (start, min(start + sizes.rows, num_tokens))
        *raw, logits = head_chunk_op(*tensors, *arguments, *rows, **options)
        grads, shares = _gradients(sweep.of(slice(*rows)), slice(*rows), raw, loss_of, lift)
        made = head_chunk_grad_op(
            *tensors,
            *arguments,
            *rows,
            raw,
            grads,
            list(needed),
            logits,
            weight_sum,
            skip_small_gradients=factors.skip_small_gradients,
            **options,
        )
        found.append((raw, shares, made))
    raws, shares, made = zip(*found, strict=True)
    of_hidden, of_bias = zip(*made, strict=True)
    gradients = (
        torch.cat(of_hidden).view(factors.hidden.shape) if needed[0] else None,
        weight_sum,
        torch.stack(of_bias).sum(0) if needed[2] else None,
    )
    return [torch.cat(values) for values in zip(*raws, strict=True)], torch.cat(shares, -1), gradients


def _gradients(
    sweep: Sweep, rows: slice, raw: list[Tensor], loss_of: LossOf, lift: Tensor | None
) -> tuple[list[Tensor | None], Tensor]:
    """The gradients of a chunk's statistics, times the lift; the shares of its terms.

    Raises:
        OtherGradient: the loss has others.
    """
    wanted = [
        at
        for asked, places in zip(loss_of.asked, sweep.by_view(range(len(raw))), strict=True)
        for name, at in places.items()
        if asked is not None and name in raw_names(asked) and name not in CONSTANTS
    ]

    def of(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        values = list(raw)
        for at, leaf in zip(wanted, leaves, strict=True):
            values[at] = leaf
        views = sweep.by_view(values)
        loss, shares = loss_of(TokenStats(RawStats(sweep, lambda *_: views)), rows)
        return (loss if lift is None else loss * lift.to(loss.dtype)), shares

    if not rows.start:
        with torch.enable_grad():  # the graph of it is left out, since nothing reads it
            if of(*(raw[at] for at in wanted))[0].requires_grad:
                raise OtherGradient
    if not wanted:
        return [None] * len(raw), of()[1]
    found, shares = torch.func.grad(of, argnums=tuple(range(len(wanted))), has_aux=True)(
        *(raw[at] for at in wanted)
    )
    grads: list[Tensor | None] = [None] * len(raw)
    for at, gradient in zip(wanted, found, strict=True):
        grads[at] = gradient
    return grads, shares
