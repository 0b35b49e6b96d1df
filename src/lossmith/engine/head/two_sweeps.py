"""Raw statistics of a linear head's logits, and their gradients, by two sweeps: the logits of a chunk are
made for its statistics and, on the way back, once more for its gradient."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.checks import refuse_batched
from lossmith.engine.head.chunks import Chunks, HeadGradient, Rows
from lossmith.engine.rows.backends import fill_stats, gradient
from lossmith.engine.statistics.raw import raw_names
from lossmith.engine.sweep import SAVED, DifferentiableOnce, allocate, check_all_ids, make_views

# hidden, weight, bias; a list of gradients in the operators' order
Grads = Sequence["Tensor | None"]


@dataclass(frozen=True)
class HeadSweep:
    """What is asked of a head's logits; see :func:`lossmith.engine.sweep.row_stats_op`.

    Attributes:
        targets: [N].
        candidates: [N, K], or None.
    """

    targets: Tensor
    candidates: Tensor | None
    class_weight: Tensor | None
    temperature: Tensor | None
    softcap: float | None
    ignore_index: int
    needs: int
    needs_unscaled: int
    compute_dtype: torch.dtype
    memory_budget: int | None

    def chunks(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Chunks:
        return Chunks(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            self.targets,
            ignore_index=self.ignore_index,
            compute_dtype=self.compute_dtype,
            memory_budget=self.memory_budget,
        )

    def blank(self, hidden: Tensor) -> list[Tensor]:
        """The statistics [N] of tokens without a target, to be filled in."""
        like = hidden.new_empty((), dtype=self.compute_dtype)
        return allocate(like, self.targets, self.candidates, self.needs, self.needs_unscaled)

    def stats_of(self, rows: Rows, z: Tensor) -> list[Tensor]:
        """The statistics [n] of a chunk's logits."""
        targets, ids = self.targets[rows], self._candidates_of(rows)
        raw = allocate(z, targets, ids, self.needs, self.needs_unscaled)
        views = make_views(self.temperature, self.needs, self.needs_unscaled, raw)
        fill_stats(z, targets, ids, self.class_weight, self.softcap, self.ignore_index, views)
        return raw

    def gradient_of(self, rows: Rows, z: Tensor, raw: Grads, grads: Grads) -> Tensor:
        """The gradient of a chunk's logits, in their place; ``raw`` and ``grads`` are the chunk's."""
        views = make_views(self.temperature, self.needs, self.needs_unscaled, raw, grads)
        targets, ids = self.targets[rows], self._candidates_of(rows)
        return gradient(
            z, targets, ids, self.class_weight, self.softcap, self.ignore_index, views, in_place=True
        )

    def _candidates_of(self, rows: Rows) -> Tensor | None:
        return None if self.candidates is None else self.candidates[rows]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What is read besides the head."""
        return self.targets, self.candidates, self.class_weight, self.temperature

    @property
    def options(self) -> tuple[Any, ...]:
        """In the operators' order."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the statistics, in the operators' order."""
        return _names(self.needs, self.needs_unscaled)


def _names(needs: int, needs_unscaled: int) -> tuple[str, ...]:
    return (*raw_names(needs), *(raw_names(needs_unscaled) if needs_unscaled >= 0 else ()))


def forward_sweep(
    sweep: HeadSweep, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """The statistics of all tokens; and the logits of the last chunk, with which the way back begins and
    whose memory serves all of it."""
    chunks = sweep.chunks(hidden, weight, bias)
    outputs = sweep.blank(hidden)
    for rows in chunks.all():
        x = chunks.inputs(rows)
        for out, value in zip(outputs, sweep.stats_of(rows, chunks.logits(x)), strict=True):
            out[rows] = value
    return outputs, chunks.buffer() if chunks.num_rows else None


def backward_sweep(
    sweep: HeadSweep,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    raw: Grads,
    grads: Grads,
    needed: tuple[bool, bool, bool],
    kept: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of hidden states, weight and bias from those of the statistics."""
    chunks = sweep.chunks(hidden, weight, bias)
    result = HeadGradient(chunks, needed)
    if kept is not None:
        chunks.reuse(kept)
    # from the end, where the kept ones are; and always so, that the sums do not depend on what was kept
    for k, rows in enumerate(reversed(list(chunks.all()))):
        x = chunks.inputs(rows)
        z = chunks.buffer()[: len(x)] if kept is not None and k == 0 else chunks.logits(x)
        result.add(rows, x, sweep.gradient_of(rows, z, _of(raw, rows), _of(grads, rows)))
    return result.finish(hidden, weight, bias)


def _of(values: Grads, rows: Rows) -> list[Tensor | None]:
    return [None if value is None else value[rows] for value in values]


