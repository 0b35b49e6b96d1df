# Triton's language is no Python to a type checker.
# pyright: reportMissingImports=false, reportInvalidTypeForm=false, reportGeneralTypeIssues=false
"""The Triton kernels from raw statistics of tokens to named ones, and back: the formulas of ``stats.py``, in
double precision, a program for some tokens."""

import triton
import triton.language as tl

from lossmith.engine.rows.triton_arithmetic import log1p
from lossmith.engine.tokens.native_tokens import DERIVED, RAW

INF = tl.constexpr(float("inf"))
LOG_2 = tl.constexpr(0.6931471805599453)
WIDE = tl.constexpr(1e4)  # as in stats.py
# Nothing is specialised on.
_TOKENS = ["num_rows", "num_candidates", "targets", "ignore_index", "candidates"]
_RAW = [name for name in RAW if name not in ("num_finite", "top_wrong_id")]
_CONSTANT = ("g_reference", "g_sum_weight", "g_target_weight", "g_num_wrong")
_THERE, _BACK = [*_TOKENS, *_RAW, *DERIVED], [*_TOKENS, *_RAW, *(f"g_{name}" for name in (*DERIVED, *_RAW))]


@triton.jit
def _softplus(x):
    small = log1p(tl.exp(-tl.abs(x)))
    return tl.where(x > 0, x + small, small)


@triton.jit
def _read(values, at, mask):
    """A raw statistic, 0 where it is not there."""
    found = tl.zeros(at.shape, tl.float64)
    if values is not None:
        found = tl.load(values + at, mask=mask, other=0.0).to(tl.float64)
    return found


@triton.jit
def _put(values, at, mask, found):
    if values is not None:
        tl.store(values + at, found, mask=mask)


@triton.jit
def _core(row, mask, reference, target_logit, wrong_log_sum):
    """(reference, z_y, the wrong answers' sum, z_y and logsumexp from the reference, nll, -log(1 - p_y))"""
    origin = _read(reference, row, mask)
    target = _read(target_logit, row, mask)
    wrong = _read(wrong_log_sum, row, mask)
    gap = target - origin
    gap = tl.where(gap == INF, float("nan"), gap)  # a broken logit is no certainty
    against = wrong - gap
    nll, wrong_nll = _softplus(against), _softplus(-against)
    centered = tl.where(against > 0, wrong + wrong_nll, gap + nll)
    return origin, target, wrong, gap, against, centered, nll, wrong_nll


@triton.jit
def _below(x, most):
    """min(x, most), but a NaN stays one."""
    return tl.where(x > most, most, x)


@triton.jit
def _weights(row, mask, sum_weight, target_weight):
    """The wrong answers' weight, as it divides their sum, the target's, and what divides the sum of both."""
    of_wrong = _read(sum_weight, row, mask)
    of_target = _read(target_weight, row, mask)
    divisor = tl.where(of_wrong == 0, 1.0, of_wrong)  # of a sum of nothing
    return of_wrong, divisor, of_target, tl.where(of_target == 0, divisor, of_wrong + of_target)


@triton.jit
def _most_entropy(row, mask, num_wrong):
    """Whether there are wrong answers to be unsure of, and the entropy of that many."""
    counted = _read(num_wrong, row, mask)
    is_sure = counted <= 1
    return is_sure, tl.log(tl.where(is_sure, 2.0, counted))


@triton.jit
def _target_wins(gap, wrong):
    return ((gap >= 0) & (wrong == wrong)) | (wrong == -INF)


@triton.jit
def _of_candidate(logit, origin, centered, rest, gap, is_target, log1m):
    """log(1 - p_c), log p_c, and whether the former is the rest, summed without c, less the sum of all."""
    log_p = logit - origin - centered
    is_large = (log_p > -LOG_2) & (is_target == 0)
    is_small = (is_large == 0) & (is_target == 0)
    small = log1p(-tl.exp(tl.where(is_small, log_p, -INF)))
    most = tl.maximum(rest, gap)
    apart = tl.where(most == -INF, -INF, -tl.abs(rest - gap))
    large = most + log1p(tl.exp(apart)) - centered
    return tl.where(is_target, log1m, tl.where(is_large, large, small)), log_p, is_large, is_small


