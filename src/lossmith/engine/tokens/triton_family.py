# Triton's language is no Python to a type checker.
# pyright: reportMissingImports=false, reportInvalidTypeForm=false, reportGeneralTypeIssues=false
"""The Triton kernels of the cross-entropy family's terms, from raw statistics and back: the formulas of
``lossmith/terms/``, in double precision, a program for some tokens."""

import triton
import triton.language as tl

from lossmith.engine.tokens.triton_derivation import (
    INF,
    WIDE,
    _back_from_entropy,
    _below,
    _core,
    _put,
    _read,
    _weights,
)

_READ = [
    "num_rows", "targets", "ignore_index", "target_class_weight", "reference", "target_logit",
    "wrong_log_sum", "wrong_entropy", "centered_sum", "sum_weight", "target_weight", "num_finite",
    "reference_2", "target_logit_2", "wrong_log_sum_2",
]  # fmt: skip
_NUMBERS = ["label_smoothing", "focal_gamma", "z_loss", "confidence_penalty"]
_GRADIENTS = [
    "g_target_logit", "g_wrong_log_sum", "g_wrong_entropy", "g_centered_sum", "g_target_logit_2",
    "g_wrong_log_sum_2",
]  # fmt: skip


@triton.jit
def _weighed(value, weight):
    return tl.where(weight == 0, 0.0, value * weight)


@triton.jit
def _class_weight(row, mask, target_class_weight):
    weight = tl.full(row.shape, 1.0, tl.float64)
    if target_class_weight is not None:
        weight = _read(target_class_weight, row, mask)
    return weight


@triton.jit
def _smoothed(
    row, mask, centered_sum, sum_weight, target_weight, num_finite, centered, cost, weight, label_smoothing,
    HAS_SMOOTHING: tl.constexpr, EXCLUDES_TARGET: tl.constexpr,
):  # fmt: skip
    """The loss before its focal factor, what the smoothing divides by, and whether the target's own share of
    it was taken out."""
    own = _weighed(cost, weight)
    loss, classes, takes_own = own, tl.full(row.shape, 1.0, tl.float64), row < 0
    if HAS_SMOOTHING:
        of_wrong, _, of_target, _ = _weights(row, mask, sum_weight, target_weight)
        spread = of_wrong * centered - _read(centered_sum, row, mask)
        spread += of_target * tl.where(of_target == 0, 0.0, cost)
        classes = _read(num_finite, row, mask)
        if EXCLUDES_TARGET:
            takes_own = tl.abs(own) != INF
            spread -= tl.where(takes_own, own, 0.0)
            classes -= 1.0
        classes = tl.where(classes < 1.0, 1.0, classes)
        loss = (1.0 - label_smoothing) * own + label_smoothing * spread / classes
    return loss, classes, takes_own


@triton.jit
def _logsumexp(row, mask, reference, target_logit, wrong_log_sum):
    """logsumexp, the odds against the target that it is measured by, and p and q."""
    origin, z, wrong, _, against, _, cost, wrong_cost = _core(
        row, mask, reference, target_logit, wrong_log_sum
    )
    found = tl.where(against > 0, origin + (wrong + wrong_cost), z + cost)
    return found, against, tl.exp(-cost), tl.exp(-wrong_cost)


@triton.jit
def _back_from_square(row, mask, reference, target_logit, wrong_log_sum, of_square):
    """The gradients of z_y, of the wrong answers' sum and of the odds against the target, from that of
    logsumexp squared."""
    found, against, p, q = _logsumexp(row, mask, reference, target_logit, wrong_log_sum)
    given, is_against = of_square * 2.0 * found, against > 0
    of_target = tl.where(is_against, 0.0, given)
    return of_target, tl.where(is_against, given, 0.0), tl.where(is_against, -given * p, given * q)


