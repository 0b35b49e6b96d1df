"""Focal modulation: tokens that the model already gets right count less."""

from __future__ import annotations

from torch import Tensor

from lossmith.engine.statistics.stats import TokenStats


def focal(stats: TokenStats, loss: Tensor, *, gamma: float) -> Tensor:
    """(1 - p_y)^gamma * loss, [N].

    Computed from log(1 - p_y): for gamma < 1 the derivative of x^gamma at x = 0 is infinite, and
    infinity times the vanishing loss is NaN.

    Args:
        stats: statistics that give p_y.
        loss: [N] the loss to modulate.
        gamma: >= 0; 0 leaves the loss as it is.

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017.
    """
    return (gamma * stats.target_log1m_prob).exp() * loss
