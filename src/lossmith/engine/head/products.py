"""Matrix products of a linear head, in fp32 at least: compiled ones, or PyTorch's."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmith.engine.head import native_products

# PyTorch's products on a CPU are made of pieces in which the factors have this many elements: that much
# stays in the cache. Shorter ones than this leave the matrix library nothing to do.
PIECE_ELEMENTS = 2**21
SHORTEST_PIECE = 256

# torch.mm(out_dtype=), of CUDA alone
HAS_OUT_DTYPE = torch.version.cuda is not None and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


def wide_product(a: Tensor, b: Tensor, *, into: Tensor, is_sum: bool = False) -> None:
    """into <- a @ b, or with ``is_sum`` into + a @ b, in the dtype of ``into``: at least fp32, whatever the
    factors are, and rounded nowhere before."""
    wide = into.dtype
    if native_products.takes(a, b, into):
        native_products.product(a, b, into=into, is_sum=is_sum)
    elif into.device.type == "cpu":
        in_pieces(a, b, into, is_sum)
    elif a.dtype == b.dtype != wide and into.device.type == "cuda" and HAS_OUT_DTYPE:
        product = torch.mm(a, b, out_dtype=wide)  # fp32 out of half-precision units
        into.add_(product) if is_sum else into.copy_(product)
    else:
        torch.addmm(into, a.to(wide), b.to(wide), beta=int(is_sum), out=into)


def multiplies_halves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether factors of this dtype, of half precision, are multiplied as they are; elsewhere they are
    widened first, and it is no use to round the other one."""
    if device.type == "cpu":
        return dtype == torch.bfloat16 and native_products.is_for(both_are_bf16=True)
    return dtype in (torch.bfloat16, torch.float16)


def in_pieces(a: Tensor, b: Tensor, into: Tensor, is_sum: bool) -> None:
    """The product by PyTorch, in pieces along its longest dimension."""
    num_rows, depth, num_columns = *a.shape, b.shape[1]
    longest = max(num_rows, depth, num_columns)
    size = max(SHORTEST_PIECE, PIECE_ELEMENTS // sorted((num_rows, depth, num_columns))[1])
    wide = into.dtype
    if longest == num_columns:
        a = a.to(wide)
    elif longest == num_rows:
        b = b.to(wide)
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
