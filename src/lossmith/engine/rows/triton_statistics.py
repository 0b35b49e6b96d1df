# Triton's language is no Python to a type checker.
# pyright: reportMissingImports=false, reportInvalidTypeForm=false, reportGeneralTypeIssues=false
"""The Triton kernel from a row of logits to its raw statistics.

One program has a row, which it reads once (twice for ``num_wrong``, whose cut is a share of the final sum).
Each lane keeps sums of its own, measured from the largest wrong logit that it has met so far; the lanes meet
once, at the row's end. The target's column is not loaded: everything is measured from the wrong answers, as
in ``torch_rows``.
"""

import triton
import triton.language as tl

from lossmith.engine.rows.triton_arithmetic import (
    MASKED,
    WRONG_EPS,
    beyond_a_vector,
    capped,
    log1p,
    no_less,
    scaled,
    tile_of_row,
)


@triton.jit
def _origin(top):
    """What is subtracted before exp(); 0 where there is no wrong answer yet, so that exp(MASKED) is 0."""
    return tl.where(top <= MASKED, 0.0, top)


@triton.jit
def _start(LANES: tl.constexpr):
    """The state of the lanes before the first tile: the largest wrong logit and the tile of its first place,
    the second largest; sums of e and e d from one or the other, of u d, of u, and of finite logits."""
    nothing = tl.full([LANES], MASKED, tl.float32)
    zero = tl.zeros([LANES], tl.float32)
    none = tl.zeros([LANES], tl.int32)
    return nothing, none, nothing, zero, zero, zero, zero, none


@triton.jit
def _take_in(
    z, weight, tile, temperature, wrong_entropy, centered_sum, rest_log_sum,
    top, at, second, total, moment, centered, heaviness, count, WIDTH: tl.constexpr,
):  # fmt: skip
    """The state of the lanes after another tile ``z`` [LANES, WIDTH]."""
    z = no_less(scaled(z, temperature), MASKED)
    if rest_log_sum is not None:
        # Everything but the top answer is summed, from the largest of the rest: next to a top answer that
        # dominates, the rest's sum would underflow. Of this tile's top and the lane's, the smaller joins the
        # rest.
        best, place = tl.max(z, axis=1, return_indices=True)
        loser = tl.minimum(best, top)
        rest = tl.where(tl.arange(0, WIDTH)[None, :] == place[:, None], MASKED, z)
        origin = no_less(no_less(tl.max(rest, axis=1), second), loser)
        d = rest - _origin(origin)[:, None]
        shrink = tl.exp(second - origin)
        e, e_loser = tl.exp(d), tl.exp(loser - _origin(origin))
        if wrong_entropy is not None:
            moment = (moment + (second - origin) * total) * shrink + tl.sum(e * d, axis=1)
            moment += e_loser * (loser - _origin(origin))
        total = total * shrink + tl.sum(e, axis=1) + e_loser
        second = origin
    else:
        best = tl.max(z, axis=1)
    new_top = no_less(best, top)
    at = tl.where(best > top, tile, at)
    from_top = z - _origin(new_top)[:, None]
    if rest_log_sum is None:
        shrink = tl.exp(top - new_top)
        e = tl.exp(from_top)
        if wrong_entropy is not None:
            moment = (moment + (top - new_top) * total) * shrink + tl.sum(e * from_top, axis=1)
        total = total * shrink + tl.sum(e, axis=1)
    if centered_sum is not None:
        finite = z > MASKED
        centered += (_origin(top) - _origin(new_top)) * heaviness
        centered += tl.sum(tl.where(finite, weight * from_top, 0.0), axis=1)
        heaviness += tl.sum(tl.where(finite, weight, 0.0), axis=1)
        count += tl.sum(finite.to(tl.int32), axis=1)
    return new_top, at, second, total, moment, centered, heaviness, count


