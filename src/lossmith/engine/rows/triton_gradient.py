# Triton's language is no Python to a type checker.
# pyright: reportMissingImports=false, reportInvalidTypeForm=false, reportGeneralTypeIssues=false
"""The Triton kernels from the gradients of raw statistics to that of the logits: the formula of ``row_grad``.

``gradient_of_tile`` reads a tile of a row and writes its gradient, which may lie in the same memory.
Candidates, of which any number may name any column, are apart: their columns' gradients are computed first,
each from all that name it, and put into place last. No two programs add to one number: every run has the
same bits.
"""

import triton
import triton.language as tl

from lossmith.engine.rows.triton_arithmetic import (
    MASKED,
    UNDERFLOW,
    VECTOR_BYTES,
    beyond_a_vector,
    capped,
    no_less,
    scaled,
    slope_of_cap,
)


@triton.jit
def _given(gradient, row, temperature):
    """A statistic's gradient, over the temperature that the logits are divided by."""
    return scaled(tl.load(gradient + row), temperature)


@triton.jit
def _is_wanted(row, g_target, g_log_sum, g_entropy, g_centered, g_top, g_rest):
    """Whether a row has a gradient from one view's statistics. A NaN is one."""
    is_wanted = row < 0
    if g_target is not None:
        is_wanted = is_wanted | (tl.load(g_target + row) != 0)
    if g_log_sum is not None:
        is_wanted = is_wanted | (tl.load(g_log_sum + row) != 0)
    if g_entropy is not None:
        is_wanted = is_wanted | (tl.load(g_entropy + row) != 0)
    if g_centered is not None:
        is_wanted = is_wanted | (tl.load(g_centered + row) != 0)
    if g_top is not None:
        is_wanted = is_wanted | (tl.load(g_top + row) != 0)
    if g_rest is not None:
        is_wanted = is_wanted | (tl.load(g_rest + row) != 0)
    return is_wanted


@triton.jit
def _coefficients(
    row, temperature, reference, wrong_log_sum, wrong_entropy, top_wrong_id, rest_log_sum,
    g_target, g_log_sum, g_entropy, g_centered, g_top, g_rest,
):  # fmt: skip
    """What a row's gradient is made of: with d = z - ``origin``, exp(d - ``base``) (``slope`` d + ``level``)
    in general, ``at_target``, ``at_top`` and ``on_top`` at the top wrong answer, ``uniform`` by class
    weight."""
    origin = tl.load(reference + row)
    log_sum = tl.load(wrong_log_sum + row)
    zero = tl.zeros_like(log_sum)
    alpha, beta, at_target, uniform, on_top = zero, zero, zero, zero, zero
    base, share, offset, at_top = zero, zero, zero, zero
    top_id = tl.full([], -1, tl.int32)
    inverse = tl.where(log_sum > float("-inf"), tl.exp(-log_sum), 0.0)
    if g_log_sum is not None:
        alpha = _given(g_log_sum, row, temperature)
    if g_entropy is not None:
        beta = -_given(g_entropy, row, temperature)
        alpha = alpha - beta * tl.where(inverse > 0, log_sum - tl.load(wrong_entropy + row), 0.0)
    if g_target is not None:
        at_target = _given(g_target, row, temperature)
    if g_centered is not None:
        uniform = _given(g_centered, row, temperature)
    if g_top is not None:
        on_top = _given(g_top, row, temperature)
    if top_wrong_id is not None:
        top_id = tl.load(top_wrong_id + row).to(tl.int32)
    share = inverse
    if g_rest is not None:
        # From the rest's sum: exp(z_i - W2) does not overflow where the top answer dominates.
        rest = tl.load(rest_log_sum + row)
        has_rest = rest > float("-inf")
        base = tl.where(has_rest, rest, 0.0)
        share = tl.where(has_rest, tl.exp(rest - log_sum), 0.0)
        of_rest = _given(g_rest, row, temperature)
        offset = tl.where(has_rest, of_rest, 0.0)
        at_top = alpha * inverse
    return origin, base, beta * share, alpha * share + offset, at_target, at_top, on_top, uniform, top_id


@triton.jit
def _of_view(
    z, weight, columns, target, temperature, g_entropy, g_centered, g_top, g_rest,
    origin, base, slope, level, at_target, at_top, on_top, uniform, top_id,
):  # fmt: skip
    """The gradient at these columns from one view's statistics, but for candidates."""
    z = scaled(z, temperature)
    d = z - origin
    factor = level
    if g_entropy is not None:
        d = no_less(d, UNDERFLOW)
        factor = slope * d + level
    if g_rest is not None:
        result = tl.where(columns == top_id, at_top, tl.exp(d - base) * factor)
    else:
        result = tl.exp(d) * factor
    if g_centered is not None:
        result += tl.where(z > MASKED, weight, 0.0) * uniform
    result = tl.where(columns == target, at_target, result)
    if g_top is not None:
        result += tl.where(columns == top_id, on_top, 0.0)
    return result


