"""The terms of an objective, each token times its share, as sums: one step forward, and one back."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.checks import refuse_batched
from lossmith.engine.differentiable_once import once
from lossmith.engine.sweep import Maybe
from lossmith.engine.tokens.arithmetic import arithmetic_for, is_one_step
from lossmith.engine.watched import is_watched
from lossmith.equation.reduction import scaled


def weighed_sums(
    values: Sequence[Tensor] | Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over tokens of K terms, 0 where a factor is 0, whatever the value.

        sum_n weight_n scale_n values_kn

    Args:
        values: K tensors [N], or one [K, N].
        scale: [N], without a gradient.
        weight: [N] without a gradient, or None for 1.
        backend: whose arithmetic; None for the first that takes the numbers.

    Returns:
        The sum of all; the sums [K]; and the shares [K, N], scale times value, without a gradient.
    """
    each, lead = ([values], 1) if isinstance(values, Tensor) else (list(values), 0)
    kinds = [(one.dtype, one.shape[lead:]) for one in each]
    if weight is not None:
        kinds.append((weight.dtype, weight.shape))
    is_alike = all(kind == (scale.dtype, scale.shape) for kind in kinds)
    if is_alike and is_one_step(scale, backend):
        return _Weighed.apply(backend, scale, weight, *each)
    shares = scaled(together(values), scale)
    sums = (shares if weight is None else scaled(shares, weight)).sum(-1)
    return sums.sum(), sums, shares.detach()


def together(values: Sequence[Tensor] | Tensor) -> Tensor:
    """[K, N]: K tensors [N] as one, without a copy of a single one."""
    if isinstance(values, Tensor):
        return values
    return torch.stack(list(values)) if len(values) > 1 else values[0].unsqueeze(0)


def _num_terms(values: Sequence[Tensor]) -> int:
    """K, of K tensors [N] or of a single one [K, N]."""
    return len(values[0]) if values[0].dim() > 1 else len(values)


class _Weighed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str | None, scale: Tensor, weight: Tensor | None, *values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.backend, ctx.is_one, ctx.num_terms = backend, values[0].dim() > 1, _num_terms(values)
        ctx.save_for_backward(scale, weight)
        ctx.set_materialize_grads(False)
        total, sums, shares = (weigh_op if is_watched() else _weigh)(values, scale, weight, backend)
        ctx.mark_non_differentiable(shares)
        return total, sums, shares

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_batched(*upstream)
        of_total, of_sums, _ = upstream
        scale, weight = ctx.saved_tensors
        run = weigh_back_op if is_watched() else _weigh_back
        with torch.no_grad():
            gradient = run(scale, weight, of_sums, of_total, ctx.num_terms, ctx.backend)
        depend_on: Maybe = (of_sums, of_total)
        return (None, None, None, *once([gradient] if ctx.is_one else gradient.unbind(), depend_on))


def _weigh(
    values: Sequence[Tensor], scale: Tensor, weight: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    shares = scale.new_empty(_num_terms(values), scale.numel())
    sums, total = arithmetic_for(scale, backend).weigh(values, scale, weight, shares)
    return total, sums, shares


def _weigh_back(
    scale: Tensor,
    weight: Tensor | None,
    of_sums: Tensor | None,
    of_total: Tensor | None,
    num_terms: int,
    backend: str | None,
) -> Tensor:
    gradient = scale.new_empty(num_terms, scale.numel())
    arithmetic_for(scale, backend).weigh_back(scale, weight, of_sums, of_total, gradient)
    return gradient


# ── what dispatch modes see ───────────────────────────────────────────────────────────────────────────


@torch.library.custom_op("lossmith::weigh", mutates_args=())
def weigh_op(
    values: typing.Sequence[Tensor], scale: Tensor, weight: Tensor | None, backend: str | None
) -> typing.Tuple[Tensor, Tensor, Tensor]:  # noqa: UP006, as in lossmith.engine.rows.operators
    return _weigh(values, scale, weight, backend)


@torch.library.custom_op("lossmith::weigh_back", mutates_args=())
def weigh_back_op(
    scale: Tensor,
    weight: Tensor | None,
    of_sums: Tensor | None,
    of_total: Tensor | None,
    num_terms: int,
    backend: str | None,
) -> Tensor:
    return _weigh_back(scale, weight, of_sums, of_total, num_terms, backend)


@weigh_op.register_fake
def _(values, scale, weight, backend):
    num_terms = _num_terms(values)
    return scale.new_empty(()), scale.new_empty(num_terms), scale.new_empty(num_terms, scale.numel())


@weigh_back_op.register_fake
def _(scale, weight, of_sums, of_total, num_terms, backend):
    return scale.new_empty(num_terms, scale.numel())