@triton.jit
def _derive_candidates(
    row, mask, num_candidates, target, candidates, candidate_logits, rest_log_sum, candidate_log1m_prob,
    origin, gap, centered, log1m,
):  # fmt: skip
    """Write log(1 - p_c) of each candidate."""
    rest = _read(rest_log_sum, row, mask)
    for k in range(num_candidates):
        at = row * num_candidates + k
        is_target = tl.load(candidates + at, mask=mask, other=0) == target
        logit = _read(candidate_logits, at, mask)
        value, _, _, _ = _of_candidate(logit, origin, centered, rest, gap, is_target, log1m)
        tl.store(candidate_log1m_prob + at, value, mask=mask)


@triton.jit
def _back_from_candidates(
    row, mask, num_candidates, target, candidates, candidate_logits, rest_log_sum, g_candidate_log1m_prob,
    g_candidate_logits, origin, gap, centered,
):  # fmt: skip
    """Write the gradients of the candidates' logits; those of the rest's sum, of z_y and the logsumexp from
    the reference, and of log(1 - p_y)."""
    zero = tl.zeros(row.shape, tl.float64)
    of_rest, of_gap, of_centered, of_log1m = zero, zero, zero, zero
    rest = _read(rest_log_sum, row, mask)
    has_rest = (rest > -INF) | (gap > -INF)
    share = tl.where(has_rest, 1.0 / (1.0 + tl.exp(tl.where(has_rest, gap - rest, 0.0))), 0.0)
    for k in range(num_candidates):
        at = row * num_candidates + k
        is_target = tl.load(candidates + at, mask=mask, other=0) == target
        logit = _read(candidate_logits, at, mask)
        given = _read(g_candidate_log1m_prob, at, mask)
        _, log_p, is_large, is_small = _of_candidate(logit, origin, centered, rest, gap, is_target, zero)
        of_log1m += tl.where(is_target, given, 0.0)
        from_rest = tl.where(is_large & has_rest, given, 0.0)
        of_rest += from_rest * share
        of_gap += from_rest * (1.0 - share)
        e = tl.exp(tl.where(is_small, log_p, -INF))
        own = tl.where(is_small, -given * e / (1.0 - e), 0.0)
        of_centered -= own + tl.where(is_large, given, 0.0)
        if g_candidate_logits is not None:
            tl.store(g_candidate_logits + at, own, mask=mask)
    return of_rest, of_gap, of_centered, of_log1m


@triton.jit
def _back_from_entropy(given, of_wrong, cost, wrong_cost, p, q):
    """The gradients of the odds against the target, and of the wrong answers' entropy, from the entropy's."""
    apart = _below(wrong_cost, WIDE) - _below(cost, WIDE) + of_wrong
    apart += (cost <= WIDE).to(tl.float64) - (wrong_cost <= WIDE).to(tl.float64)
    return given * p * q * apart, given * q


@triton.jit
def _back_from_entropies(
    row, mask, wrong_entropy, num_wrong, g_entropy, g_normalized_wrong_entropy, cost, wrong_cost, p, q
):
    """The gradients of the odds against the target, and of the wrong answers' entropy."""
    of_against, of_wrong_entropy = tl.zeros(row.shape, tl.float64), tl.zeros(row.shape, tl.float64)
    if g_entropy is not None:
        given = _read(g_entropy, row, mask)
        of_odds, of_wrong = _back_from_entropy(given, _read(wrong_entropy, row, mask), cost, wrong_cost, p, q)
        of_against += of_odds
        of_wrong_entropy += of_wrong
    if g_normalized_wrong_entropy is not None:
        is_sure, most = _most_entropy(row, mask, num_wrong)
        part = _read(wrong_entropy, row, mask) / most
        is_clamped = (part < 0) | (part > 1) | is_sure
        given = _read(g_normalized_wrong_entropy, row, mask)
        of_wrong_entropy += tl.where(is_clamped, 0.0, given / most)
    return of_against, of_wrong_entropy


