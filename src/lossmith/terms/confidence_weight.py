"""Confidence weighting: tokens that the model is sure of count more, the others less."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.batch import TokenBatch

# The input with the scores of a confidence head, [..., T] in [0, 1].
SCORES = "confidence_scores"


def confidence(stats: TokenStats, batch: TokenBatch) -> Tensor:
    """c, [N]: the supplied scores, or the top probability of the prediction; detached."""
    scores = batch.features.get(SCORES)
    if scores is None:
        return stats.unscaled.top_prob.detach()
    if scores.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would wait
        outside = ((scores < 0) | (scores > 1)) & batch.valid
        if outside.nonzero().numel():
            raise ValueError(
                f"{SCORES} must be in [0, 1]; pass logits of a confidence head through a sigmoid"
            )
    return scores.detach().clamp(0, 1)


def confidence_weight(
    confidence: Tensor, *, threshold: float = 0.7, weight_range: tuple[float, float] = (0.5, 1.5)
) -> Tensor:
    """The weight [N] of tokens predicted with confidence c: linear from (0, lo) to (tau, 1) to (1, hi).

        lo + (1 - lo) c / tau                    c <= tau
        1 + (hi - 1) (c - tau) / (1 - tau)       c > tau

    Args:
        confidence: [N] in [0, 1].
        threshold: tau, in (0, 1).
        weight_range: (lo, hi).
    """
    low, high = weight_range
    below = low + (1 - low) * confidence / threshold
    above = 1 + (high - 1) * (confidence - threshold) / (1 - threshold)
    return torch.where(confidence <= threshold, below, above)


def calibration(stats: TokenStats, batch: TokenBatch) -> Tensor:
    """Binary cross-entropy [N] of the supplied confidence against "the most likely token was right".

    0 without supplied scores. A confidence head learns from this loss. Through the weights alone it would
    learn to lower the loss by lowering its own scores.
    """
    scores = batch.features.get(SCORES)
    if scores is None:
        return torch.zeros_like(batch.scale)
    eps = torch.finfo(torch.float32).eps
    c = scores.to(batch.scale.dtype).clamp(eps, 1 - eps)
    return -torch.where(stats.unscaled.correct, c.log(), torch.log1p(-c))


def check_weight_range(weight_range: tuple[float, float], name: str = "weight_range") -> None:
    """
    Raises:
        ValueError: a range that does not contain 1.
    """
    low, high = weight_range
    if not low <= 1 <= high:
        raise ValueError(f"{name} must hold 1, the weight of the threshold; got {weight_range}")
