"""One sweep in a graph of ``torch.compile``: the chunks one after another, each as two opaque steps with the
terms of its tokens, which the compiler fuses, between them."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.head.chunks import Chunks, HeadGradient
from lossmith.engine.head.factors import Factors
from lossmith.engine.head.one_sweep import OtherGradient, lift_for
from lossmith.engine.head.packing import Packing
from lossmith.engine.head.products import VERSION
from lossmith.engine.head.sizes import Sizes
from lossmith.engine.head.two_sweeps import Gradients, Needed, forward_sweep, rows_of
from lossmith.engine.memory import fresh
from lossmith.engine.predictions import LossOf
from lossmith.engine.rows.backends import gradient_of_rows
from lossmith.engine.rows.blocks import accumulation_dtype
from lossmith.engine.statistics.raw import CONSTANTS, raw_names
from lossmith.engine.statistics.raw_stats import ByView, RawStats
from lossmith.engine.statistics.stats import TokenStats
from lossmith.engine.sweep import Sweep

# Each chunk is a piece of the graph of its own; of more the compiler would take minutes.
MOST_CHUNKS = 16
# So many bytes of logits are one chunk.
ANY_BUDGET = 2**62


def why_not_in_a_graph(factors: Factors, num_tokens: int) -> str | None:
    """Why the chunks cannot follow one another in a graph; None if they can."""
    if VERSION < (2, 9):
        return "torch.compile of PyTorch before 2.9 does not say whether the number of tokens is fixed"
    from torch.fx.experimental.symbolic_shapes import has_static_value

    if not has_static_value(num_tokens):
        return "torch.compile leaves the number of tokens open, and the graph of one sweep is for a fixed one"
    num_chunks = _sizes(factors, num_tokens).num_chunks
    if num_chunks > MOST_CHUNKS:
        return (
            f"torch.compile makes a piece of graph for each of {num_chunks} chunks, which takes long for "
            f"over {MOST_CHUNKS}; a larger memory_budget makes fewer"
        )
    return None


def _sizes(factors: Factors, num_tokens: int) -> Sizes:
    return Sizes.of(factors, num_tokens, Packing(False, None))


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
    sizes = _sizes(factors, num_tokens)
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
            *tensors, *arguments, *rows, raw, grads, list(needed), logits, weight_sum, **options
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


# ── the opaque steps ──────────────────────────────────────────────────────────────────────────────────


@torch.library.custom_op("lossmith::known_gradient", mutates_args=())
def known_gradient_op(
    value: Tensor,
    lift: Tensor | None,
    of_hidden: Tensor | None,
    of_weight: Tensor | None,
    of_bias: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """A number with known gradients, times the lift, which are multiplied by the upstream gradient."""
    return value.clone()


@torch.library.custom_op("lossmith::no_gradient_of_its_own", mutates_args=())
def no_gradient_of_its_own_op(value: Tensor, total: Tensor) -> Tensor:
    """The identity on what has no gradient but that of the whole loss; another is an error where it runs."""
    return value.clone()


@torch.library.custom_op("lossmith::refuse_gradient", mutates_args=())
def refuse_gradient_op(upstream: Tensor) -> Tensor:
    """0, which an upstream gradient has to be."""
    problem = (
        "a part of the loss, or a statistic, has a gradient of its own, which one sweep inside torch.compile "
        "does not make; pass strategy='two_sweep'"
    )
    if upstream.device.type == "cpu":
        if upstream.any():
            raise RuntimeError(problem)
    else:  # nobody waits
        torch._assert_async((upstream == 0).all(), problem)  # pyright: ignore[reportPrivateImportUsage]
    return upstream.new_zeros(())


@known_gradient_op.register_fake
@no_gradient_of_its_own_op.register_fake
def _(value, *_rest):
    return torch.empty_like(value)


@refuse_gradient_op.register_fake
def _(upstream):
    return upstream.new_empty(())


def _save_known(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _value, *known = inputs[:5]
    ctx.dtypes = [None if given is None else given.dtype for given in inputs[5:]]
    ctx.save_for_backward(*known)


def _scale_known(ctx: Any, upstream: Tensor) -> tuple:
    lift, *gradients = ctx.saved_tensors
    factor = upstream if lift is None else upstream / lift
    scaled = [
        None if g is None else (g.to(factor.dtype) * factor).to(dtype)
        for g, dtype in zip(gradients, ctx.dtypes, strict=True)
    ]
    return (*[None] * 5, *scaled)


known_gradient_op.register_autograd(_scale_known, setup_context=_save_known)
no_gradient_of_its_own_op.register_autograd(lambda ctx, upstream: (None, refuse_gradient_op(upstream)))


@torch.library.custom_op("lossmith::head_chunk", mutates_args=())
def head_chunk_op(
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
    start: int,
    stop: int,
    *,
    backend: str | None = None,
    skip_ignored: bool | None = None,
    narrow_logits: bool = False,
) -> typing.List[Tensor]:  # noqa: UP006, as in lossmith.engine.rows.operators
    """The raw statistics of the tokens from ``start`` to ``stop``, and their logits."""
    rest = (class_weight, temperature, softcap, ignore_index, needs, needs_unscaled, backend)
    sweep = Sweep(targets, candidates, *rest)
    if not start:
        sweep.check_ids(weight.shape[0], hidden.shape[:-1])
    factors = _of_chunk((hidden, weight, bias), start, stop, skip_ignored, narrow_logits)
    some = sweep.of(slice(start, stop))
    outputs, logits = forward_sweep(factors, some, buffer=_memory(factors))
    assert logits is not None
    return [*outputs, logits]


@torch.library.custom_op("lossmith::head_chunk_grad", mutates_args=("logits", "weight_sum"))
def head_chunk_grad_op(
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
    start: int,
    stop: int,
    raw: typing.Sequence[Tensor],
    grads: typing.Sequence[Tensor | None],
    needed: typing.Sequence[bool],
    logits: Tensor,
    weight_sum: Tensor | None,
    *,
    backend: str | None = None,
    skip_ignored: bool | None = None,
    narrow_logits: bool = False,
) -> typing.Tuple[Tensor, Tensor]:  # noqa: UP006
    """The gradients of a chunk's hidden states and of the bias, empty where they are not needed; that of the
    weight is added to a sum, which begins with the first chunk."""
    rest = (class_weight, temperature, softcap, ignore_index, needs, needs_unscaled, backend)
    some = Sweep(targets, candidates, *rest).of(slice(start, stop))
    factors = _of_chunk((hidden, weight, bias), start, stop, skip_ignored, narrow_logits)
    chunks = Chunks(factors, some.targets, ignore_index)
    result = HeadGradient(chunks, needed, weight_sum, is_begun=start > 0)
    for rows in chunks.all():
        if all(g is None for g in grads):
            result.add_nothing(rows)
            continue
        x, own = chunks.inputs(rows), (rows_of(raw, rows), rows_of(grads, rows))
        result.add(rows, x, gradient_of_rows(logits[: len(x)], some.of(rows), *own, in_place=True))
    of_hidden, _, of_bias = result.finish(is_rounded=False)
    nothing = hidden.new_empty(0)
    return nothing if of_hidden is None else of_hidden, nothing.clone() if of_bias is None else of_bias


def _of_chunk(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    start: int,
    stop: int,
    skip_ignored: bool | None,
    narrow_logits: bool,
) -> Factors:
    """The factors of the logits of the tokens from ``start`` to ``stop``, as a single chunk."""
    hidden, weight, bias = tensors
    rows = hidden.reshape(-1, hidden.shape[-1])[start:stop]
    return Factors(rows, weight, bias, weight.dtype, ANY_BUDGET, skip_ignored, narrow_logits)


def _memory(factors: Factors) -> Tensor:
    """[n, V] for the logits of a chunk."""
    num_classes, sizes = len(factors.weight), _sizes(factors, len(factors.hidden))
    shape = (sizes.rows, sizes.stride)
    return fresh(shape, dtype=factors.logits_dtype, device=factors.device, zero=False)[:, :num_classes]


@head_chunk_op.register_fake
def _(hidden, weight, bias, *rest, backend=None, skip_ignored=None, narrow_logits=False):
    *arguments, start, stop = rest
    factors = _of_chunk((hidden, weight, bias), start, stop, skip_ignored, narrow_logits)
    some = Sweep(*arguments).of(slice(start, stop))
    num_classes, sizes = len(weight), _sizes(factors, stop - start)
    logits = hidden.new_empty((sizes.rows, sizes.stride), dtype=factors.logits_dtype)[:, :num_classes]
    return [*some.blank(factors.wide, hidden.device), logits]


@head_chunk_grad_op.register_fake
def _(hidden, weight, bias, *rest, **named):
    start, stop, needed = rest[8], rest[9], rest[12]
    wide = accumulation_dtype(weight.dtype)
    of_hidden = hidden.new_empty((stop - start, hidden.shape[-1]) if needed[0] else 0)
    return of_hidden, hidden.new_empty(len(weight) if needed[2] else 0, dtype=wide if needed[2] else None)