@triton.jit
def _back_from_sums(row, mask, sum_weight, target_weight, g_mean_logit, g_total_nll, q):
    """The gradients of z_y, of the centered sum, of the logsumexp and of the odds against the target."""
    zero = tl.zeros(row.shape, tl.float64)
    of_target, of_centered_sum, of_centered, of_against = zero, zero, zero, zero
    weight, divisor, own, both = _weights(row, mask, sum_weight, target_weight)
    has_own = own != 0
    if g_mean_logit is not None:
        given = _read(g_mean_logit, row, mask)
        of_centered_sum += given * tl.where(has_own, weight / both, 1.0) / divisor
        of_target += tl.where(has_own, given * own / both, 0.0)
    if g_total_nll is not None:
        given = _read(g_total_nll, row, mask)
        of_centered += given * weight
        of_centered_sum -= given
        of_against += tl.where(has_own, given * own * q, 0.0)
    return of_target, of_centered_sum, of_centered, of_against


@triton.jit
def _derive_sums(
    row, mask, centered_sum, sum_weight, target_weight, mean_logit, total_nll, origin, z, centered, cost
):
    """Write what is made of a sum over the classes."""
    of_wrong, divisor, of_target, both = _weights(row, mask, sum_weight, target_weight)
    if mean_logit is not None:
        wrong_mean = origin + _read(centered_sum, row, mask) / divisor
        mean = (of_wrong * wrong_mean + of_target * z) / both
        tl.store(mean_logit + row, tl.where(of_target == 0, wrong_mean, mean), mask=mask)
    if total_nll is not None:
        own = of_target * tl.where(of_target == 0, 0.0, cost)
        total = of_wrong * centered - _read(centered_sum, row, mask) + own
        tl.store(total_nll + row, total, mask=mask)


@triton.jit(do_not_specialize=_THERE)
def derive(
    num_rows: tl.int32,
    num_candidates: tl.int32,
    targets,
    ignore_index: tl.int64,
    candidates,
    reference, target_logit, wrong_log_sum, wrong_entropy, centered_sum, sum_weight, target_weight,
    top_wrong_logit, num_wrong, candidate_logits, rest_log_sum,
    logsumexp, wrong_logsumexp, nll, target_prob, target_log1m_prob, entropy, normalized_wrong_entropy,
    mean_logit, total_nll, top_prob, candidate_log1m_prob,
    SIZE: tl.constexpr,
):  # fmt: skip
    """The named statistics of some tokens; None for those that are not wanted."""
    row = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = row < num_rows
    target = tl.load(targets + row, mask=mask, other=0)
    is_ignored = target == ignore_index
    origin, z, wrong, gap, against, centered, cost, wrong_cost = _core(
        row, mask, reference, target_logit, wrong_log_sum
    )
    log1m = tl.where(is_ignored, 0.0, -wrong_cost)
    _put(logsumexp, row, mask, tl.where(against > 0, origin + (wrong + wrong_cost), z + cost))
    _put(wrong_logsumexp, row, mask, tl.where(is_ignored, 0.0, origin + wrong))
    _put(nll, row, mask, cost)
    _put(target_prob, row, mask, tl.exp(-cost))
    _put(target_log1m_prob, row, mask, log1m)
    if entropy is not None:
        of_others = tl.exp(-wrong_cost) * (_below(wrong_cost, WIDE) + _read(wrong_entropy, row, mask))
        tl.store(entropy + row, tl.exp(-cost) * _below(cost, WIDE) + of_others, mask=mask)
    if normalized_wrong_entropy is not None:
        is_sure, most = _most_entropy(row, mask, num_wrong)
        part = _read(wrong_entropy, row, mask) / most
        part = tl.where(part < 0, 0.0, _below(part, 1.0))
        tl.store(normalized_wrong_entropy + row, tl.where(is_sure, 0.0, part), mask=mask)
    _derive_sums(
        row, mask, centered_sum, sum_weight, target_weight, mean_logit, total_nll, origin, z, centered, cost
    )
    if top_prob is not None:
        top = tl.exp(_read(top_wrong_logit, row, mask) - origin - centered)
        tl.store(top_prob + row, tl.where(_target_wins(gap, wrong), tl.exp(-cost), top), mask=mask)
    if candidate_log1m_prob is not None:
        _derive_candidates(
            row, mask, num_candidates, target, candidates, candidate_logits, rest_log_sum,
            candidate_log1m_prob, origin, gap, centered, log1m,
        )  # fmt: skip


