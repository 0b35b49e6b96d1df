"""Matrix products of a linear head: in fp32 at least, by the library that is fastest at them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Multiply-adds below which preparing oneDNN's kernels for a new shape costs more than they save.
WORTH_ONEDNN = 2**26


def wide_product(a: Tensor, b: Tensor, *, into: Tensor, is_sum: bool = False) -> None:
    """into <- a @ b, or with ``is_sum`` into + a @ b, in the dtype of ``into``: at least fp32, whatever the
    factors are, and rounded nowhere before."""
    wide = into.dtype
    if a.dtype == b.dtype != wide and into.device.type == "cuda":
        product = torch.mm(a, b, out_dtype=wide)  # fp32 out of half-precision units
    elif _is_for_onednn(a, b, into):
        product = torch.ops.mkldnn._linear_pointwise(a.to(wide), b.to(wide).t(), None, "none", [], "")
    else:
        torch.addmm(into, a.to(wide), b.to(wide), beta=int(is_sum), out=into)
        return
    into.add_(product) if is_sum else into.copy_(product)


def _is_for_onednn(a: Tensor, b: Tensor, into: Tensor) -> bool:
    """Whether oneDNN makes this product sooner than MKL, which ``torch.mm`` calls and which leaves the wide
    vectors of processors that are not Intel's alone. A factor that lies across it has to turn round first."""
    return (
        into.device.type == "cpu"
        and into.dtype == torch.float32
        and a.stride(1) == 1
        and a.shape[0] * a.shape[1] * b.shape[1] >= WORTH_ONEDNN
        and has_onednn()
    )


@functools.cache
def has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
