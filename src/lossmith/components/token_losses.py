"""Per-token losses as components: focal, z-loss, confidence penalty, calibration of a confidence head."""

from __future__ import annotations

from lossmith.components.component import Component
from lossmith.equation.term import Term
from lossmith.options import strict_options
from lossmith.options.shared import FocalAlpha, FocalGamma
from lossmith.terms.confidence import confidence_penalty
from lossmith.terms.confidence_weight import SCORES, calibration
from lossmith.terms.focal import focal
from lossmith.terms.z_loss import z_loss


class Focal(Component):
    """Focal loss added to the main loss: alpha (1 - p_y)^gamma nll.

    Args:
        gamma: >= 0.
        alpha: a constant factor.

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017.
    """

    @strict_options
    def __init__(self, gamma: FocalGamma = 2.0, alpha: FocalAlpha = 1.0) -> None:
        super().__init__()
        self.gamma, self.alpha = gamma, alpha

    def term(self) -> Term:
        return Term(
            "focal",
            lambda stats, _: self.alpha * focal(stats, stats.nll, gamma=self.gamma),
            reads=("nll", "target_log1m_prob"),
            scope="token",
        )


class ZLoss(Component):
    """logsumexp(z)^2 at temperature 1.

    Source: de Brebisson and Vincent, The Z-loss, 2016.
    """

    def term(self) -> Term:
        return Term("z_loss", lambda stats, _: z_loss(stats), reads=("unscaled.logsumexp",), scope="token")


class ConfidencePenalty(Component):
    """The negative entropy of the prediction, -H(p).

    Source: Pereyra et al., Regularizing Neural Networks by Penalizing Confident Output
    Distributions, 2017.
    """

    def term(self) -> Term:
        return Term(
            "confidence_penalty",
            lambda stats, _: confidence_penalty(stats),
            reads=("entropy",),
            scope="token",
        )


class ConfidenceCalibration(Component):
    """Binary cross-entropy of ``confidence_scores`` [..., T] against "top-1 was right"; 0 without scores."""

    optional = (SCORES,)
    per_position = (SCORES,)

    def term(self) -> Term:
        return Term("calibration", calibration, reads=("unscaled.correct",), scope="token")
