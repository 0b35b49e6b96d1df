"""``CrossEntropyLoss``: the cross-entropy family as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lossmith.batch import TokenBatch
from lossmith.engine.stats import TokenStats
from lossmith.equation import PerToken, Term
from lossmith.objective import Objective
from lossmith.options import strict_options
from lossmith.reduction import Empty, Reduction
from lossmith.temperature import AdaptiveTemperature
from lossmith.terms.confidence import confidence_penalty as negative_entropy
from lossmith.terms.cross_entropy import SmoothingMode, check_smoothing, cross_entropy, smooth
from lossmith.terms.focal import focal
from lossmith.terms.z_loss import z_loss as squared_logsumexp


class CrossEntropyLoss(Objective):
    """Cross-entropy with everything people add to it; the module of :func:`lossmith.cross_entropy`.

        (1 - p_y)^focal_gamma * smoothed cross-entropy  +  z_loss * logsumexp^2  -  confidence_penalty * H(p)

    Args:
        label_smoothing, smoothing_mode, special_tokens, class_weight, temperature, softcap, z_loss,
            focal_gamma, confidence_penalty: see :func:`lossmith.cross_entropy`.
        reduction, ignore_index, shift, empty: see :class:`lossmith.Objective`.

    Raises:
        TypeError: an unknown option; the message names the nearest.
        ValueError: an option out of range.

    Example:
        >>> import torch, lossmith
        >>> criterion = lossmith.CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-4)
        >>> logits = torch.zeros(2, 3, 5, requires_grad=True)
        >>> round(criterion(logits, torch.ones(2, 3, dtype=torch.long)).item(), 4)
        1.6097
    """

    @strict_options
    def __init__(
        self,
        *,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        smoothing_mode: SmoothingMode = "uniform",
        special_tokens: Sequence[int] = (),
        class_weight: Tensor | None = None,
        temperature: float | Tensor | AdaptiveTemperature = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        focal_gamma: float = 0.0,
        confidence_penalty: float = 0.0,
        shift: bool | int | None = None,
        empty: Empty = "zero",
    ) -> None:
        super().__init__(
            reduction=reduction,
            ignore_index=ignore_index,
            shift=shift,
            empty=empty,
            temperature=temperature,
            softcap=softcap,
            class_weight=class_weight,
        )
        check_smoothing(label_smoothing, smoothing_mode, special_tokens)
        if not 0 <= focal_gamma < math.inf:
            raise ValueError(f"focal_gamma must be >= 0; got {focal_gamma}")
        for name, value in (("z_loss", z_loss), ("confidence_penalty", confidence_penalty)):
            if not abs(value) < math.inf:
                raise ValueError(f"{name} must be a finite coefficient; got {value}")
        self.label_smoothing = label_smoothing
        self.smoothing_mode: SmoothingMode = smoothing_mode
        self.special_tokens = tuple(special_tokens)
        self.z_loss = z_loss
        self.focal_gamma = focal_gamma
        self.confidence_penalty = confidence_penalty

    def terms(self, token_loss: PerToken | None = None) -> list[Term]:
        own = token_loss or self.token_loss
        # Class weights weigh a token as a whole, so that scaling them all changes nothing.
        weight = None if self.class_weight is None else lambda _, batch: batch.target_weight

        def modulated(stats: TokenStats, batch: TokenBatch) -> Tensor:
            loss = own(stats, batch)
            return focal(stats, loss, gamma=self.focal_gamma) if self.focal_gamma else loss

        return [
            Term("cross_entropy", modulated),
            Term("z_loss", lambda stats, _: squared_logsumexp(stats), self.z_loss, weight),
            Term(
                "confidence_penalty",
                lambda stats, _: negative_entropy(stats),
                self.confidence_penalty,
                weight,
            ),
        ]

    def token_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[N] cross-entropy, smoothed and class-weighted; focal weighting comes on top."""
        return smooth(
            cross_entropy(stats, batch.target_weight),
            stats,
            batch,
            label_smoothing=self.label_smoothing,
            smoothing_mode=self.smoothing_mode,
            special_tokens=self.special_tokens,
        )

    def extra_repr(self) -> str:
        shown = ("label_smoothing", "temperature", "softcap", "z_loss", "focal_gamma", "confidence_penalty")
        values = {name: getattr(self, name) for name in shown}
        changed = [f"{n}={v}" for n, v in values.items() if isinstance(v, int | float) and v not in (0, 1)]
        return ", ".join([f"reduction={self.reduction!r}", *changed])
