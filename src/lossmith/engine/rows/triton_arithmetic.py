# pyright: reportMissingImports=false
"""What the Triton kernels of rows are made of: numbers, and functions of one element."""

import triton
import triton.language as tl

# As in torch_rows.
MASKED = tl.constexpr(-1e30)
UNDERFLOW = tl.constexpr(-1e4)
WRONG_EPS = tl.constexpr(1e-8)
# What a thread loads at once.
VECTOR_BYTES = tl.constexpr(16)


@triton.jit
def beyond_a_vector(row):
    """How many elements past a 16-byte boundary a row begins.

    A row of 50257 halves begins anywhere, and tiles that begin with it, under a mask ``columns < V``, are
    loaded two bytes at a time. Tiles that begin at the boundary before it are loaded sixteen bytes at a
    time; only those that hold other rows' elements, the first and the last, need a mask.
    """
    itemsize: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    return ((row.to(tl.int64) % VECTOR_BYTES) // itemsize).to(tl.int32)


@triton.jit
def no_less(x, least):
    """max(x, least), but a NaN stays one."""
    return tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def capped(z, cap):
    """c tanh(z / c), to the last digits also where it is nearly z."""
    x = z * (1.0 / cap)
    size = tl.abs(x)
    square = x * x
    # the polynomial of Cephes for small arguments, where 1 - 2 / (exp(2 x) + 1) would cancel
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    small = series * square * x + x
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return cap * tl.where(size < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def slope_of_cap(z, cap):
    """sech^2(z / c), which keeps its digits where 1 - tanh^2(z / c) has none left."""
    shrunk = tl.exp(-2.0 * tl.abs(z * (1.0 / cap)))
    return 4.0 * shrunk / ((1.0 + shrunk) * (1.0 + shrunk))


@triton.jit
def scaled(z, temperature):
    """Over the temperature, rounded once, in both directions alike; None for 1."""
    if temperature is not None:
        z = tl.div_rn(z, tl.load(temperature) + tl.zeros_like(z))
    return z


@triton.jit
def log1p(x):
    """log(1 + x), to the last digits for x near 0."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def tile_of_row(
    start, first, columns, offsets, target, num_classes, softcap, CAPPED: tl.constexpr, SIZE: tl.constexpr
):
    """A tile of logits in fp32, capped; -inf at the target and where there is no class."""
    given = (columns >= 0) & (columns < num_classes) & (columns != target)
    is_whole = (first >= 0) & (first + SIZE <= num_classes)
    if is_whole & ((target < first) | (target >= first + SIZE)):
        z = tl.load(start + offsets)
    else:
        z = tl.load(start + offsets, mask=given, other=float("-inf"))
    z = z.to(tl.float32)
    if CAPPED:
        z = tl.where(given, capped(z, softcap), float("-inf"))
    return z
