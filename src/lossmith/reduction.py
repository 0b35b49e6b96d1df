"""How per-token values become one number: one denominator, and the library's one division."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "token_mean", "sequence_mean", "sum", "none"]
Empty = Literal["zero", "nan"]
Denominator = Tensor | float | int


def check_reduction(reduction: str, empty: str = "zero") -> None:
    """
    Raises:
        ValueError: an unknown reduction or treatment of an empty batch.
    """
    for name, value, known in (("reduction", reduction, Reduction), ("empty", empty, Empty)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(known)))}; got {value!r}")


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
    count = valid.to(dtype) if weight is None else torch.where(valid, weight, 0.0).to(dtype)
    factor = valid.to(dtype)
    if reduction == "sequence_mean":
        per_row = count.sum(-1, keepdim=True)
        factor = factor / torch.where(per_row == 0, 1.0, per_row)
        own = (per_row > 0).sum().to(dtype)
    else:
        own = count.sum()
    if denominator is None:
        divisor = own if reduction in ("mean", "token_mean", "sequence_mean") else torch.ones_like(own)
    else:
        divisor = torch.as_tensor(denominator, dtype=dtype, device=valid.device)
    return factor / torch.where(divisor == 0, 1.0 if empty == "zero" else torch.nan, divisor)
