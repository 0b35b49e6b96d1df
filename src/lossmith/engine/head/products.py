"""Matrix products of a linear head, with fp32 sums: compiled ones, or PyTorch's."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmith.engine.head import native_products

# PyTorch's products on a CPU are made of pieces in which the factors have this many elements: that much
# stays in the cache. Shorter ones than this leave the matrix library nothing to do.
PIECE_ELEMENTS = 2**21
SHORTEST_PIECE = 256

HALVES = (torch.bfloat16, torch.float16)
# PyTorch's products of halves with an fp32 result, and those that add it to an fp32 matrix (2.9 wants halves
# there, too): the first versions in which CUDA has them. ROCm has them only in some builds.
WIDE_RESULTS, WIDE_SUMS = (2, 8), (2, 11)
ON_META = (2, 13)  # and both of meta tensors
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
OLDEST_WIDE = (8, 0)  # the processors that have them


def wide_product(a: Tensor, b: Tensor, *, into: Tensor, is_sum: bool = False) -> None:
    """into <- a @ b, or with ``is_sum`` into + a @ b, in the dtype of ``into``, which is the factors' own or
    wider; summed in fp32 at least, and rounded once."""
    if native_products.takes(a, b, into):
        native_products.product(a, b, into=into, is_sum=is_sum)
    elif a.dtype == b.dtype == into.dtype and (into.device.type != "cpu" or into.dtype in HALVES):
        torch.addmm(into, a, b, out=into) if is_sum else torch.mm(a, b, out=into)
    elif into.device.type == "cpu":
        in_pieces(a, b, into, is_sum)
    elif a.dtype == b.dtype:
        _of_halves(a, b, into, is_sum)
    else:
        wide = into.dtype
        torch.addmm(into, a.to(wide), b.to(wide), beta=int(is_sum), out=into)


def multiplies_halves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether factors of this dtype, of half precision, are multiplied as they are; elsewhere they are
    widened first, and it is no use to round the other one."""
    if device.type == "cpu":
        if dtype != torch.bfloat16 or torch.compiler.is_compiling():  # only chunks are chosen
            return False
        return native_products.is_for(both_are_bf16=True)
    return dtype in HALVES


def _of_halves(a: Tensor, b: Tensor, into: Tensor, is_sum: bool) -> None:
    """The product of halves on an accelerator. Without products that have fp32 results, it is rounded to a
    half and then widened: halves that are widened first would be copied for every chunk, and multiplied many
    times more slowly."""
    wide = into.dtype
    has_results = has_wide_results(into.device)
    if has_results and not is_sum:
        torch.mm(a, b, out_dtype=wide, out=into)
    elif has_results and VERSION >= WIDE_SUMS:
        torch.addmm(into, a, b, out_dtype=wide, out=into)
    else:
        product = torch.mm(a, b, out_dtype=wide) if has_results else torch.mm(a, b)
        into.add_(product) if is_sum else into.copy_(product)


def has_wide_results(device: torch.device) -> bool:
    """Whether products of halves have fp32 results here. Meta tensors, which have no arithmetic, count as a
    GPU that has them."""
    if device.type == "meta":
        return VERSION >= ON_META
    if device.type != "cuda" or torch.version.hip is not None or VERSION < WIDE_RESULTS:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST_WIDE


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
