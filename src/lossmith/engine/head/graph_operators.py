"""The opaque steps of one sweep in a graph of ``torch.compile``: the operators ``lossmith::head_chunk`` and
``head_chunk_grad``, and those that stand for what autograd does elsewhere."""

from __future__ import annotations

import typing
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.head.chunks import Chunks, HeadGradient
from lossmith.engine.head.factors import Factors
from lossmith.engine.head.packing import Packing
from lossmith.engine.head.sizes import Sizes
from lossmith.engine.head.two_sweeps import forward_sweep, rows_of
from lossmith.engine.memory import fresh
from lossmith.engine.rows.backends import gradient_of_rows
from lossmith.engine.rows.blocks import accumulation_dtype
from lossmith.engine.sweep import Sweep

# So many bytes of logits are one chunk.
ANY_BUDGET = 2**62


def sizes_of(factors: Factors, num_tokens: int) -> Sizes:
    """What a sweep holds at a time where tokens without a target are not left out of its chunks."""
    return Sizes.of(factors, num_tokens, Packing(False, None))


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
    skip_small_gradients: float = 0.0,
) -> typing.Tuple[Tensor, Tensor]:  # noqa: UP006
    """The gradients of a chunk's hidden states and of the bias, empty where they are not needed; that of the
    weight is added to a sum, which begins with the first chunk."""
    rest = (class_weight, temperature, softcap, ignore_index, needs, needs_unscaled, backend)
    some = Sweep(targets, candidates, *rest).of(slice(start, stop))
    factors = _of_chunk(
        (hidden, weight, bias), start, stop, skip_ignored, narrow_logits, skip_small_gradients
    )
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
    skip_small_gradients: float = 0.0,
) -> Factors:
    """The factors of the logits of the tokens from ``start`` to ``stop``, as a single chunk."""
    hidden, weight, bias = tensors
    rows = hidden.reshape(-1, hidden.shape[-1])[start:stop]
    options = {"narrow_logits": narrow_logits, "skip_small_gradients": skip_small_gradients}
    return Factors(rows, weight, bias, weight.dtype, ANY_BUDGET, skip_ignored, **options)


def _memory(factors: Factors) -> Tensor:
    """[n, V] for the logits of a chunk."""
    num_classes, sizes = len(factors.weight), sizes_of(factors, len(factors.hidden))
    shape = (sizes.rows, sizes.stride)
    return fresh(shape, dtype=factors.logits_dtype, device=factors.device, zero=False)[:, :num_classes]


@head_chunk_op.register_fake
def _(
    hidden,
    weight,
    bias,
    *rest,
    backend=None,
    skip_ignored=None,
    narrow_logits=False,
):
    *arguments, start, stop = rest
    factors = _of_chunk((hidden, weight, bias), start, stop, skip_ignored, narrow_logits)
    some = Sweep(*arguments).of(slice(start, stop))
    num_classes, sizes = len(weight), sizes_of(factors, stop - start)
    logits = hidden.new_empty((sizes.rows, sizes.stride), dtype=factors.logits_dtype)[:, :num_classes]
    return [*some.blank(factors.wide, hidden.device), logits]


@head_chunk_grad_op.register_fake
def _(hidden, weight, bias, *rest, **named):
    start, stop, needed = rest[8], rest[9], rest[12]
    wide = accumulation_dtype(weight.dtype)
    of_hidden = hidden.new_empty((stop - start, hidden.shape[-1]) if needed[0] else 0)
    return of_hidden, hidden.new_empty(len(weight) if needed[2] else 0, dtype=wide if needed[2] else None)
