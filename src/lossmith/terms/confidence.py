"""Confidence penalty: penalises overconfident distributions."""

from __future__ import annotations

from torch import Tensor

from lossmith.engine.statistics.stats import TokenStats


def confidence_penalty(stats: TokenStats) -> Tensor:
    """-H(p), [N]: the negative entropy of the prediction, in nats.

    Args:
        stats: statistics of the tokens.

    Source: Pereyra et al., Regularizing Neural Networks by Penalizing Confident Output
    Distributions, 2017.
    """
    return -stats.entropy
