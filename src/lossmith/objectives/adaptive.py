"""``AdaptiveCrossEntropyLoss``: cross-entropy that weighs tokens by the prediction's confidence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.batch import TokenBatch
from lossmith.equation.term import Term, TokenLoss, joined
from lossmith.objectives.cross_entropy import CrossEntropyLoss
from lossmith.options import strict_options
from lossmith.options.shared import ConfidenceThreshold, WeightRange
from lossmith.terms.confidence_weight import SCORES, check_weight_range, confidence, confidence_weight


class AdaptiveCrossEntropyLoss(CrossEntropyLoss):
    """Cross-entropy weighted by confidence c: tokens below the threshold count less, those above it more.

        sum_t w(c[t]) ell[t] / denominator,   w piecewise linear: (0, lo) -> (tau, 1) -> (1, hi); c detached

    c is the top probability of the prediction, or ``confidence_scores`` [..., T] when given.

    Args:
        threshold: tau.
        weight_range: (lo, hi).
        options: of :class:`lossmith.CrossEntropyLoss`.

    Raises:
        TypeError: an unknown option (the message names the nearest), or one of the wrong type.
        ValueError: an option out of range, or a range of weights that does not contain 1.
    """

    input_names = (SCORES,)
    feature_names = (SCORES,)

    @strict_options(also=CrossEntropyLoss)
    def __init__(
        self, *, threshold: ConfidenceThreshold = 0.7, weight_range: WeightRange = (0.5, 1.5), **options: Any
    ) -> None:
        super().__init__(**options)
        check_weight_range(weight_range)
        self.threshold = threshold
        self.weight_range = weight_range

    def terms(self, token_loss: TokenLoss | None = None) -> list[Term]:
        main, *rest = super().terms(token_loss)
        reads = joined(main.reads, ("unscaled.top_prob",))
        return [replace(main, token_weight=self._weight, reads=reads), *rest]

    def _weight(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        certainty = confidence(stats, batch)
        return confidence_weight(certainty, threshold=self.threshold, weight_range=self.weight_range)
