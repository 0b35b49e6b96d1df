"""How per-token values become one number: one denominator, and the library's one division."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from lossmith.core.former_names import REDUCTIONS
from lossmith.engine.checks import check_ids
from lossmith.engine.tokens import native_targets
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


def supervised(
    targets: Tensor,
    ignore_index: int,
    reduction: Reduction,
    *,
    num_classes: int | None = None,
    denominator: Denominator | None = None,
    weight: Tensor | None = None,
    empty: Empty = "zero",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the targets [..., T] are, and what :func:`token_scale` returns of them.

    Raises:
        ValueError: one of them is none of ``num_classes``, if given.
    """
    if denominator is None and weight is None and native_targets.takes(targets, dtype):
        most = torch.iinfo(torch.int64).max if num_classes is None else num_classes
        *found, is_outside = native_targets.settle(targets, most, ignore_index, reduction, empty, dtype)
        if is_outside and num_classes is not None:
            check_ids("targets", targets, num_classes, exempt=ignore_index, exempt_name="ignore_index")
        valid, scale, own = found
        return valid, scale, own
    if num_classes is not None:
        check_ids("targets", targets, num_classes, exempt=ignore_index, exempt_name="ignore_index")
    valid = targets != ignore_index
    scale, own = token_scale(
        valid, reduction, denominator=denominator, weight=weight, empty=empty, dtype=dtype
    )
    return valid, scale, own


def token_scale(
    valid: Tensor,
    reduction: Reduction,
    *,
    denominator: Denominator | None = None,
    weight: Tensor | None = None,
    empty: Empty = "zero",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """What each token's value is multiplied by before the sum, M * factor / D, and the batch's own D.

    | reduction | factor on sample b's tokens | D, unless the caller's ``denominator`` |
    | --- | --- | --- |
    | ``mean`` = ``token_mean`` | 1 | supervised tokens |
    | ``sequence_mean`` | 1 / (supervised tokens of b) | samples with a supervised token |
    | ``sum``, ``none`` | 1 | 1 |

    Args:
        valid: [..., T] bool, the supervised tokens M; a sample is a row of the last dimension.
        reduction: see the table.
        denominator: the number of supervised tokens (or samples) over all micro-batches and
            ranks, when a batch is split; nothing else is divided by then.
        weight: [..., T] what a token counts for in D (class weights); 1 where absent.
        empty: ``zero`` gives 0 where D is 0, ``nan`` gives NaN as PyTorch does.
        dtype: of the result.

    Returns:
        [..., T] factors, 0 at tokens that are not supervised; and what this batch alone would be divided by,
        its supervised tokens or its samples that have one (0-dimensional).
    """
    denominator = _DENOMINATOR.check(denominator)
    counts = valid if weight is None else weight.masked_fill(~valid, 0.0)
    factor: Tensor = valid
    if reduction == "sequence_mean":
        per_row = counts.sum(-1, keepdim=True, dtype=dtype)
        own = (per_row > 0).sum(dtype=dtype)
        factor = valid / _not_zero(per_row)
    else:
        own = counts.sum(dtype=dtype)
    if denominator is None and reduction in ("sum", "none"):
        return factor.to(dtype), own
    divisor = own if denominator is None else _as_scalar(denominator, own)
    if divisor is own and empty == "zero" and (weight is None or reduction == "sequence_mean"):
        return factor / own.clamp(min=1), own  # a number of tokens, or of samples: one step less
    return factor / _not_zero(divisor, 1.0 if empty == "zero" else torch.nan), own


def scaled(values: Tensor, scale: Tensor) -> Tensor:
    """Values times their tokens' scale; 0 where that is 0, whatever the value."""
    return values.masked_fill(scale == 0, 0.0) * scale


def scalar_share(own: Tensor, denominator: Denominator | None) -> Tensor | float:
    """What a scalar of the whole batch is multiplied by: its part of the caller's denominator, or 1.

    Args:
        own: what this batch alone would be divided by.
        denominator: the caller's, over all micro-batches and ranks.
    """
    return 1.0 if denominator is None else own / _not_zero(_as_scalar(denominator, own))


def _not_zero(divisor: Tensor, instead: float = 1.0) -> Tensor:
    return divisor.masked_fill(divisor == 0, instead)


def _as_scalar(denominator: Denominator, like: Tensor) -> Tensor:
    if isinstance(denominator, Tensor):
        return denominator.detach().to(like.device, like.dtype).reshape(())
    return torch.full_like(like, denominator)
