"""Cross-entropy against the target id, smoothed or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lossmith.engine.stats import TokenStats

SmoothingMode = Literal["uniform", "exclude_target"]


def smoothed_cross_entropy(
    stats: TokenStats,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    smoothing_mode: SmoothingMode = "uniform",
    special_tokens: Sequence[int] = (),
    class_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy [N] against targets that hold ``label_smoothing`` back for the other classes.

        (1 - eps) w_y nll + eps / V  sum_i w_i (-log p_i)                  uniform
        (1 - eps) w_y nll + eps / (V - 1)  sum_{i != y} w_i (-log p_i)     exclude_target

    with V the number of classes whose logit is finite: a masked class gets no mass.

    Args:
        stats: statistics whose ``total_nll`` carries the same class weights.
        targets: [N] ids; anything may stand at ignored positions.
        label_smoothing: eps in [0, 1).
        smoothing_mode: ``uniform`` gives the target 1 - eps + eps / V, as PyTorch does;
            ``exclude_target`` gives it 1 - eps.
        special_tokens: target ids that are not smoothed.
        class_weight: [V] w; 1 where absent.

    Source: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2015.
    """
    own = stats.nll
    if class_weight is not None:
        weight = class_weight[targets.clamp(0, len(class_weight) - 1)]
        own = torch.where(weight == 0, 0.0, own * weight)  # also where the loss is infinite
    if label_smoothing == 0:
        return own
    total, classes = stats.total_nll, stats.num_finite
    if smoothing_mode == "exclude_target":
        total, classes = total - torch.where(own.isinf(), 0.0, own), classes - 1
    eps: float | Tensor = label_smoothing
    if special_tokens:
        special = torch.tensor(list(special_tokens), device=targets.device)
        eps = label_smoothing * (~torch.isin(targets, special)).to(own.dtype)
    return (1 - eps) * own + eps * total / classes.clamp(min=1)


def check_smoothing(label_smoothing: float, smoothing_mode: str, special_tokens: Sequence[int]) -> None:
    """
    Raises:
        ValueError: eps outside [0, 1), an unknown mode, or special tokens that are not ids.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1); got {label_smoothing}")
    if smoothing_mode not in get_args(SmoothingMode):
        known = ", ".join(map(repr, get_args(SmoothingMode)))
        raise ValueError(f"smoothing_mode must be one of {known}; got {smoothing_mode!r}")
    wrong = [t for t in special_tokens if isinstance(t, bool) or not isinstance(t, int)]
    if wrong:
        raise ValueError(f"special_tokens must be integer ids; got {wrong[0]!r}")
