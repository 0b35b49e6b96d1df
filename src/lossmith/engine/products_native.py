"""Matrix products with fp32 sums, compiled: calls ``products_native.cpp``.

MKL, behind ``torch.mm``, leaves AVX-512 unused on processors that are not Intel's, and has no product of
bf16 that is fp32 and fast. It stays in charge everywhere else, and of small products.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lossmith.engine.native import library

# Multiply-adds from which a product is worth the call.
WORTH_IT = 2**20


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
        and a.shape[0] * a.shape[1] * b.shape[1] >= WORTH_IT
        and is_there()
    )


def is_there() -> bool:
    """Whether this machine has what it takes: AVX-512, a compiler, and PyTorch's own threads."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(library(), "lossmith_product")


def multiplies_bf16() -> bool:
    """Whether factors of bf16 are multiplied as they are, at twice the speed of fp32."""
    compiled = library()
    return is_there() and compiled is not None and bool(compiled.lossmith_multiplies_pairs())


def product(a: Tensor, b: Tensor, *, into: Tensor, is_sum: bool) -> None:
    """into <- a @ b, or with ``is_sum`` into + a @ b.

    Args:
        a, b: [M, K] and [K, N], fp32 or bf16, contiguous along one side.
        into: [M, N] fp32, rows contiguous.
    """
    compiled = library()
    assert compiled is not None
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
    compiled.lossmith_product(ctypes.byref(given))


def _factor(x: Tensor) -> _Factor:
    """[M or N, K]"""
    return _Factor(x.data_ptr(), x.stride(0), x.stride(1), x.dtype == torch.bfloat16)
