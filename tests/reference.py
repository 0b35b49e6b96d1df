"""What every number should be: the formulas by definition, differentiated by autograd, in any dtype.

In fp64 these are the truth; in the dtype of the logits they show how wrong a careful but
naive implementation is. Nothing here imports lossmith.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext

import torch
from torch import Tensor

IGNORE = -100
WRONG_EPS = 1e-8

# What a position without a target has: a token that the model gets right with certainty.
AT_IGNORED = {
    "target_prob": 1.0,
    "target_log1m_prob": 0.0,
    "top_prob": 1.0,
    "predicted": IGNORE,
    "correct": False,
    "candidate_logits": float("-inf"),
}
DIFFERENTIABLE = (
    "logsumexp",
    "target_logit",
    "nll",
    "target_prob",
    "target_log1m_prob",
    "entropy",
    "wrong_logsumexp",
    "wrong_entropy",
    "normalized_wrong_entropy",
    "mean_logit",
    "total_nll",
    "top_prob",
    "top_wrong_logit",
    "candidate_logits",
    "candidate_log1m_prob",
)
COUNTED = ("num_wrong", "num_finite", "correct", "predicted")


def softcapped(z: Tensor, cap: float | None) -> Tensor:
    return z if cap is None else cap * torch.tanh(z / cap)


def log_sum_exp(z: Tensor, members: Tensor) -> Tensor:
    """log of the sum of exp(z_i) over the members with a finite logit; -inf where there is none."""
    members = members & (z > float("-inf"))
    top = torch.where(members, z, float("-inf")).amax(-1, keepdim=True).detach()
    top = torch.where(top > float("-inf"), top, 0.0)
    total = torch.where(members, (torch.where(members, z, top) - top).exp(), 0.0).sum(-1)
    some = members.any(-1)
    return torch.where(some, torch.where(some, total, 1.0).log() + top.squeeze(-1), float("-inf"))


def log_odds(z: Tensor, ids: Tensor) -> Tensor:
    """log(p_c / (1 - p_c)) = z_c - logsumexp over the other classes; z [N, V], ids [N, K]."""
    classes = torch.arange(z.shape[-1])
    others = classes != ids.unsqueeze(-1)
    return z.gather(-1, ids) - log_sum_exp(z.unsqueeze(-2).expand(*others.shape), others)


def log1p_exp(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def probability(odds: Tensor) -> Tensor:
    """sigmoid, whose derivative does not lose 1 - p to rounding as p -> 1."""
    return (-log1p_exp(-odds)).exp()


def neg_log_probs(z: Tensor, targets: Tensor) -> Tensor:
    """-log p_i of the finite classes, 0 elsewhere; exact at the target as p_y -> 1."""
    ids = targets.unsqueeze(-1)
    finite = z > float("-inf")
    lse = log_sum_exp(z, torch.ones_like(finite)).unsqueeze(-1)
    values = torch.where(finite, lse - torch.where(finite, z, 0.0), 0.0)
    nll = torch.where(finite.gather(-1, ids), log1p_exp(-log_odds(z, ids)), 0.0)
    return values.scatter(-1, ids, nll)


def entropy_of(neg_log_p: Tensor, members: Tensor) -> Tensor:
    """-sum p log p over the members."""
    return torch.where(members, (-neg_log_p).exp() * neg_log_p, 0.0).sum(-1)


def statistics(
    z: Tensor,
    targets: Tensor,
    *,
    candidates: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every statistic of logits [..., V] at targets [...], by name."""
    valid = targets != IGNORE
    z = softcapped(torch.where(valid.unsqueeze(-1), z, 0.0), softcap) / temperature
    y = torch.where(valid, targets, 0).long()
    ids = y.unsqueeze(-1)
    finite = z > float("-inf")
    wrong = (torch.arange(z.shape[-1]) != ids) & finite
    num_finite = finite.sum(-1)
    odds = log_odds(z, ids).squeeze(-1)
    surprise = neg_log_probs(z, y)
    wrong_lse = log_sum_exp(z, wrong)
    wrong_surprise = torch.where(wrong, wrong_lse.unsqueeze(-1) - torch.where(wrong, z, 0.0), 0.0)
    wrong_entropy = entropy_of(wrong_surprise, wrong)
    num_wrong = (wrong & ((-wrong_surprise).exp() > WRONG_EPS)).sum(-1)
    log_wrong = num_wrong.clamp(min=2).to(z.dtype).log()
    top_wrong = torch.where(wrong, z, float("-inf")).argmax(-1, keepdim=True)
    top_wrong_logit = torch.where(wrong.any(-1), z.gather(-1, top_wrong).squeeze(-1), float("-inf"))
    target_logit = z.gather(-1, ids).squeeze(-1)
    right = target_logit >= top_wrong_logit
    predicted = torch.where(right, y, top_wrong.squeeze(-1))
    weight = torch.ones(z.shape[-1], dtype=z.dtype) if class_weight is None else class_weight
    stats = {
        "logsumexp": log_sum_exp(z, finite),
        "target_logit": target_logit,
        "nll": log1p_exp(-odds),
        "target_prob": probability(odds),
        "target_log1m_prob": -log1p_exp(odds),
        "entropy": entropy_of(surprise, finite),
        "wrong_logsumexp": wrong_lse,
        "wrong_entropy": wrong_entropy,
        "num_wrong": num_wrong,
        "normalized_wrong_entropy": torch.where(num_wrong > 1, wrong_entropy / log_wrong, 0.0),
        "mean_logit": torch.where(finite, z, 0.0).sum(-1) / num_finite,
        "total_nll": (surprise * weight).sum(-1),
        "num_finite": num_finite,
        "top_prob": probability(log_odds(z, predicted.unsqueeze(-1))).squeeze(-1),
        "top_wrong_logit": top_wrong_logit,
        "correct": right,
        "predicted": predicted,
    }
    if candidates is not None:
        given = candidates >= 0
        found = candidates.clamp(min=0).long()
        stats["candidate_logits"] = torch.where(given, z.gather(-1, found), float("-inf"))
        stats["candidate_log1m_prob"] = torch.where(given, -log1p_exp(log_odds(z, found)), 0.0)
    return {
        name: torch.where(valid.reshape(valid.shape + (1,) * (s.dim() - valid.dim())), s, at_ignored(name, s))
        for name, s in stats.items()
    }


