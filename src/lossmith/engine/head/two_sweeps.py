"""Raw statistics of a linear head's logits, and their gradients, by two sweeps: the logits of a chunk are
made for its statistics and, on the way back, once more for its gradient."""

from __future__ import annotations

import functools
import typing
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.checks import refuse_batched
from lossmith.engine.differentiable_once import once
from lossmith.engine.eager import Tensors, Ways, stats_with_gradients
from lossmith.engine.head.chunks import Chunks, HeadGradient
from lossmith.engine.head.factors import Factors
from lossmith.engine.head.packing import Packing
from lossmith.engine.rows.backends import gradient_of_rows, stats_of_rows
from lossmith.engine.rows.blocks import accumulation_dtype
from lossmith.engine.sweep import Maybe, Rows, Sweep, saved, unsaved

# Which of hidden states, weight and bias have a gradient; and their gradients.
Needed = Sequence[bool]
Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


def forward_sweep(
    factors: Factors, sweep: Sweep, packing: Packing | None = None, buffer: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """The statistics of all tokens; and the logits of the last chunk, with which the way back begins and
    whose memory serves all of it, ``buffer`` if it is given."""
    chunks = Chunks(factors, sweep.targets, sweep.ignore_index, packing)
    if buffer is not None:
        chunks.reuse(buffer)
    outputs = sweep.blank(factors.wide, factors.hidden.device)
    for rows in chunks.all():
        values = stats_of_rows(chunks.logits(chunks.inputs(rows)), sweep.of(rows))
        for out, value in zip(outputs, values, strict=True):
            out[rows] = value
    return outputs, chunks.buffer() if chunks.num_rows else buffer


def backward_sweep(
    factors: Factors,
    sweep: Sweep,
    raw: Maybe,
    grads: Maybe,
    needed: Needed,
    kept: Tensor | None = None,
    packing: Packing | None = None,
) -> Gradients:
    """The gradients of hidden states, weight and bias from those of the statistics."""
    chunks = Chunks(factors, sweep.targets, sweep.ignore_index, packing)
    result = HeadGradient(chunks, needed)
    if kept is not None:
        chunks.reuse(kept)
    # from the end, where the kept ones are; and always so, that the sums do not depend on what was kept
    for k, rows in enumerate(reversed(list(chunks.all()))):
        x = chunks.inputs(rows)
        z = chunks.buffer()[: len(x)] if kept is not None and k == 0 else chunks.logits(x)
        g = gradient_of_rows(z, sweep.of(rows), rows_of(raw, rows), rows_of(grads, rows), in_place=True)
        result.add(rows, x, g)
        del x  # its memory, before the next chunk's take more
    return result.finish()


def rows_of(values: Maybe, rows: Rows) -> list[Tensor | None]:
    """These rows of each."""
    return [None if value is None else value[rows] for value in values]


def stats_of_head(factors: Factors, sweep: Sweep, known: list[Tensor] | None = None) -> tuple[Tensor, ...]:
    """The raw statistics [N] of a head's logits, differentiable. The last chunk's logits are kept for the way
    back.

    Args:
        factors, sweep: what the logits are made of, and which statistics to compute.
        known: the statistics, where they are known already and only their gradients are missing.
    """
    options = factors.options  # without the tensors, which autograd keeps or gives away
    skip_ignored = factors.skip_ignored

    def of(tensors: Tensors) -> Factors:
        return Factors(*tensors, *options)  # pyright: ignore[reportCallIssue, reportArgumentType]

    @functools.cache  # an accelerator is waited for once, not on the way back again
    def packing() -> Packing:
        return Packing.of(sweep.targets, sweep.ignore_index, skip_ignored)

    ways = Ways(
        lambda tensors, sweep: forward_sweep(of(tensors), sweep, packing()),
        lambda tensors, *rest: backward_sweep(of(tensors), *rest, packing=packing()),
    )
    return stats_with_gradients(ways, factors.tensors, sweep, known)


# ── what torch.compile sees ───────────────────────────────────────────────────────────────────────────


@torch.library.custom_op("lossmith::head_stats", mutates_args=())
def head_stats_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    candidates: Tensor | None,
    class_weight: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    needs: int,
    needs_unscaled: int,
    compute_dtype: torch.dtype,
    memory_budget: int | None,
    *,
    backend: str | None = None,
    skip_ignored: bool | None = None,
    narrow_logits: bool = False,
    skip_small_gradients: float = 0.0,
) -> typing.List[Tensor]:  # noqa: UP006, as in lossmith.engine.rows.operators
    rest = (class_weight, temperature, softcap, ignore_index, needs, needs_unscaled, backend)
    sweep = Sweep(targets, candidates, *rest)
    sweep.check_ids(weight.shape[0], targets.shape)
    factors = Factors(hidden, weight, bias, compute_dtype, memory_budget, skip_ignored, narrow_logits)
    return forward_sweep(factors, sweep)[0]


@torch.library.custom_op("lossmith::head_grad", mutates_args=())
def head_grad_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    candidates: Tensor | None,
    class_weight: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    needs: int,
    needs_unscaled: int,
    compute_dtype: torch.dtype,
    memory_budget: int | None,
    raw: typing.Sequence[Tensor | None],
    grads: typing.Sequence[Tensor | None],
    needed: typing.Sequence[bool],
    *,
    backend: str | None = None,
    skip_ignored: bool | None = None,
    narrow_logits: bool = False,
    skip_small_gradients: float = 0.0,
) -> typing.List[Tensor]:  # noqa: UP006
    """Gradients of hidden states, weight and bias; empty where they are not needed."""
    rest = (class_weight, temperature, softcap, ignore_index, needs, needs_unscaled, backend)
    sweep = Sweep(targets, candidates, *rest)
    options = (compute_dtype, memory_budget, skip_ignored, narrow_logits)
    more = {"sums_weight": needed[1], "skip_small_gradients": skip_small_gradients}
    factors = Factors(hidden, weight, bias, *options, **more)
    found = backward_sweep(factors, sweep, raw, grads, (needed[0], needed[1], needed[2]))
    return [hidden.new_empty(0) if gradient is None else gradient for gradient in found]


@head_stats_op.register_fake
def _(hidden, weight, bias, *rest, **named):
    *arguments, compute_dtype, _budget = rest
    return Sweep(*arguments).blank(accumulation_dtype(compute_dtype), hidden.device)


@head_grad_op.register_fake
def _(hidden, weight, bias, *rest, **named):
    needed = rest[-1]
    return [
        torch.empty(of.shape, dtype=of.dtype, device=of.device) if wanted else hidden.new_empty(0)
        for of, wanted in zip((hidden, weight, hidden if bias is None else bias), needed, strict=True)
    ]


def _save_for_backward(
    ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: list[Tensor]
) -> None:
    ctx.options, ctx.is_saved, ctx.named = inputs[7:], Sweep(*inputs[3:11]).is_saved, keyword_only_inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *saved(output, ctx.is_saved))


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    refuse_batched(*grads)
    found: list[Tensor | None] = [None, None, None]
    needed = list(ctx.needs_input_grad[:3])
    if any(needed) and any(g is not None for g in grads):
        everything = ctx.saved_tensors
        inputs, stats = everything[:7], everything[7:]
        raw = unsaved(stats, ctx.is_saved)
        made = head_grad_op(*inputs, *ctx.options, raw, grads, needed, **ctx.named)
        found = [gradient if wanted else None for gradient, wanted in zip(made, needed, strict=True)]
        found = once(found, (*inputs[:3], *grads))
    return (*found, *[None] * 10)


head_stats_op.register_autograd(_backward, setup_context=_save_for_backward)