@triton.jit
def _of_all_views(
    z, weight, columns, target, row, softcap, temperature,
    reference, wrong_log_sum, wrong_entropy, top_wrong_id, rest_log_sum,
    g_target, g_log_sum, g_entropy, g_centered, g_top, g_rest,
    reference_2, wrong_log_sum_2, wrong_entropy_2, top_wrong_id_2, rest_log_sum_2,
    g_target_2, g_log_sum_2, g_entropy_2, g_centered_2, g_top_2, g_rest_2,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """The gradient of capped logits at columns of a row, but for candidates."""
    if CAPPED:
        z = capped(z, softcap)
    origin, base, slope, level, at_target, at_top, on_top, uniform, top_id = _coefficients(
        row, temperature, reference, wrong_log_sum, wrong_entropy, top_wrong_id, rest_log_sum,
        g_target, g_log_sum, g_entropy, g_centered, g_top, g_rest,
    )  # fmt: skip
    result = _of_view(
        z, weight, columns, target, temperature, g_entropy, g_centered, g_top, g_rest,
        origin, base, slope, level, at_target, at_top, on_top, uniform, top_id,
    )  # fmt: skip
    if reference_2 is not None:
        origin, base, slope, level, at_target, at_top, on_top, uniform, top_id = _coefficients(
            row, None, reference_2, wrong_log_sum_2, wrong_entropy_2, top_wrong_id_2, rest_log_sum_2,
            g_target_2, g_log_sum_2, g_entropy_2, g_centered_2, g_top_2, g_rest_2,
        )  # fmt: skip
        result += _of_view(
            z, weight, columns, target, None, g_entropy_2, g_centered_2, g_top_2, g_rest_2,
            origin, base, slope, level, at_target, at_top, on_top, uniform, top_id,
        )  # fmt: skip
    return result


_NUMBERS = [
    "inner", "outer_stride", "inner_stride", "num_classes", "ignore_index", "num_candidates", "softcap",
    "out_stride",
]  # fmt: skip
_VIEW = [
    "reference", "wrong_log_sum", "wrong_entropy", "top_wrong_id", "rest_log_sum", "g_target", "g_log_sum",
    "g_entropy", "g_centered", "g_top", "g_rest", "g_candidates",
]  # fmt: skip
_POINTERS = ["logits", "out", "values", "targets", "candidates", "class_weight", "temperature"]
_ALL = [*_POINTERS, *_NUMBERS, *_VIEW, *(f"{name}_2" for name in _VIEW)]


@triton.jit(do_not_specialize=_ALL)
def gradient_of_tile(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, num_classes: tl.int32,
    out, out_stride: tl.int64, targets, ignore_index: tl.int64, class_weight, temperature, softcap:
    tl.float32, reference, wrong_log_sum, wrong_entropy, top_wrong_id, rest_log_sum,
    g_target, g_log_sum, g_entropy, g_centered, g_top, g_rest,
    reference_2, wrong_log_sum_2, wrong_entropy_2, top_wrong_id_2, rest_log_sum_2,
    g_target_2, g_log_sum_2, g_entropy_2, g_centered_2, g_top_2, g_rest_2,
    CAPPED: tl.constexpr, ALIGNED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write a tile of a row's gradient, at out + i out_stride; but for candidates. Rows that are ignored, or
    that have no gradient, are written 0 and not read.

    Where ``ALIGNED``, a row of ``out`` begins as far past a 16-byte boundary as the row of the logits.
    """
    tiles = tl.cdiv(num_classes + VECTOR_BYTES // (logits.dtype.element_ty.primitive_bitwidth // 8) - 1, SIZE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    target = tl.load(targets + row)
    is_wanted = _is_wanted(row, g_target, g_log_sum, g_entropy, g_centered, g_top, g_rest)
    if reference_2 is not None:
        is_wanted = is_wanted | _is_wanted(
            row, g_target_2, g_log_sum_2, g_entropy_2, g_centered_2, g_top_2, g_rest_2
        )
    is_wanted = is_wanted & (target != ignore_index)
    target = target.to(tl.int32)

    begin = logits + (row // inner) * outer_stride + (row % inner) * inner_stride
    shift = beyond_a_vector(begin)
    first = tile * SIZE - shift
    offsets = tl.arange(0, SIZE)
    columns = first + offsets
    there = (columns >= 0) & (columns < num_classes)
    is_whole = (first >= 0) & (first + SIZE <= num_classes)
    source = tl.multiple_of(begin - shift, 16) + tile * SIZE
    into = out + row * out_stride - shift
    if ALIGNED:
        into = tl.multiple_of(into, 16)
    into += tile * SIZE

    result = tl.zeros([SIZE], tl.float32)
    if is_wanted:
        if is_whole:
            z = tl.load(source + offsets)
        else:
            z = tl.load(source + offsets, mask=there, other=0.0)
        weight = 1.0
        if class_weight is not None:
            weight = tl.load(class_weight + columns, mask=there, other=0.0)
        z = z.to(tl.float32)
        result = _of_all_views(
            z, weight, columns, target, row, softcap, temperature,
            reference, wrong_log_sum, wrong_entropy, top_wrong_id, rest_log_sum,
            g_target, g_log_sum, g_entropy, g_centered, g_top, g_rest,
            reference_2, wrong_log_sum_2, wrong_entropy_2, top_wrong_id_2, rest_log_sum_2,
            g_target_2, g_log_sum_2, g_entropy_2, g_centered_2, g_top_2, g_rest_2, CAPPED,
        )  # fmt: skip
        if CAPPED:
            result *= slope_of_cap(z, softcap)
    narrow = result.to(out.dtype.element_ty)
    if is_whole:
        tl.store(into + offsets, narrow)
    else:
        tl.store(into + offsets, narrow, mask=there)


@triton.jit(do_not_specialize=_ALL)
def gradient_of_candidates(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, num_classes: tl.int32,
    values, targets, ignore_index: tl.int64, candidates, num_candidates: tl.int32, class_weight, temperature,
    softcap: tl.float32,
    reference, wrong_log_sum, wrong_entropy, top_wrong_id, rest_log_sum,
    g_target, g_log_sum, g_entropy, g_centered, g_top, g_rest, g_candidates,
    reference_2, wrong_log_sum_2, wrong_entropy_2, top_wrong_id_2, rest_log_sum_2,
    g_target_2, g_log_sum_2, g_entropy_2, g_centered_2, g_top_2, g_rest_2, g_candidates_2,
    CAPPED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The gradient [N, K] at the columns of candidates, to be put into place by ``put_candidates``: that of
    ``gradient_of_tile``, and all of this row's candidates that name the same column, in their order."""
    blocks = tl.cdiv(num_candidates, SIZE)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    some = (tl.program_id(0) % blocks) * SIZE + tl.arange(0, SIZE)
    target = tl.load(targets + row)
    begin = logits + (row // inner) * outer_stride + (row % inner) * inner_stride
    limit = tl.where(target == ignore_index, 0, num_candidates)
    columns = tl.load(candidates + row * num_candidates + some, mask=some < limit, other=-1)
    known = (columns >= 0) & (columns < num_classes)
    z = tl.load(begin + columns, mask=known, other=0.0).to(tl.float32)
    weight = 1.0
    if class_weight is not None:
        weight = tl.load(class_weight + columns, mask=known, other=0.0)
    result = _of_all_views(
        z, weight, columns, target, row, softcap, temperature,
        reference, wrong_log_sum, wrong_entropy, top_wrong_id, rest_log_sum,
        g_target, g_log_sum, g_entropy, g_centered, g_top, g_rest,
        reference_2, wrong_log_sum_2, wrong_entropy_2, top_wrong_id_2, rest_log_sum_2,
        g_target_2, g_log_sum_2, g_entropy_2, g_centered_2, g_top_2, g_rest_2, CAPPED,
    )  # fmt: skip
    for k in range(0, num_candidates, SIZE):
        others = k + tl.arange(0, SIZE)
        ids = tl.load(candidates + row * num_candidates + others, mask=others < limit, other=-1)
        same = columns[:, None] == ids[None, :]
        there = row * num_candidates + others
        if g_candidates is not None:
            own = scaled(tl.load(g_candidates + there, mask=ids >= 0, other=0.0), temperature)
            result += tl.sum(tl.where(same, own[None, :], 0.0), axis=1)
        if g_candidates_2 is not None:
            own = tl.load(g_candidates_2 + there, mask=ids >= 0, other=0.0)
            result += tl.sum(tl.where(same, own[None, :], 0.0), axis=1)
    if CAPPED:
        result *= slope_of_cap(z, softcap)
    tl.store(values + row * num_candidates + some, result, mask=some < num_candidates)


@triton.jit(do_not_specialize=_ALL)
def put_candidates(
    out, out_stride: tl.int64, num_classes: tl.int32, values, targets, ignore_index: tl.int64,
    candidates, num_candidates: tl.int32, SIZE: tl.constexpr,
):  # fmt: skip
    """Values [N, K] to the columns of candidates; those of one column are the same."""
    blocks = tl.cdiv(num_candidates, SIZE)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    some = (tl.program_id(0) % blocks) * SIZE + tl.arange(0, SIZE)
    limit = tl.where(tl.load(targets + row) == ignore_index, 0, num_candidates)
    columns = tl.load(candidates + row * num_candidates + some, mask=some < limit, other=-1)
    value = tl.load(values + row * num_candidates + some, mask=some < limit, other=0.0)
    known = (columns >= 0) & (columns < num_classes)
    tl.store(out + row * out_stride + columns, value.to(out.dtype.element_ty), mask=known)
