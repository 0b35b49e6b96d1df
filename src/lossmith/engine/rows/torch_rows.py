"""The arithmetic on a block of rows, in PyTorch: [R, V] logits to [R] statistics and back.

Everything is measured from the block's *wrong answers*, the classes other than the
target, with the largest wrong logit as the origin (``reference``). Subtracting the target
out of sums over the whole vocabulary would cancel: the entropy of the wrong answers is
14% off at a gap of 15 in fp32 and NaN at 20. And an origin inside the row makes every
statistic blind to a common offset on the logits.

A block is small enough to stay in cache, so the passes over it are cheap and the only
traffic to memory is reading the logits once (and writing their gradient once).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lossmith.engine.statistics.raw import Needs, closed

# Stands in for -inf: exp() of it is exactly 0 and so is 0 times it, where 0 * -inf is NaN.
MASKED = -1e30
# exp() of this is exactly 0 in every dtype; it bounds differences that are multiplied by that 0.
UNDERFLOW = -1e4
# A wrong answer counts (``num_wrong``) when its share of the wrong mass exceeds this.
WRONG_EPS = 1e-8


@dataclass
class Scratch:
    """Two [R, V] buffers that every block of a sweep reuses."""

    a: Tensor
    b: Tensor

    def first(self, num_rows: int) -> Scratch:
        return Scratch(self.a[:num_rows], self.b[:num_rows])


def row_stats(
    z: Tensor,
    target: Tensor,
    candidates: Tensor | None,
    class_weight: Tensor | None,
    needs: Needs,
    scratch: Scratch,
) -> dict[str, Tensor]:
    """Raw statistics of rows ``z`` [R, V] (not modified) with ``target`` [R, 1], by name.

    ``reference`` is the largest wrong logit (0 where no wrong answer is possible), and
    with d = z - reference and e = exp(d) over the wrong answers: ``wrong_log_sum`` =
    log sum e; ``wrong_entropy`` of q = e / sum e; ``centered_sum`` = sum u d and ``sum_weight`` =
    sum u over the finite wrong answers for class weights u, ``target_weight`` = u_y if the target is
    finite, ``num_finite`` of all classes; ``rest_log_sum`` = log of sum e without the top wrong answer;
    ``candidate_logits`` [R, K], -inf for id -1.
    """
    needs = closed(needs)
    a, b = scratch.a, scratch.b
    target_logit = z.gather(1, target)
    torch.clamp(z, min=MASKED, out=a)
    a.scatter_(1, target, MASKED)
    top = a.amax(-1, keepdim=True)
    # NaN must fail this comparison the way a real maximum does, or it would be hidden
    reference = torch.where(top <= MASKED, 0.0, top)
    d = a.sub_(reference)
    raw = {"reference": reference, "target_logit": target_logit}

    if needs & Needs.SUM:
        raw |= _weighted_sums(d, target, target_logit, class_weight, b)
    if needs & Needs.TOP:
        raw["top_wrong_logit"] = torch.where(top <= MASKED, float("-inf"), top)
        raw["top_wrong_id"] = _first_zero(d, b)

    rest_shift = None
    if needs & Needs.CANDIDATES:
        # The top wrong answer is added at the end: when it dominates, the rest's sum, which
        # says how far its probability is from 1, would underflow next to it.
        d.scatter_(1, raw["top_wrong_id"].clamp(min=0), MASKED)
        second = d.amax(-1, keepdim=True)
        rest_shift = torch.where(second <= MASKED, 0.0, second)
        d.sub_(rest_shift)

    e = torch.exp(d, out=b if needs & Needs.ENTROPY else a)
    total = e.sum(-1, keepdim=True)
    log_sum = total.log()
    if rest_shift is not None:
        raw["rest_log_sum"] = log_sum + rest_shift
        has_top = torch.where(raw["top_wrong_id"] < 0, float("-inf"), torch.zeros_like(log_sum))
        log_sum = torch.logaddexp(raw["rest_log_sum"], has_top)
    raw["wrong_log_sum"] = log_sum

    if needs & Needs.ENTROPY:
        mean_d = d.mul_(e).sum(-1, keepdim=True) / total
        if rest_shift is not None:
            mean_d = (mean_d + rest_shift) * (raw["rest_log_sum"] - log_sum).exp()
            mean_d = torch.where(total > 0, mean_d, 0.0)
        raw["wrong_entropy"] = torch.where(log_sum > float("-inf"), log_sum - mean_d, 0.0)
    if needs & Needs.COUNT:
        cut = WRONG_EPS * (log_sum if rest_shift is None else log_sum - rest_shift).exp()
        count = torch.gt(e, cut, out=a if needs & Needs.ENTROPY else b).sum(-1, keepdim=True)
        raw["num_wrong"] = count if rest_shift is None else count + (raw["top_wrong_id"] >= 0)
    if needs & Needs.CANDIDATES:
        assert candidates is not None
        found = z.gather(1, candidates.clamp(min=0))
        raw["candidate_logits"] = found.masked_fill(candidates < 0, float("-inf"))
    return raw


def _weighted_sums(
    d: Tensor, target: Tensor, target_logit: Tensor, class_weight: Tensor | None, scratch: Tensor
) -> dict[str, Tensor]:
    """The group ``Needs.SUM``. The target apart: what it adds would drown the others where it is far above
    them."""
    finite = torch.gt(d, MASKED / 2, out=scratch)
    target_finite = target_logit > MASKED
    target_weight = target_finite.to(d.dtype)
    num_wrong = sum_weight = finite.sum(-1, keepdim=True)
    if class_weight is not None:
        finite.mul_(class_weight)
        target_weight = target_weight * class_weight[target]
        sum_weight = finite.sum(-1, keepdim=True)
    return {
        "target_weight": target_weight,
        "sum_weight": sum_weight,
        "num_finite": num_wrong + target_finite,
        "centered_sum": finite.mul_(d).sum(-1, keepdim=True),
    }


def row_grad(
    z: Tensor,
    out: Tensor,
    scratch: Tensor,
    target: Tensor,
    candidates: Tensor | None,
    class_weight: Tensor | None,
    raw: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> None:
    """Write the gradient of rows ``z`` [R, V] into ``out`` [R, V], given those of the raw statistics.

    One formula serves every loss. With d = z - reference, q = softmax over the wrong
    answers and the upstream gradients g of the raw statistics:

        out_i = q_i (alpha + beta d_i)        where i is wrong
              + g[target_logit]               at y
              + g[centered_sum] u_i           where i is wrong and z_i finite
              + g[top_wrong_logit]            at w, the top wrong answer
              + sum_k g[candidate_logits]_k   at c_k

    alpha = g[wrong_log_sum] + g[wrong_entropy] mean_d,  beta = -g[wrong_entropy].
    The target's entry is set, not corrected: p_y - 1 would lose its digits as p_y -> 1.
    """
    log_sum = raw["wrong_log_sum"]
    none = torch.zeros_like(log_sum)
    inverse = torch.where(log_sum > float("-inf"), (-log_sum).exp(), none)
    alpha = grads.get("wrong_log_sum", none)
    beta = None
    if "wrong_entropy" in grads:
        mean_d = torch.where(inverse > 0, log_sum - raw["wrong_entropy"], none)
        beta = -grads["wrong_entropy"]
        alpha = alpha - beta * mean_d
    at_top = None
    if "rest_log_sum" in grads:
        # Written from the rest's sum: q_i exp(W - W2) overflows when the top answer dominates,
        # exp(z_i - W2) does not; the top answer's own entry is set below.
        rest = raw["rest_log_sum"]
        origin = torch.where(rest > float("-inf"), rest, none)
        share = torch.where(rest > float("-inf"), (rest - log_sum).exp(), none)
        at_top = alpha * inverse
        scale, offset = share, grads["rest_log_sum"] * (rest > float("-inf"))
    else:
        origin, scale, offset = None, inverse, none

    torch.sub(z, raw["reference"], out=out)
    if beta is not None:
        out.clamp_(min=UNDERFLOW)
        torch.mul(out, beta * scale, out=scratch).add_(alpha * scale + offset)
    if origin is not None:
        out.sub_(origin)
    out.exp_().mul_(scratch if beta is not None else alpha * scale + offset)

    if at_top is not None:
        out.scatter_(1, raw["top_wrong_id"].clamp(min=0), at_top)
    if "centered_sum" in grads:
        finite = torch.gt(z, MASKED, out=scratch)
        if class_weight is not None:
            finite.mul_(class_weight)
        out.add_(finite.mul_(grads["centered_sum"]))
    out.scatter_(1, target, grads.get("target_logit", none))
    if "top_wrong_logit" in grads:
        known = raw["top_wrong_id"] >= 0
        out.scatter_add_(1, raw["top_wrong_id"].clamp(min=0), grads["top_wrong_logit"] * known)
    if "candidate_logits" in grads:
        assert candidates is not None
        out.scatter_add_(
            1, candidates.clamp(min=0), grads["candidate_logits"].masked_fill(candidates < 0, 0.0)
        )


def _first_zero(d: Tensor, scratch: Tensor) -> Tensor:
    """Index [R, 1] of the first 0 in each row of ``d`` <= 0, or -1 where there is none.

    On a CPU three vectorised passes take a third of the time of argmax.
    """
    num_classes = d.shape[-1]
    if d.device.type != "cpu" or num_classes > 2**24:  # fp32 counts exactly up to 2^24
        best, index = d.max(-1, keepdim=True)
        return torch.where(best < 0, -1, index)
    countdown = torch.arange(num_classes, 0, -1, dtype=d.dtype)
    found = torch.eq(d, 0.0, out=scratch).mul_(countdown).amax(-1, keepdim=True)
    return torch.where(found > 0, num_classes - found, -1.0).long()
