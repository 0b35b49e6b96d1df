"""Matrix products of a linear head, in fp32 at least, by whoever is fastest at them."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmith.engine import products_native

# PyTorch's products on a CPU are made of pieces in which the factors have this many elements: that much
# stays in the cache.
PIECE_ELEMENTS = 2**21


def wide_product(a: Tensor, b: Tensor, *, into: Tensor, is_sum: bool = False) -> None:
    """into <- a @ b, or with ``is_sum`` into + a @ b, in the dtype of ``into``: at least fp32, whatever the
    factors are, and rounded nowhere before."""
    wide = into.dtype
    if products_native.takes(a, b, into):
        products_native.product(a, b, into=into, is_sum=is_sum)
    elif a.dtype == b.dtype != wide and into.device.type == "cuda":
        product = torch.mm(a, b, out_dtype=wide)  # fp32 out of half-precision units
        into.add_(product) if is_sum else into.copy_(product)
    elif into.device.type == "cpu":
        in_pieces(a, b, into, is_sum)
    else:
        torch.addmm(into, a.to(wide), b.to(wide), beta=int(is_sum), out=into)


def multiplies_halves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether factors of this dtype are multiplied as they are, rather than widened first."""
    if device.type == "cpu":
        return dtype == torch.bfloat16 and products_native.multiplies_bf16()
    return dtype != torch.float64


def in_pieces(a: Tensor, b: Tensor, into: Tensor, is_sum: bool) -> None:
    """The product in pieces along its longest dimension."""
    num_rows, depth, num_columns = *a.shape, b.shape[1]
    longest = max(num_rows, depth, num_columns)
    size = max(256, PIECE_ELEMENTS // sorted((num_rows, depth, num_columns))[1])
    wide = into.dtype
    for start in range(0, longest, size):
        piece = slice(start, start + size)
        x, y, out, adds = a, b, into, is_sum
        if longest == num_columns:
            y, out = b[:, piece], into[:, piece]
        elif longest == num_rows:
            x, out = a[piece], into[piece]
        else:
            x, y, adds = a[:, piece], b[piece], is_sum or start > 0
        torch.addmm(out, x.to(wide), y.to(wide), beta=int(adds), out=out)
