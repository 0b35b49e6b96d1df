# Triton's language is no Python to a type checker.
# pyright: reportMissingImports=false, reportInvalidTypeForm=false, reportGeneralTypeIssues=false
"""The Triton kernels of weighed sums, and back. Every sum is one program's: each run has the same bits."""

import triton
import triton.language as tl


# Nothing is specialised on.
@triton.jit(do_not_specialize=["values", "scale", "weight", "shares", "sums", "total", "num_rows"])
def weigh(
    values,
    scale,
    weight,
    shares,
    sums,
    total,
    num_rows: tl.int64,
    SIZE: tl.constexpr,
):
    """A program a term: its values [K, N] times their scale, and their sum, in double precision; which is the
    total where there is one term."""
    term = tl.program_id(0).to(tl.int64)
    found = tl.zeros([SIZE], tl.float64)
    for start in range(0, num_rows, SIZE):
        at = start + tl.arange(0, SIZE)
        mask = at < num_rows
        factor = tl.load(scale + at, mask=mask, other=0.0)
        value = tl.load(values + term * num_rows + at, mask=mask, other=0.0)
        share = tl.where(factor == 0, 0.0, value) * factor
        tl.store(shares + term * num_rows + at, share, mask=mask)
        if weight is not None:
            again = tl.load(weight + at, mask=mask, other=0.0)
            share = tl.where(again == 0, 0.0, share) * again
        found += share.to(tl.float64)
    tl.store(sums + term, tl.sum(found, 0))
    if total is not None:
        tl.store(total, tl.sum(found, 0))


@triton.jit(do_not_specialize=["scale", "weight", "g_sums", "g_total", "gradient", "num_rows", "num_blocks"])
def weigh_back(
    scale,
    weight,
    g_sums,
    g_total,
    gradient,
    num_rows: tl.int64,
    num_blocks: tl.int32,
    SIZE: tl.constexpr,
):
    """The gradients [K, N] of the values, a program for some of a term's."""
    program = tl.program_id(0)
    term = (program // num_blocks).to(tl.int64)
    at = (program % num_blocks).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = at < num_rows
    factor = tl.load(scale + at, mask=mask, other=0.0)
    given = tl.zeros([SIZE], factor.dtype)
    if g_total is not None:
        given += tl.load(g_total)
    if g_sums is not None:
        given += tl.load(g_sums + term)
    if weight is not None:
        again = tl.load(weight + at, mask=mask, other=0.0)
        given = tl.where(again == 0, 0.0, given) * again
    tl.store(gradient + term * num_rows + at, tl.where(factor == 0, 0.0, given) * factor, mask=mask)