@triton.jit
def _log_sums(top, second, total, moment, rest_log_sum, LANES: tl.constexpr):
    """Of the whole row: the largest wrong logit, log sum e and sum q d from it, and log sum e without it."""
    largest = tl.max(top, axis=0)
    reference = _origin(largest)
    origin, lanes = top, top
    if rest_log_sum is not None:
        lanes = tl.where(tl.arange(0, LANES) == tl.argmax(top, axis=0), MASKED, top)
        origin = second
    shift = tl.max(origin, axis=0)
    if rest_log_sum is not None:
        shift = tl.maximum(shift, tl.max(lanes, axis=0))
    shrink = tl.exp(origin - shift)
    moment = tl.sum((moment + (origin - shift) * total) * shrink, axis=0)
    total = tl.sum(total * shrink, axis=0)
    if rest_log_sum is None:
        log_sum = tl.log(total)
        return largest, log_sum, moment / total, log_sum
    d = lanes - _origin(shift)  # the tops of all lanes but the one that has the row's
    moment += tl.sum(tl.exp(d) * d, axis=0)
    total += tl.sum(tl.exp(d), axis=0)
    shift = _origin(shift) - reference
    rest = tl.log(total) + shift
    # logaddexp(rest, 0), the top answer's own e being 1
    log_sum = no_less(rest, 0.0) + log1p(tl.exp(-tl.abs(rest)))
    log_sum = tl.where(largest <= MASKED, float("-inf"), log_sum)
    mean = (moment / total + shift) * tl.exp(rest - log_sum)
    return largest, log_sum, tl.where(total == 0, 0.0, mean), rest


