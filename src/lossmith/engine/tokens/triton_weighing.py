# Triton's language is no Python to a type checker.
# pyright: reportMissingImports=false, reportInvalidTypeForm=false, reportGeneralTypeIssues=false
"""The Triton kernels of weighed sums, and back. Every sum is one program's: each run has the same bits."""

import triton
import triton.language as tl


# Nothing is specialised on.
@triton.jit(
    do_not_specialize=["values", "scale", "weight", "shares", "sums", "total", "num_terms", "num_rows"]
)
def weigh(
    values,
    scale,
    weight,
    shares,
    sums,
    total,
    num_terms: tl.int32,
    num_rows: tl.int64,
    SIZE: tl.constexpr,
):
    """A program a term: its values [K, N] times their scale, and their sum, in double precision. Of several
    terms one program more has the total, from all values again, so that it need not wait for the others."""
    program = tl.program_id(0)
    is_own = program < num_terms
    first = tl.where(is_own, program, 0).to(tl.int64)
    found = tl.zeros([SIZE], tl.float64)
    for term in range(first, tl.where(is_own, first + 1, num_terms).to(tl.int64)):
        for start in range(0, num_rows, SIZE):
            at = start + tl.arange(0, SIZE)
            mask = at < num_rows
            factor = tl.load(scale + at, mask=mask, other=0.0)
            value = tl.load(values + term * num_rows + at, mask=mask, other=0.0)
            share = tl.where(factor == 0, 0.0, value) * factor
            tl.store(shares + term * num_rows + at, share, mask=mask & is_own)
            if weight is not None:
                again = tl.load(weight + at, mask=mask, other=0.0)
                share = tl.where(again == 0, 0.0, share) * again
            found += share.to(tl.float64)
    whole = tl.sum(found, 0)
    tl.store(sums + program, whole, mask=is_own)
    tl.store(total, whole, mask=(num_terms == 1) | (program == num_terms))


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
