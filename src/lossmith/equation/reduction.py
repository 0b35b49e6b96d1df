"""How per-token values become one number: one denominator, and the library's one division."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from lossmith.core.former_names import REDUCTIONS
from lossmith.options import kind_of, option

Reduction = Annotated[
    Literal["mean", "token_mean", "sequence_mean", "sum", "none"],
    option("how tokens are averaged", instead=REDUCTIONS),
]
Empty = Annotated[Literal["zero", "nan"], option("what a batch without a supervised token gives")]
Denominator = Annotated[
    Tensor | float,
    option(
        "supervised tokens (or samples) over all micro-batches and ranks",
        low=0,
        shape="[]",
        dtype="real",
        advice="Leave it out to divide by this batch's own number",
    ),
]


def check_reduction(reduction: str, empty: str = "zero") -> None:
    """
    Raises:
        ValueError: an unknown reduction or treatment of an empty batch.
    """
    _REDUCTION.check(reduction)
    _EMPTY.check(empty)


_REDUCTION, _EMPTY = kind_of(Reduction, "reduction"), kind_of(Empty, "empty")
_DENOMINATOR = kind_of(Denominator | None, "denominator")


def token_scale(
    valid: Tensor,
    reduction: Reduction,
    *,
    denominator: Denominator | None = None,
    weight: Tensor | None = None,
    empty: Empty = "zero",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What each token's value is multiplied by before the sum: M * factor / D.

    | reduction | factor on sample b's tokens | D, unless the caller's ``denominator`` |
    | --- | --- | --- |
    | ``mean`` = ``token_mean`` | 1 | supervised tokens |
    | ``sequence_mean`` | 1 / (supervised tokens of b) | samples with a supervised token |
    | ``sum``, ``none`` | 1 | 1 |

    Args:
        valid: [B, T] bool, the supervised tokens M.
        reduction: see the table.
        denominator: the number of supervised tokens (or samples) over all micro-batches and
            ranks, when a batch is split; nothing else is divided by then.
        weight: [B, T] what a token counts for in D (class weights); 1 where absent.
        empty: ``zero`` gives 0 where D is 0, ``nan`` gives NaN as PyTorch does.
        dtype: of the result.

    Returns:
        [B, T] factors; 0 at tokens that are not supervised.
    """
    denominator = _DENOMINATOR.check(denominator)
    count = _counts(valid, weight, dtype)
    factor = valid.to(dtype)
    if reduction == "sequence_mean":
        per_row = count.sum(-1, keepdim=True)
        factor = factor / torch.where(per_row == 0, 1.0, per_row)
    if denominator is None and reduction in ("sum", "none"):
        return factor
    own = _own_denominator(count, reduction)
    divisor = own if denominator is None else _as_scalar(denominator, own)
    return factor / torch.where(divisor == 0, 1.0 if empty == "zero" else torch.nan, divisor)


def own_denominator(
    valid: Tensor,
    reduction: Reduction,
    *,
    weight: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What a batch alone is divided by: its supervised tokens, or its samples that have one.

    Args:
        valid, reduction, weight, dtype: as for :func:`token_scale`.
    """
    return _own_denominator(_counts(valid, weight, dtype), reduction)


def scalar_share(own: Tensor, denominator: Denominator | None) -> Tensor | float:
    """What a scalar of the whole batch is multiplied by: its part of the caller's denominator, or 1.

    Args:
        own: what this batch alone would be divided by.
        denominator: the caller's, over all micro-batches and ranks.
    """
    if denominator is None:
        return 1.0
    whole = _as_scalar(denominator, own)
    return own / torch.where(whole == 0, 1.0, whole)


def _counts(valid: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    return valid.to(dtype) if weight is None else torch.where(valid, weight, 0.0).to(dtype)


def _own_denominator(count: Tensor, reduction: Reduction) -> Tensor:
    return (count.sum(-1) > 0).sum().to(count.dtype) if reduction == "sequence_mean" else count.sum()


def _as_scalar(denominator: Denominator, like: Tensor) -> Tensor:
    if isinstance(denominator, Tensor):
        return denominator.detach().to(like.device, like.dtype).reshape(())
    return torch.full_like(like, denominator)