class HeadStats(torch.autograd.Function):
    """The statistics as tensors with gradients. Here, in eager mode, the last chunk's logits are kept for the
    way back; ``torch.compile`` sees the operators below."""

    @staticmethod
    def forward(
        ctx: Any,
        sweep: HeadSweep,
        known: list[Tensor] | None,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs, ctx.kept = (known, None) if known is not None else forward_sweep(sweep, hidden, weight, bias)
        if not any(ctx.needs_input_grad):
            ctx.kept = None
        ctx.sweep = sweep
        ctx.is_saved = [name in SAVED for name in sweep.names]
        saved = (out for out, is_saved in zip(outputs, ctx.is_saved, strict=True) if is_saved)
        # all that the way back reads, so that autograd sees when it is written over before
        ctx.save_for_backward(hidden, weight, bias, *sweep.tensors, *saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(out for out in outputs if not out.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_batched(*grads)
        hidden, weight, bias, *rest = ctx.saved_tensors
        saved = rest[len(ctx.sweep.tensors) :]
        kept, ctx.kept = ctx.kept, None  # its memory is written over
        if all(g is None for g in grads):
            return (None,) * 5
        raw = unsaved(saved, ctx.is_saved)
        needed = ctx.needs_input_grad[2:]
        with torch.no_grad():  # with create_graph autograd would watch the products
            found = backward_sweep(ctx.sweep, hidden, weight, bias, raw, grads, needed, kept)
        return (None, None, *once(found, (hidden, weight, bias, *grads)))


def unsaved(saved: Sequence[Tensor], is_saved: Sequence[bool]) -> list[Tensor | None]:
    """Statistics in the operators' order, None for those that were not saved."""
    rest = iter(saved)
    return [next(rest) if was_saved else None for was_saved in is_saved]


def once(gradients: Grads, depend_on: Grads) -> list[Tensor | None]:
    """Gradients that cannot be differentiated; with ``create_graph`` whoever tries is told."""
    if not torch.is_grad_enabled():
        return list(gradients)
    return [None if g is None else DifferentiableOnce.apply(g.detach(), *depend_on) for g in gradients]


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
) -> typing.List[Tensor]:  # noqa: UP006, as in lossmith.engine.sweep
    sweep = HeadSweep(
        targets, candidates, class_weight, temperature, softcap, ignore_index, needs, needs_unscaled,
        compute_dtype, memory_budget,
    )  # fmt: skip
    check_all_ids(targets, candidates, weight.shape[0], ignore_index)
    return forward_sweep(sweep, hidden, weight, bias)[0]


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
) -> typing.List[Tensor]:  # noqa: UP006
    """Gradients of hidden states, weight and bias; empty where they are not needed."""
    sweep = HeadSweep(
        targets, candidates, class_weight, temperature, softcap, ignore_index, needs, needs_unscaled,
        compute_dtype, memory_budget,
    )  # fmt: skip
    found = backward_sweep(sweep, hidden, weight, bias, raw, grads, (needed[0], needed[1], needed[2]))
    return [hidden.new_empty(0) if gradient is None else gradient for gradient in found]


@head_stats_op.register_fake
def _(hidden, weight, bias, targets, candidates, class_weight, temperature, *options):
    needs, needs_unscaled, compute_dtype = options[2:5]
    like = hidden.new_empty((), dtype=compute_dtype)
    return allocate(like, targets, candidates, needs, needs_unscaled)


@head_grad_op.register_fake
def _(hidden, weight, bias, *rest):
    needed = rest[-1]
    return [
        torch.empty(of.shape, dtype=of.dtype, device=of.device) if wanted else hidden.new_empty(0)
        for of, wanted in zip((hidden, weight, hidden if bias is None else bias), needed, strict=True)
    ]


def _save_for_backward(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.options = inputs[7:]
    needs, needs_unscaled = inputs[9:11]
    ctx.is_saved = [name in SAVED for name in _names(needs, needs_unscaled)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *inputs[:7], *(out for out, is_saved in zip(output, ctx.is_saved, strict=True) if is_saved)
    )


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    refuse_batched(*grads)
    found: list[Tensor | None] = [None, None, None]
    needed = list(ctx.needs_input_grad[:3])
    if any(needed) and any(g is not None for g in grads):
        inputs, saved = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
        raw = unsaved(saved, ctx.is_saved)
        made = head_grad_op(*inputs, *ctx.options, raw, grads, needed)
        found = [gradient if wanted else None for gradient, wanted in zip(made, needed, strict=True)]
        found = once(found, (*inputs[:3], *grads))
    return (*found, *[None] * 10)


head_stats_op.register_autograd(_backward, setup_context=_save_for_backward)