@triton.jit(do_not_specialize=[name for name in _BACK if name not in _CONSTANT])
def derive_back(
    num_rows: tl.int32,
    num_candidates: tl.int32,
    targets,
    ignore_index: tl.int64,
    candidates,
    reference, target_logit, wrong_log_sum, wrong_entropy, centered_sum, sum_weight, target_weight,
    top_wrong_logit, num_wrong, candidate_logits, rest_log_sum,
    g_logsumexp, g_wrong_logsumexp, g_nll, g_target_prob, g_target_log1m_prob, g_entropy,
    g_normalized_wrong_entropy, g_mean_logit, g_total_nll, g_top_prob, g_candidate_log1m_prob,
    g_target_logit, g_wrong_log_sum, g_wrong_entropy, g_centered_sum, g_top_wrong_logit, g_candidate_logits,
    g_rest_log_sum,
    SIZE: tl.constexpr,
):  # fmt: skip
    """The gradients of some tokens' raw statistics; None for those that have none."""
    row = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = row < num_rows
    target = tl.load(targets + row, mask=mask, other=0)
    is_ignored = target == ignore_index
    origin, _, wrong, gap, against, centered, cost, wrong_cost = _core(
        row, mask, reference, target_logit, wrong_log_sum
    )
    p, q = tl.exp(-cost), tl.exp(-wrong_cost)
    zero = tl.zeros(row.shape, tl.float64)
    of_target, of_wrong_sum, of_top, of_rest, of_against, of_gap = zero, zero, zero, zero, zero, zero
    is_against = against > 0
    of_log1m = _read(g_target_log1m_prob, row, mask)
    of_against += _read(g_nll, row, mask) * q - _read(g_target_prob, row, mask) * p * q
    if g_logsumexp is not None:
        given = _read(g_logsumexp, row, mask)
        of_wrong_sum += tl.where(is_against, given, 0.0)
        of_target += tl.where(is_against, 0.0, given)
        of_against += tl.where(is_against, -given * p, given * q)
    if g_wrong_logsumexp is not None:
        of_wrong_sum += tl.where(is_ignored, 0.0, _read(g_wrong_logsumexp, row, mask))
    from_entropies, of_wrong_entropy = _back_from_entropies(
        row, mask, wrong_entropy, num_wrong, g_entropy, g_normalized_wrong_entropy, cost, wrong_cost, p, q
    )
    of_against += from_entropies
    from_target, of_centered_sum, of_centered, from_sums = _back_from_sums(
        row, mask, sum_weight, target_weight, g_mean_logit, g_total_nll, q
    )
    of_target += from_target
    of_against += from_sums
    if g_top_prob is not None:
        given = _read(g_top_prob, row, mask)
        wins = _target_wins(gap, wrong)
        of_against -= tl.where(wins, given * p * q, 0.0)
        top = tl.exp(_read(top_wrong_logit, row, mask) - origin - centered)
        of_top += tl.where(wins, 0.0, given * top)
        of_centered -= tl.where(wins, 0.0, given * top)
    if g_candidate_log1m_prob is not None:
        of_rest, of_gap, from_candidates, of_own = _back_from_candidates(
            row, mask, num_candidates, target, candidates, candidate_logits, rest_log_sum,
            g_candidate_log1m_prob, g_candidate_logits, origin, gap, centered,
        )  # fmt: skip
        of_centered += from_candidates
        of_log1m += of_own
    of_against += tl.where(is_ignored, 0.0, of_log1m * p)
    of_wrong_sum += tl.where(is_against, of_centered, 0.0)
    of_gap += tl.where(is_against, 0.0, of_centered)
    of_against += tl.where(is_against, -of_centered * p, of_centered * q)
    _put(g_target_logit, row, mask, of_target + of_gap - of_against)
    _put(g_wrong_log_sum, row, mask, of_wrong_sum + of_against)
    _put(g_wrong_entropy, row, mask, of_wrong_entropy)
    _put(g_centered_sum, row, mask, of_centered_sum)
    _put(g_top_wrong_logit, row, mask, of_top)
    _put(g_rest_log_sum, row, mask, of_rest)
