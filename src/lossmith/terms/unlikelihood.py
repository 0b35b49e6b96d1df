"""Unlikelihood: penalises probability on tokens that should not come."""

from __future__ import annotations

from torch import Tensor

from lossmith.engine.statistics.stats import TokenStats


def unlikelihood(stats: TokenStats) -> Tensor:
    """sum over the candidates c of -log(1 - p_c), [N], at temperature 1.

    Args:
        stats: statistics that include candidates; -1 means no candidate.

    Source: Welleck et al., Neural Text Generation with Unlikelihood Training, 2019.
    """
    return -stats.unscaled.candidate_log1m_prob.sum(-1)