@triton.jit
def _first_of(
    largest, top, at, has_wrong, start, shift, offsets, target, num_classes, softcap, temperature,
    CAPPED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Where the largest wrong logit is, first: the first tile in which a lane met it is looked at once
    more."""
    first = tl.where(has_wrong, tl.min(tl.where(top == largest, at, 2147483647), axis=0), 0) * SIZE
    columns = first - shift + offsets
    limit = tl.where(has_wrong, num_classes, 0)
    given = (columns >= 0) & (columns < limit) & (columns != target)
    z = tl.load(start + first + offsets, mask=given, other=float("-inf")).to(tl.float32)
    if CAPPED:
        z = tl.where(given, capped(z, softcap), float("-inf"))
    z = scaled(z, temperature)
    best = tl.max(tl.max(z, axis=1), axis=0)
    found = tl.min(tl.min(tl.where(z == best, columns, num_classes), axis=1), axis=0)
    return tl.where(has_wrong, found, -1)


@triton.jit
def _number_beyond(
    cut, origin, tiles, start, shift, offsets, target, num_classes, softcap, temperature,
    CAPPED: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """How many wrong answers have an e above ``cut``: a second pass, from the end, which the cache still
    has."""
    passed = tl.zeros([LANES], tl.int32)
    for k in range(0, tiles):
        first = (tiles - 1 - k) * SIZE
        column = first - shift
        z = tile_of_row(
            start + first, column, column + offsets, offsets, target, num_classes, softcap, CAPPED, SIZE
        )
        z = no_less(scaled(z, temperature), MASKED)
        passed += tl.sum((tl.exp(z - origin) > cut).to(tl.int32), axis=1)
    return tl.sum(passed, axis=0)


@triton.jit
def _read_candidates(
    row, begin, limit, num_classes, candidates, num_candidates, candidate_logits, softcap, temperature,
    CAPPED: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Write the logits of candidates, whose ids are below ``limit``; -inf where there is none."""
    for k in range(0, num_candidates, CANDIDATES):
        some = k + tl.arange(0, CANDIDATES)
        there = row * num_candidates + some
        ids = tl.load(candidates + there, mask=some < num_candidates, other=-1)
        tl.device_assert(
            (ids >= -1) & (ids < num_classes), "lossmith: one of the candidates is outside [0, V)"
        )
        known = (ids >= 0) & (ids < limit)
        z = tl.load(begin + ids, mask=known, other=0.0).to(tl.float32)
        if CAPPED:
            z = capped(z, softcap)
        z = tl.where(known, scaled(z, temperature), float("-inf"))
        tl.store(candidate_logits + there, z, mask=some < num_candidates)


@triton.jit
def _finish(
    row, start, target, is_ignored, num_classes, softcap, class_weight, candidates, num_candidates, shift,
    tiles, offsets, temperature, reference, target_logit, wrong_log_sum, wrong_entropy, centered_sum,
    sum_weight, target_weight, num_finite, top_wrong_logit, top_wrong_id, num_wrong, candidate_logits,
    rest_log_sum, top, at, second, total, moment, centered, heaviness, count,
    CAPPED: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Write a view's statistics of the row."""
    largest, log_sum, mean, rest = _log_sums(top, second, total, moment, rest_log_sum, LANES)
    is_broken = log_sum != log_sum  # a NaN in the row, which a maximum does not see
    origin = tl.where(is_broken, float("nan"), _origin(largest))
    limit = tl.where(is_ignored, 0, num_classes)
    own = tl.load(start + shift + target, mask=(target >= 0) & (target < limit), other=0.0).to(tl.float32)
    if CAPPED:
        own = capped(own, softcap)
    own = scaled(own, temperature)
    tl.store(reference + row, origin)
    tl.store(wrong_log_sum + row, log_sum)
    tl.store(target_logit + row, tl.where(is_ignored, 0.0, own))
    if wrong_entropy is not None:
        tl.store(wrong_entropy + row, tl.where(log_sum == float("-inf"), 0.0, log_sum - mean))
    if centered_sum is not None:
        is_finite = (own > MASKED) & (is_ignored == 0)
        weight = 1.0
        if class_weight is not None:
            weight = tl.load(class_weight + target, mask=(target >= 0) & (target < limit), other=0.0)
        tl.store(centered_sum + row, tl.sum(centered + (_origin(top) - origin) * heaviness, axis=0))
        tl.store(sum_weight + row, tl.sum(heaviness, axis=0))
        tl.store(target_weight + row, tl.where(is_finite, weight, 0.0))
        tl.store(num_finite + row, (tl.sum(count, axis=0) + is_finite.to(tl.int32)).to(tl.float32))
    if top_wrong_id is not None:
        has_wrong = (largest > MASKED) & (is_broken == 0)
        found = _first_of(
            largest, top, at, has_wrong, start, shift, offsets, target, num_classes, softcap, temperature,
            CAPPED, LANES * WIDTH,
        )  # fmt: skip
        tl.store(top_wrong_id + row, found.to(tl.int64))
        missing = tl.where(is_broken, float("nan"), float("-inf"))
        tl.store(top_wrong_logit + row, tl.where(is_ignored, 0.0, tl.where(has_wrong, largest, missing)))
    if num_wrong is not None:
        number = _number_beyond(
            WRONG_EPS * tl.exp(log_sum), origin, tiles, start, shift, offsets, target, num_classes, softcap,
            temperature, CAPPED, LANES, LANES * WIDTH,
        )  # fmt: skip
        tl.store(num_wrong + row, number.to(tl.float32))
    if candidate_logits is not None:
        _read_candidates(
            row, start + shift, limit, num_classes, candidates, num_candidates, candidate_logits, softcap,
            temperature, CAPPED, CANDIDATES,
        )  # fmt: skip
        tl.store(rest_log_sum + row, rest)


_NUMBERS = [
    "inner",
    "outer_stride",
    "inner_stride",
    "num_classes",
    "ignore_index",
    "num_candidates",
    "softcap",
]
_VIEW = [
    "reference", "target_logit", "wrong_log_sum", "wrong_entropy", "centered_sum", "sum_weight",
    "target_weight", "num_finite", "top_wrong_logit", "top_wrong_id", "num_wrong", "candidate_logits",
    "rest_log_sum",
]  # fmt: skip
_POINTERS = ["logits", "targets", "candidates", "class_weight", "temperature"]


# Nothing is specialised on: another V, softcap, stride or address is the same kernel.
@triton.jit(do_not_specialize=[*_POINTERS, *_NUMBERS, *_VIEW, *(f"{name}_2" for name in _VIEW)])
def statistics_of_row(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, num_classes: tl.int32,
    targets, ignore_index: tl.int64, candidates, num_candidates: tl.int32, class_weight, temperature,
    softcap: tl.float32, reference, target_logit, wrong_log_sum, wrong_entropy, centered_sum, sum_weight,
    target_weight, num_finite, top_wrong_logit, top_wrong_id, num_wrong, candidate_logits, rest_log_sum,
    reference_2, target_logit_2, wrong_log_sum_2, wrong_entropy_2, centered_sum_2, sum_weight_2,
    target_weight_2, num_finite_2, top_wrong_logit_2, top_wrong_id_2, num_wrong_2, candidate_logits_2,
    rest_log_sum_2, CAPPED: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Raw statistics of row ``i``, at logits + (i // inner) outer_stride + (i % inner) inner_stride.

    The outputs of the first view are of the logits over the temperature, those of the second (``_2``) of the
    logits as they are; None for what is not asked for. A row of ``ignore_index`` is not read.
    """
    SIZE: tl.constexpr = LANES * WIDTH
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    is_ignored = target == ignore_index
    is_id = is_ignored | ((target >= 0) & (target < num_classes))
    tl.device_assert(is_id, "lossmith: one of the targets is outside [0, V) and not ignore_index")
    target = tl.where(is_ignored, 0, target).to(tl.int32)
    begin = logits + (row // inner) * outer_stride + (row % inner) * inner_stride
    shift = beyond_a_vector(begin)
    start = tl.multiple_of(begin - shift, 16)
    tiles = tl.where(is_ignored, 0, tl.cdiv(num_classes + shift, SIZE))
    offsets = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]

    top, at, second, total, moment, centered, heaviness, count = _start(LANES)
    top_2, at_2, second_2, total_2, moment_2, centered_2, heaviness_2, count_2 = _start(LANES)
    for tile in range(0, tiles):
        first = tile * SIZE - shift
        columns = first + offsets
        z = tile_of_row(
            start + tile * SIZE, first, columns, offsets, target, num_classes, softcap, CAPPED, SIZE
        )
        weight = 1.0
        if class_weight is not None:
            weight = tl.load(class_weight + columns, mask=(columns >= 0) & (columns < num_classes), other=0.0)
        top, at, second, total, moment, centered, heaviness, count = _take_in(
            z, weight, tile, temperature, wrong_entropy, centered_sum, rest_log_sum,
            top, at, second, total, moment, centered, heaviness, count, WIDTH,
        )  # fmt: skip
        if reference_2 is not None:
            top_2, at_2, second_2, total_2, moment_2, centered_2, heaviness_2, count_2 = _take_in(
                z, weight, tile, None, wrong_entropy_2, centered_sum_2, rest_log_sum_2,
                top_2, at_2, second_2, total_2, moment_2, centered_2, heaviness_2, count_2, WIDTH,
            )  # fmt: skip
    _finish(
        row, start, target, is_ignored, num_classes, softcap, class_weight, candidates, num_candidates,
        shift, tiles, offsets, temperature, reference, target_logit, wrong_log_sum, wrong_entropy,
        centered_sum, sum_weight, target_weight, num_finite, top_wrong_logit, top_wrong_id, num_wrong,
        candidate_logits, rest_log_sum, top, at, second, total, moment, centered, heaviness, count, CAPPED,
        LANES, WIDTH, CANDIDATES,
    )  # fmt: skip
    if reference_2 is not None:
        _finish(
            row, start, target, is_ignored, num_classes, softcap, class_weight, candidates, num_candidates,
            shift, tiles, offsets, None, reference_2, target_logit_2, wrong_log_sum_2, wrong_entropy_2,
            centered_sum_2, sum_weight_2, target_weight_2, num_finite_2, top_wrong_logit_2, top_wrong_id_2,
            num_wrong_2, candidate_logits_2, rest_log_sum_2,
            top_2, at_2, second_2, total_2, moment_2, centered_2, heaviness_2, count_2,
            CAPPED, LANES, WIDTH, CANDIDATES,
        )  # fmt: skip
