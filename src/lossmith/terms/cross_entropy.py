"""Cross-entropy against the target id, smoothed or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.batch import TokenBatch
from lossmith.equation.reduction import scaled
from lossmith.options import option

SmoothingMode = Annotated[
    Literal["uniform", "exclude_target"], option("who shares it, every token or only the wrong ones")
]


def cross_entropy(stats: TokenStats, target_weight: Tensor | None = None) -> Tensor:
    """-log p_y, [N], times ``target_weight`` [N], the targets' class weights."""
    if target_weight is None:
        return stats.nll
    return scaled(stats.nll, target_weight)  # safe where the loss is infinite


def smooth(
    loss: Tensor,
    stats: TokenStats,
    batch: TokenBatch,
    *,
    label_smoothing: float,
    smoothing_mode: SmoothingMode = "uniform",
    special_tokens: Sequence[int] = (),
) -> Tensor:
    """Smooth a loss [N] of the targets: give a share of it to the other classes.

        (1 - eps) loss + eps / V  sum_i w_i (-log p_i)                  uniform
        (1 - eps) loss + eps / (V - 1)  sum_{i != y} w_i (-log p_i)     exclude_target

    V is the number of classes with a finite logit: a masked class gets no mass. Applied to
    :func:`cross_entropy`, this is label smoothing.

    Args:
        loss: [N] the loss of the targets.
        stats: statistics whose ``total_nll`` carries the batch's class weights.
        batch: the tokens.
        label_smoothing: eps in [0, 1).
        smoothing_mode: ``uniform`` gives the target 1 - eps + eps / V, as PyTorch does;
            ``exclude_target`` gives it 1 - eps.
        special_tokens: target ids that are not smoothed.

    Raises:
        ValueError: a special token outside the vocabulary.

    Source: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2015.
    """
    _check_special_tokens(special_tokens, batch.num_classes)
    if label_smoothing == 0:
        return loss
    total, classes = stats.total_nll, stats.num_finite
    if smoothing_mode == "exclude_target":
        own = cross_entropy(stats, batch.target_weight)
        total, classes = total - own.masked_fill(own.isinf(), 0.0), classes - 1
    eps: float | Tensor = label_smoothing
    if special_tokens:
        is_special = torch.zeros_like(batch.valid)
        for token in special_tokens:  # a tensor of them would be copied to the device at every step
            is_special = is_special | (batch.targets == token)
        eps = label_smoothing * (~is_special).to(loss.dtype)
    return (1 - eps) * loss + eps * total / classes.clamp(min=1)


def _check_special_tokens(special_tokens: Sequence[int], num_classes: int | None) -> None:
    if special_tokens and num_classes is not None and max(special_tokens) >= num_classes:
        raise ValueError(
            f"special_tokens hold {max(special_tokens)} where the vocabulary has V={num_classes} tokens; "
            "expected ids below that"
        )
