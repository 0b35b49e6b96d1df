"""Matrix products with fp32 sums, compiled: calls ``products_native.cpp``.

MKL, behind ``torch.mm``, leaves AVX-512 unused on processors that are not Intel's, and has no product of
bf16 that is fp32 and fast. On Intel's it keeps the products of fp32, and everywhere small and thin ones.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.native.build import library

# Multiply-adds from which a product is worth the call, and rows or columns: it is made of 12 x 32 at a time.
WORTH_IT = 2**20
THIN = 24


class _Factor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("across", "along", "is_bf16")),
    ]


class _Product(ctypes.Structure):
    _fields_ = [
        ("a", _Factor),
        ("b", _Factor),
        ("c", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("c_stride", "M", "N", "K", "is_sum", "num_threads")),
    ]


def takes(a: Tensor, b: Tensor, into: Tensor) -> bool:
    """Whether into [M, N] <- a [M, K] @ b [K, N] is computed here."""
    return (
        into.device.type == "cpu"
        and into.dtype == torch.float32
        and into.stride(1) == 1
        and all(factor.dtype in (torch.float32, torch.bfloat16) for factor in (a, b))
        and all(1 in factor.stride() for factor in (a, b))
        and min(into.shape) >= THIN
        and a.shape[0] * a.shape[1] * b.shape[1] >= WORTH_IT
        and is_for(both_are_bf16=a.dtype == b.dtype == torch.bfloat16)
    )


def is_for(*, both_are_bf16: bool) -> bool:
    """Whether such factors are multiplied here: this machine has AVX-512, a C++ compiler and OpenMP, and for
    fp32 a processor on which MKL leaves AVX-512 alone."""
    compiled: Any = library()
    return hasattr(compiled, "lossmith_product") and bool(compiled.lossmith_is_for(both_are_bf16))


def product(a: Tensor, b: Tensor, *, into: Tensor, is_sum: bool) -> None:
    """into <- a @ b, or with ``is_sum`` into + a @ b.

    Args:
        a, b: [M, K] and [K, N], fp32 or bf16, contiguous along one side.
        into: [M, N] fp32, rows contiguous.

    Raises:
        ValueError: the shapes do not match.
        MemoryError: no memory for a few megabytes of packed factors.
    """
    if a.shape[1] != b.shape[0] or into.shape != (a.shape[0], b.shape[1]):
        raise ValueError(f"cannot put {list(a.shape)} @ {list(b.shape)} into {list(into.shape)}")
    compiled: Any = library()
    a, b = a.resolve_neg(), b.resolve_neg()  # a lazy negation is not in memory
    given = _Product(
        a=_factor(a),
        b=_factor(b.t()),
        c=into.data_ptr(),
        c_stride=into.stride(0),
        M=a.shape[0],
        N=b.shape[1],
        K=a.shape[1],
        is_sum=is_sum,
        num_threads=torch.get_num_threads(),
    )
    if not compiled.lossmith_product(ctypes.byref(given)):
        raise MemoryError("no memory for the packed factors of a matrix product")


def _factor(x: Tensor) -> _Factor:
    """[M or N, K]"""
    return _Factor(x.data_ptr(), x.stride(0), x.stride(1), x.dtype == torch.bfloat16)
