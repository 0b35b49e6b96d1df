"""``AdaptiveCrossEntropyLoss``: cross-entropy that weighs tokens by the prediction's confidence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lossmith.batch import TokenBatch
from lossmith.engine.stats import TokenStats
from lossmith.equation import Term, TokenLoss, joined
from lossmith.objectives.cross_entropy import CrossEntropyLoss
from lossmith.terms.confidence_weight import (
    SCORES,
    check_confidence_weight,
    confidence,
    confidence_weight,
)


class AdaptiveCrossEntropyLoss(CrossEntropyLoss):
    """Cross-entropy weighted by confidence c: less below the threshold, more above it.

        sum_t w(c[t]) ell[t] / D,   w: (0, lo) -> (tau, 1) -> (1, hi), piecewise linear; c detached

    c is the largest probability of the prediction, or ``confidence_scores`` [..., T] when given.

    Args:
        threshold: tau.
        weight_range: (lo, hi).
        options: of :class:`lossmith.CrossEntropyLoss`.

    Raises:
        ValueError: a threshold or a range that cannot be.
    """

    input_names = (SCORES,)
    feature_names = (SCORES,)

    def __init__(
        self, *, threshold: float = 0.7, weight_range: tuple[float, float] = (0.5, 1.5), **options: Any
    ) -> None:
        super().__init__(**options)
        check_confidence_weight(threshold, weight_range)
        self.threshold = threshold
        self.weight_range = weight_range

    def terms(self, token_loss: TokenLoss | None = None) -> list[Term]:
        main, *rest = super().terms(token_loss)
        reads = joined(main.reads, ("unscaled.top_prob",))
        return [replace(main, token_weight=self._weight, reads=reads), *rest]

    def _weight(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        certainty = confidence(stats, batch)
        return confidence_weight(certainty, threshold=self.threshold, weight_range=self.weight_range)