@triton.jit(do_not_specialize=[*_READ, *_NUMBERS, "values"])
def family(
    num_rows: tl.int32,
    targets,
    ignore_index: tl.int64,
    target_class_weight,
    reference, target_logit, wrong_log_sum, wrong_entropy, centered_sum, sum_weight, target_weight,
    num_finite, reference_2, target_logit_2, wrong_log_sum_2,
    label_smoothing: tl.float64,
    focal_gamma: tl.float64,
    z_loss: tl.float64,
    confidence_penalty: tl.float64,
    values,
    HAS_SMOOTHING: tl.constexpr,
    EXCLUDES_TARGET: tl.constexpr,
    HAS_FOCAL: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_PENALTY: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """The terms [K, N] of some tokens."""
    row = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = row < num_rows
    is_ignored = tl.load(targets + row, mask=mask, other=0) == ignore_index
    _, _, _, _, _, centered, cost, wrong_cost = _core(row, mask, reference, target_logit, wrong_log_sum)
    weight = _class_weight(row, mask, target_class_weight)
    loss, _, _ = _smoothed(
        row, mask, centered_sum, sum_weight, target_weight, num_finite, centered, cost, weight,
        label_smoothing, HAS_SMOOTHING, EXCLUDES_TARGET,
    )  # fmt: skip
    if HAS_FOCAL:
        loss = tl.exp(focal_gamma * tl.where(is_ignored, 0.0, -wrong_cost)) * loss
    tl.store(values + row, loss, mask=mask)
    place = values + num_rows
    if HAS_Z:
        if HAS_SECOND:
            whole, _, _, _ = _logsumexp(row, mask, reference_2, target_logit_2, wrong_log_sum_2)
        else:
            whole, _, _, _ = _logsumexp(row, mask, reference, target_logit, wrong_log_sum)
        tl.store(place + row, z_loss * _weighed(whole * whole, weight), mask=mask)
        place += num_rows
    if HAS_PENALTY:
        of_others = tl.exp(-wrong_cost) * (_below(wrong_cost, WIDE) + _read(wrong_entropy, row, mask))
        entropy = tl.exp(-cost) * _below(cost, WIDE) + of_others
        tl.store(place + row, confidence_penalty * _weighed(-entropy, weight), mask=mask)


@triton.jit(do_not_specialize=[*_READ, *_NUMBERS, "upstream", *_GRADIENTS])
def family_back(
    num_rows: tl.int32,
    targets,
    ignore_index: tl.int64,
    target_class_weight,
    reference, target_logit, wrong_log_sum, wrong_entropy, centered_sum, sum_weight, target_weight,
    num_finite, reference_2, target_logit_2, wrong_log_sum_2,
    label_smoothing: tl.float64,
    focal_gamma: tl.float64,
    z_loss: tl.float64,
    confidence_penalty: tl.float64,
    upstream,
    g_target_logit, g_wrong_log_sum, g_wrong_entropy, g_centered_sum, g_target_logit_2, g_wrong_log_sum_2,
    HAS_SMOOTHING: tl.constexpr,
    EXCLUDES_TARGET: tl.constexpr,
    HAS_FOCAL: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_PENALTY: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """The gradients of some tokens' raw statistics; 0 where nobody has one for a token's terms."""
    row = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = row < num_rows
    is_ignored = tl.load(targets + row, mask=mask, other=0) == ignore_index
    _, _, _, _, against, centered, cost, wrong_cost = _core(row, mask, reference, target_logit, wrong_log_sum)
    p, q = tl.exp(-cost), tl.exp(-wrong_cost)
    is_against = against > 0
    weight = _class_weight(row, mask, target_class_weight)
    loss, classes, takes_own = _smoothed(
        row, mask, centered_sum, sum_weight, target_weight, num_finite, centered, cost, weight,
        label_smoothing, HAS_SMOOTHING, EXCLUDES_TARGET,
    )  # fmt: skip
    zero = tl.zeros(row.shape, tl.float64)
    of_target, of_wrong_sum, of_against, of_gap = zero, zero, zero, zero
    of_loss = _read(upstream, row, mask)
    is_wanted = of_loss != 0
    if HAS_FOCAL:
        factor = tl.exp(focal_gamma * tl.where(is_ignored, 0.0, -wrong_cost))
        of_against += tl.where(is_ignored, 0.0, of_loss * focal_gamma * (factor * loss) * p)
        of_loss = of_loss * factor
    of_own = of_loss
    of_centered = zero
    if HAS_SMOOTHING:
        of_spread = label_smoothing * of_loss / classes
        of_own = (1.0 - label_smoothing) * of_loss - tl.where(takes_own, of_spread, 0.0)
        weights, _, own_weight, _ = _weights(row, mask, sum_weight, target_weight)
        of_centered += of_spread * weights
        of_against += tl.where(own_weight != 0, of_spread * own_weight * q, 0.0)
    of_against += _weighed(of_own, weight) * q
    place = upstream + num_rows
    if HAS_Z:
        given = _read(place, row, mask)
        is_wanted = is_wanted | (given != 0)
        of_square = _weighed(given * z_loss, weight)
        if HAS_SECOND:
            of_z, of_sum, of_odds = _back_from_square(
                row, mask, reference_2, target_logit_2, wrong_log_sum_2, of_square
            )
            _put(g_target_logit_2, row, mask, tl.where(given != 0, of_z - of_odds, 0.0))
            _put(g_wrong_log_sum_2, row, mask, tl.where(given != 0, of_sum + of_odds, 0.0))
        else:
            of_target, of_wrong_sum, of_odds = _back_from_square(
                row, mask, reference, target_logit, wrong_log_sum, of_square
            )
            of_against += of_odds
        place += num_rows
    if HAS_PENALTY:
        given = _read(place, row, mask)
        is_wanted = is_wanted | (given != 0)
        of_entropy = -_weighed(given * confidence_penalty, weight)
        of_wrong = _read(wrong_entropy, row, mask)
        of_odds, of_others = _back_from_entropy(of_entropy, of_wrong, cost, wrong_cost, p, q)
        of_against += of_odds
        _put(g_wrong_entropy, row, mask, tl.where(is_wanted, of_others, 0.0))
    of_wrong_sum += tl.where(is_against, of_centered, 0.0)
    of_gap += tl.where(is_against, 0.0, of_centered)
    of_against += tl.where(is_against, -of_centered * p, of_centered * q)
    _put(g_target_logit, row, mask, tl.where(is_wanted, of_target + of_gap - of_against, 0.0))
    _put(g_wrong_log_sum, row, mask, tl.where(is_wanted, of_wrong_sum + of_against, 0.0))
    if HAS_SMOOTHING:
        _put(g_centered_sum, row, mask, tl.where(is_wanted, -of_spread, 0.0))
