# Triton's language is no Python to a type checker.
# pyright: reportMissingImports=false, reportInvalidTypeForm=false, reportGeneralTypeIssues=false
"""The Triton kernel that draws an id of each row, in one pass: the largest z + Gumbel noise."""

import triton
import triton.language as tl

from lossmith.engine.rows.triton_arithmetic import beyond_a_vector, tile_of_row


# Nothing is specialised on: another V, softcap, stride or address is the same kernel.
@triton.jit(
    do_not_specialize=[
        "logits", "inner", "outer_stride", "inner_stride", "num_classes", "seeds", "softcap", "ids",
    ]
)  # fmt: skip
def sample_of_row(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, num_classes: tl.int32,
    seeds, softcap: tl.float32, ids, CAPPED: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """An id of row ``i``, at logits + (i // inner) outer_stride + (i % inner) inner_stride, from its seed."""
    SIZE: tl.constexpr = LANES * WIDTH
    row = tl.program_id(0).to(tl.int64)
    seed = tl.load(seeds + row)
    begin = logits + (row // inner) * outer_stride + (row % inner) * inner_stride
    shift = beyond_a_vector(begin)
    start = tl.multiple_of(begin - shift, 16)
    offsets = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    best = tl.full([LANES, WIDTH], float("-inf"), tl.float32)
    found = tl.full([LANES, WIDTH], 2147483647, tl.int32)
    for tile in range(0, tl.cdiv(num_classes + shift, SIZE)):
        first = tile * SIZE - shift
        columns = first + offsets
        z = tile_of_row(start + tile * SIZE, first, columns, offsets, -1, num_classes, softcap, CAPPED, SIZE)
        # an exponential's small values, which win, have all their digits
        share = (
            tl.randint(seed, columns).to(tl.uint32, bitcast=True).to(tl.float32) + 0.5
        ) * 2.3283064365386963e-10
        # log1p would cost more than the pass: a cubic is exact to the last digits below 1/64
        small = share * (1.0 + share * (0.5 + share * (1.0 / 3.0)))
        noise = tl.where(share < 0.015625, small, -tl.log(1.0 - share))
        key = z - tl.log(noise)
        is_more = key > best
        best = tl.where(is_more, key, best)
        found = tl.where(is_more, columns, found)
    most = tl.max(tl.max(best, axis=1), axis=0)
    drawn = tl.min(tl.min(tl.where(best == most, found, 2147483647), axis=1), axis=0)
    tl.store(ids + row, tl.where(drawn < num_classes, drawn, 0).to(tl.int64))
