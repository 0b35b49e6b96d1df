"""Logits to raw statistics and back as two custom operators, ``lossmith::row_stats`` and its backward
``lossmith::row_grad``: autograd, autocast and ``torch.compile(fullgraph=True)`` see one opaque step."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.checks import refuse_batched
from lossmith.engine.differentiable_once import once
from lossmith.engine.eager import Tensors, Ways, stats_with_gradients
from lossmith.engine.rows.backends import backend_for, gradient_of_rows, looks_at_ids, stats_of_rows
from lossmith.engine.rows.blocks import accumulation_dtype
from lossmith.engine.sweep import Maybe, Sweep, saved, unsaved
from lossmith.engine.watched import is_eager


def stats_of_logits(logits: Tensor, sweep: Sweep) -> Sequence[Tensor]:
    """The raw statistics [N] of logits [..., V], differentiable, in the operators' order."""
    if not is_eager(logits, *sweep.tensors.values()):
        *arguments, backend = sweep.arguments
        return row_stats_op(logits, *arguments, backend=backend)
    _check_ids(logits, sweep)
    return stats_with_gradients(_WAYS, (logits,), sweep)


def known_stats_of_logits(logits: Tensor, sweep: Sweep, raw: Tensor) -> Sequence[Tensor]:
    """The same, where they are known [R, N], and only their gradients are missing."""
    return stats_with_gradients(_WAYS, (logits,), sweep, [row.clone() for row in raw])


def _check_ids(logits: Tensor, sweep: Sweep) -> None:
    """Ids that the arithmetic does not look at itself."""
    by_kernels = looks_at_ids(backend_for(logits, sweep), logits.device, sweep)
    sweep.check_ids(logits.shape[-1], logits.shape[:-1], by_kernels=by_kernels)


def _forward(tensors: Tensors, sweep: Sweep) -> tuple[list[Tensor], None]:
    (logits,) = tensors
    assert logits is not None
    return stats_of_rows(logits, sweep), None


def _backward_of(tensors: Tensors, sweep: Sweep, raw: Maybe, grads: Maybe, *_: Any) -> list[Tensor]:
    (logits,) = tensors
    assert logits is not None
    return [gradient_of_rows(logits, sweep, raw, grads).view(logits.shape)]


_WAYS = Ways(_forward, _backward_of)


@torch.library.custom_op("lossmith::row_stats", mutates_args=())
def row_stats_op(
    logits: Tensor,
    targets: Tensor,
    candidates: Tensor | None,
    class_weight: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    needs: int,
    needs_unscaled: int,
    *,
    backend: str | None = None,
) -> typing.List[Tensor]:  # noqa: UP006, the one that PyTorch 2.6 reads in an operator's signature
    rest = (class_weight, temperature, softcap, ignore_index, needs, needs_unscaled, backend)
    sweep = _flat(targets, candidates, *rest)
    _check_ids(logits, sweep)
    return stats_of_rows(logits, sweep)


@torch.library.custom_op("lossmith::row_grad", mutates_args=())
def row_grad_op(
    logits: Tensor,
    targets: Tensor,
    candidates: Tensor | None,
    class_weight: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    needs: int,
    needs_unscaled: int,
    raw: typing.Sequence[Tensor | None],
    grads: typing.Sequence[Tensor | None],
    *,
    backend: str | None = None,
) -> Tensor:
    """Gradient of the logits from those of the raw statistics, listed as ``row_stats`` returns them."""
    rest = (class_weight, temperature, softcap, ignore_index, needs, needs_unscaled, backend)
    sweep = _flat(targets, candidates, *rest)
    return gradient_of_rows(logits, sweep, raw, grads).view(logits.shape)


def _flat(targets: Tensor, candidates: Tensor | None, *rest: Any) -> Sweep:
    """The sweep at targets [...] and candidates [..., K]."""
    if candidates is not None:
        candidates = candidates.reshape(candidates.shape[:-1].numel(), candidates.shape[-1])
    return Sweep(targets.reshape(-1), candidates, *rest)


@row_stats_op.register_fake
def _(logits, *arguments, backend=None):
    return Sweep(*arguments).blank(accumulation_dtype(logits.dtype), logits.device)


@row_grad_op.register_fake
def _(logits, *_unused, backend=None):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save_for_backward(
    ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: list[Tensor]
) -> None:
    ctx.options, ctx.is_saved, ctx.named = inputs[5:], Sweep(*inputs[1:]).is_saved, keyword_only_inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *saved(output, ctx.is_saved))


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    refuse_batched(*grads)
    everything = ctx.saved_tensors  # once: an activation checkpoint unpacks it a single time
    inputs, stats = everything[:5], everything[5:]
    gradient = None
    if ctx.needs_input_grad[0] and any(g is not None for g in grads):
        made = row_grad_op(*inputs, *ctx.options, unsaved(stats, ctx.is_saved), grads, **ctx.named)
        (gradient,) = once([made], (inputs[0], *grads))
    return (gradient, *[None] * 8)


row_stats_op.register_autograd(_backward, setup_context=_save_for_backward)