def at_ignored(name: str, like: Tensor) -> Tensor:
    return torch.tensor(AT_IGNORED.get(name, 0), dtype=like.dtype)


def smoothed_targets(
    finite: Tensor, targets: Tensor, eps: float, mode: str, special_tokens: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """[..., V] the distribution that the model is to match."""
    onehot = torch.nn.functional.one_hot(targets, finite.shape[-1]).to(dtype)
    is_special = torch.isin(targets, torch.tensor(list(special_tokens), dtype=torch.long))
    share = torch.full(targets.shape, eps, dtype=dtype).masked_fill(is_special, 0.0).unsqueeze(-1)
    sharing = finite if mode == "uniform" else finite & (onehot == 0)
    return (1 - share) * onehot + share * sharing / sharing.sum(-1, keepdim=True).clamp(min=1)


def cross_entropy(
    z: Tensor,
    targets: Tensor,
    *,
    reduction: str = "mean",
    denominator: float | None = None,
    ignore_index: int = IGNORE,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    smoothing_mode: str = "uniform",
    special_tokens: Sequence[int] = (),
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    focal_gamma: float = 0.0,
    confidence_penalty: float = 0.0,
    shift: bool = False,
    empty: str = "zero",
) -> Tensor:
    """The whole family, written out: logits [B, T, V], targets [B, T]."""
    if shift:  # logits[t] predict targets[t + 1]; the last position predicts nothing
        targets, mask, token_weight = (
            None if x is None else torch.cat([x[..., 1:], torch.full_like(x[..., :1], fill)], -1)
            for x, fill in ((targets, ignore_index), (mask, 0), (token_weight, 0))
        )
    valid = targets != ignore_index
    if mask is not None:
        valid = valid & (mask != 0)
    y = torch.where(valid, targets, 0).long()
    raw = softcapped(torch.where(valid.unsqueeze(-1), z, 0.0), softcap)
    scaled = raw / temperature
    finite = raw > float("-inf")
    weight = torch.ones(z.shape[-1], dtype=z.dtype) if class_weight is None else class_weight.to(z.dtype)

    surprise = neg_log_probs(scaled, y)
    soft = smoothed_targets(finite, y, label_smoothing, smoothing_mode, special_tokens, z.dtype)
    loss = (soft * weight * surprise).sum(-1)
    loss = torch.where(finite.gather(-1, y.unsqueeze(-1)).squeeze(-1), loss, float("inf"))
    if focal_gamma:
        # (1 - p_y)^gamma through its logarithm: for gamma < 1 the power's own derivative is infinite at 0
        loss = (-focal_gamma * log1p_exp(log_odds(scaled, y.unsqueeze(-1)).squeeze(-1))).exp() * loss
    loss = loss + z_loss * weight[y] * log_sum_exp(raw, finite) ** 2
    loss = loss - confidence_penalty * weight[y] * entropy_of(surprise, finite)
    if token_weight is not None:
        loss = loss * token_weight
    return reduce(torch.where(valid, loss, 0.0), valid, weight[y], reduction, denominator, empty)


def reduce(
    loss: Tensor, valid: Tensor, counts: Tensor, reduction: str, denominator: float | None, empty: str
) -> Tensor:
    """The reduction table; ``counts`` is what a token counts for in a mean."""
    if reduction == "none":
        return loss if denominator is None else loss / denominator
    counts = torch.where(valid, counts, 0.0)
    if reduction == "sum":
        numerator, own = loss.sum(), torch.tensor(1.0)
    elif reduction == "sequence_mean":
        per_row = counts.sum(-1)
        numerator = (loss.sum(-1) / torch.where(per_row == 0, 1.0, per_row)).sum()
        own = valid.any(-1).sum()
    else:
        numerator, own = loss.sum(), counts.sum()
    divisor = own if denominator is None else torch.tensor(float(denominator))
    return numerator / torch.where(divisor == 0, 1.0 if empty == "zero" else float("nan"), divisor)


def exact_statistics(z: Sequence[Decimal], y: int, candidate: int) -> dict[str, Decimal]:
    """The differentiable statistics of one row in as many digits as the decimal context has: no tricks."""
    e = [x.exp() for x in z]
    p = [x / sum(e) for x in e]
    wrong = [i for i in range(len(z)) if i != y]
    q = {i: e[i] / sum(e[j] for j in wrong) for i in wrong}
    wrong_entropy = -sum(q[i] * q[i].ln() for i in wrong)
    counted = sum(q[i] > Decimal(str(WRONG_EPS)) for i in wrong)
    return {
        "logsumexp": sum(e).ln(),
        "target_logit": z[y],
        "nll": -p[y].ln(),
        "target_prob": p[y],
        "target_log1m_prob": (1 - p[y]).ln(),
        "entropy": -sum(x * x.ln() for x in p),
        "wrong_logsumexp": sum(e[i] for i in wrong).ln(),
        "wrong_entropy": wrong_entropy,
        "normalized_wrong_entropy": wrong_entropy / Decimal(counted).ln() if counted > 1 else Decimal(0),
        "mean_logit": sum(z) / len(z),
        "total_nll": -sum(x.ln() for x in p),
        "top_prob": max(p),
        "top_wrong_logit": max(z[i] for i in wrong),
        "candidate_logits": z[candidate],
        "candidate_log1m_prob": (1 - p[candidate]).ln(),
    }


def exact_with_gradient(
    row: Sequence[float], y: int, candidate: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Values, and gradients by central differences so fine that nothing of a double is lost."""
    with localcontext() as context:
        context.prec = 150
        z, h = [Decimal(x) for x in row], Decimal("1e-60")
        values = exact_statistics(z, y, candidate)
        gradients: dict[str, list[float]] = {name: [] for name in values}
        for i in range(len(z)):
            above, below = (
                exact_statistics([x + s * (j == i) for j, x in enumerate(z)], y, candidate) for s in (h, -h)
            )
            for name in values:
                gradients[name].append(float((above[name] - below[name]) / (2 * h)))
        return {name: float(value) for name, value in values.items()}, gradients


@dataclass
class Case:
    """A differentiable function of the logits, evaluated three ways with the same upstream gradient."""

    ours: Callable[[Tensor], Tensor]
    reference: Callable[[Tensor], Tensor]
    logits: Tensor
    upstream: Tensor

    def values_and_gradients(self) -> list[tuple[Tensor, Tensor]]:
        """(value, gradient) of: ours; the truth in fp64; the naive formula as precise as our statistics."""
        wide = torch.promote_types(self.logits.dtype, torch.float32)
        found = []
        for function, dtype in (
            (self.ours, self.logits.dtype),
            (self.reference, torch.float64),
            (self.reference, wide),
        ):
            z = self.logits.detach().to(dtype).requires_grad_()
            value = function(z)
            upstream = torch.where(value.detach().isfinite(), self.upstream.to(value.dtype), 0.0)
            known = torch.where(value.detach().isfinite(), value, 0.0)
            (gradient,) = torch.autograd.grad((known * upstream).sum(), z, allow_unused=True)
            found.append((value.detach(), torch.zeros_like(z) if gradient is None else gradient))
        return found

    def check(self, *, atol: float = 16.0, factor: float = 2.0) -> None:
        (value, gradient), (true_value, true_gradient), (naive_value, naive_gradient) = (
            self.values_and_gradients()
        )
        assert value.dtype == torch.promote_types(self.logits.dtype, torch.float32)
        assert gradient.dtype == self.logits.dtype
        assert_accurate(value, true_value, naive_value, atol=atol, factor=factor)
        assert_accurate(gradient, true_gradient, naive_gradient, atol=atol, factor=factor)


def assert_accurate(
    ours: Tensor, truth: Tensor, naive: Tensor | None = None, *, atol: float = 16.0, factor: float = 2.0
) -> None:
    """|ours - truth| <= factor |naive - truth| + a few units in the last place of the largest entry.

    For a half-precision result the units are those of fp32, plus the rounding of the result.
    """
    assert ours.shape == truth.shape
    infinite = ~truth.isfinite()
    assert torch.equal(ours.double()[infinite], truth[infinite]), "not the same infinities"
    ours_, truth_ = ours.double()[~infinite], truth[~infinite]
    assert not ours_.isnan().any(), "NaN where the truth is finite"
    if not truth_.numel():
        return
    eps = torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps
    rounding = torch.finfo(ours.dtype).eps / 2 if ours.dtype.itemsize == 2 else 0.0
    smallest = torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    allowed = atol * eps * truth_.abs().max().clamp(min=1.0) + (rounding + 4 * eps) * truth_.abs() + smallest
    if naive is not None:
        allowed = allowed + factor * (naive.double()[~infinite] - truth_).abs().nan_to_num(0.0)
    error = (ours_ - truth_).abs()
    worst = (error / allowed).argmax()
    assert (error <= allowed).all(), (
        f"{ours_[worst]:.9g} should be {truth_[worst]:.9g}: "
        f"off by {error[worst]:.3g}, {allowed[worst]:.3g} allowed"
    )
