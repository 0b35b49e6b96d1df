"""What the loss modifiers should do, by definition, over the whole vocabulary; autograd differentiates it.

Nothing here imports lossmith.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

IGNORE = -100
WRONG_EPS = 1e-8

Judge = Callable[[Tensor], Tensor]


def valid_of(targets: Tensor, mask: Tensor | None = None) -> Tensor:
    valid = targets != IGNORE
    return valid if mask is None else valid & (mask != 0)


def neg_log_p(logits: Tensor) -> Tensor:
    return logits.logsumexp(-1, keepdim=True) - logits


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return neg_log_p(logits).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def smoothed(logits: Tensor, targets: Tensor, factor: float, special: tuple[int, ...] = ()) -> Tensor:
    """Cross-entropy against factor / V on every finite class and 1 - factor more on the target."""
    surprise = neg_log_p(logits)
    finite = torch.isfinite(logits)
    mean = torch.where(finite, surprise, 0.0).sum(-1) / finite.sum(-1)
    own = token_loss(logits, targets)
    plain = torch.isin(targets, torch.tensor(special, dtype=torch.long))
    return torch.where(plain, own, (1 - factor) * own + factor * mean)


def wrong_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """H(q) / log(number of wrong answers with q > eps), and where that means something."""
    logits = logits.detach().double()
    at_target = torch.arange(logits.shape[-1]) == targets.clamp(min=0).unsqueeze(-1)
    q = logits.masked_fill(at_target, -math.inf).softmax(-1)
    count = (q > WRONG_EPS).sum(-1)
    entropy = -torch.where(q > 0, q * q.log(), 0.0).sum(-1)
    return entropy / count.clamp(min=2).double().log(), count > 1


def entropy_weights(
    entropy: Tensor,
    counts: Tensor,
    *,
    weight: float = 1.0,
    threshold: float = 0.0,
    eps: float = 1e-8,
    max_weight: float = 10.0,
    direction: str = "concentrated",
) -> Tensor:
    """[B] weights of samples with these entropies; 1 where a sample does not count."""
    raw = []
    for h in entropy.tolist():
        level = max(h, threshold) + eps
        raw.append(level if direction == "uniform" else min(1 / level, max_weight))
    chosen = [b for b in range(len(raw)) if counts[b]]
    result = torch.ones(len(raw), dtype=torch.float64)
    if not chosen:
        return result
    mean = sum(raw[b] for b in chosen) / len(chosen)
    strong = {b: max(0.0, 1 + weight * (raw[b] / mean - 1)) for b in chosen}
    total = sum(strong.values())
    for b in chosen:
        result[b] = strong[b] * len(chosen) / total
    return result


def entropy_factor(logits: Tensor, targets: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
    """[B] the entropy modifier's weights of a batch."""
    entropy, is_defined = wrong_entropy(logits, targets)
    is_defined = is_defined & valid_of(targets, mask)
    counts = is_defined.sum(-1)
    mean = torch.where(is_defined, entropy, 0.0).sum(-1) / counts.clamp(min=1)
    return entropy_weights(mean, counts > 0, **options)  # type: ignore[arg-type]


def mask_ratio_factor(
    valid: Tensor, power: float = 0.5, low: float = 0.1, high: float = 10.0, eps: float = 1e-8
) -> Tensor:
    ratio = valid.double().mean(-1)
    return ((ratio + eps) ** -power).clamp(low, high)


def judge_factor(
    wrongness: Tensor,
    valid: Tensor,
    exponent: float = 1.0,
    low: float = 0.1,
    high: float = 10.0,
    eps: float = 1e-6,
) -> Tensor:
    x = valid.double().mean(-1)
    expected = (x**4 - 2 * x**3 + 2 * x).clamp(min=eps)
    return ((wrongness / expected) ** exponent).clamp(low, high)


def sequence_mean(losses: Tensor, valid: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """mean over rows with something to learn of weight * the row's mean loss."""
    per_row = torch.where(valid, losses, 0.0).sum(-1) / valid.sum(-1).clamp(min=1)
    rows = (valid.sum(-1) > 0).sum().clamp(min=1)
    return (weights * per_row).sum() / rows


def token_mean(losses: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, losses, 0.0).sum() / valid.sum().clamp(min=1)


def variance_factor(p: Tensor, t: Tensor, scale: float, alpha: float, eps: float = 1e-8) -> float:
    ratio = t.var(unbiased=False).item() / max(p.var(unbiased=False).item(), eps)
    return 1 + (scale - 1) * (1 - math.exp(-alpha * max(ratio - 1, 0)))


def correlation_factor(p: Tensor, t: Tensor, alpha: float) -> float:
    c = torch.corrcoef(torch.stack([p, t]))[0, 1].item()
    root = math.sqrt(alpha)
    return (alpha - 2 * root + 1) / 2 * c * c + (1 - alpha) / 2 * c + root
