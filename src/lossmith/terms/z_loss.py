"""z-loss: keeps the log-partition function near 0."""

from __future__ import annotations

from torch import Tensor

from lossmith.engine.statistics.stats import TokenStats


def z_loss(stats: TokenStats) -> Tensor:
    """logsumexp(z)^2, [N], at temperature 1.

    Args:
        stats: statistics of the tokens.

    Source: de Brebisson and Vincent, The Z-loss, 2016; Chowdhery et al., PaLM, 2022.
    """
    return stats.unscaled.logsumexp.square()
