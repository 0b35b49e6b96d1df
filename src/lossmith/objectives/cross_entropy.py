"""``CrossEntropyLoss``: the cross-entropy family as a module."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from typing_extensions import TypedDict

from lossmith.engine.predictions import Logits
from lossmith.engine.rows.backends import BackendName
from lossmith.engine.statistics.stats import TokenStats
from lossmith.engine.tokens.family import CrossEntropyFamily
from lossmith.engine.watched import is_eager
from lossmith.equation.batch import TokenBatch
from lossmith.equation.cross_entropy import total_of_cross_entropy
from lossmith.equation.reduction import Empty, Reduction
from lossmith.equation.term import Reads, Term, TokenLoss, joined
from lossmith.objectives.objective import Objective
from lossmith.objectives.temperature import AdaptiveTemperature
from lossmith.options import strict_options
from lossmith.options.shared import (
    ClassWeight,
    ConfidencePenaltyCoefficient,
    FocalGamma,
    IgnoreIndex,
    LabelSmoothing,
    Shift,
    Softcap,
    SpecialTokens,
    Temperature,
    ZLossCoefficient,
)
from lossmith.terms.confidence import confidence_penalty as negative_entropy
from lossmith.terms.cross_entropy import SmoothingMode, cross_entropy, smooth
from lossmith.terms.focal import focal
from lossmith.terms.z_loss import z_loss as squared_logsumexp

_family = functools.lru_cache(CrossEntropyFamily)
_NUMBERS = (int, float)


class CrossEntropyOptions(TypedDict, total=False):
    """The options of the family, for type checkers; :class:`CrossEntropyLoss` has the defaults."""

    reduction: Reduction
    ignore_index: IgnoreIndex
    label_smoothing: LabelSmoothing
    smoothing_mode: SmoothingMode
    special_tokens: SpecialTokens
    class_weight: ClassWeight
    temperature: Temperature | AdaptiveTemperature
    softcap: Softcap
    z_loss: ZLossCoefficient
    focal_gamma: FocalGamma
    confidence_penalty: ConfidencePenaltyCoefficient
    shift: Shift | None
    empty: Empty
    backend: BackendName


class CrossEntropyLoss(Objective):
    """Cross-entropy with everything people add to it: :func:`lossmith.cross_entropy` as a module.

    ``logits[t]`` predict ``targets[t]``. Pass ``shift=True`` with unshifted labels, as Hugging Face has them;
    without it the model learns to copy its input.

        (1 - p_y)^focal_gamma * smoothed cross-entropy  +  z_loss * logsumexp^2  -  confidence_penalty * H(p)

    Args:
        label_smoothing, smoothing_mode, special_tokens, class_weight, temperature, softcap, z_loss,
            focal_gamma, confidence_penalty: see :func:`lossmith.cross_entropy`.
        reduction, ignore_index, shift, empty, backend: see :class:`lossmith.Objective`.

    Raises:
        TypeError: an unknown option (the message names the nearest), or one of the wrong type.
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
        ignore_index: IgnoreIndex = -100,
        label_smoothing: LabelSmoothing = 0.0,
        smoothing_mode: SmoothingMode = "uniform",
        special_tokens: SpecialTokens = (),
        class_weight: ClassWeight = None,
        temperature: Temperature | AdaptiveTemperature = 1.0,
        softcap: Softcap = None,
        z_loss: ZLossCoefficient = 0.0,
        focal_gamma: FocalGamma = 0.0,
        confidence_penalty: ConfidencePenaltyCoefficient = 0.0,
        shift: Shift | None = None,
        empty: Empty = "zero",
        backend: BackendName = None,
    ) -> None:
        super().__init__(
            reduction=reduction,
            ignore_index=ignore_index,
            shift=shift,
            empty=empty,
            temperature=temperature,
            softcap=softcap,
            class_weight=class_weight,
            backend=backend,
        )
        self.label_smoothing = label_smoothing
        self.smoothing_mode: SmoothingMode = smoothing_mode
        self.special_tokens = tuple(special_tokens)
        self.z_loss = z_loss
        self.focal_gamma = focal_gamma
        self.confidence_penalty = confidence_penalty

    def terms(self, token_loss: TokenLoss | None = None) -> list[Term]:
        own = self._own_token_loss(token_loss)
        # Class weights apply to all terms of a token, so that scaling all of them changes nothing.
        weight = None if self.class_weight is None else lambda _, batch: batch.target_weight

        def modulated(stats: TokenStats, batch: TokenBatch) -> Tensor:
            loss = own(stats, batch)
            return focal(stats, loss, gamma=self.focal_gamma) if self.focal_gamma else loss

        return [
            Term(
                "cross_entropy",
                modulated,
                reads=joined(own.reads, ("target_log1m_prob",) if self.focal_gamma else ()),
                scope="token",
            ),
            Term(
                "z_loss",
                lambda stats, _: squared_logsumexp(stats),
                self.z_loss,
                weight,
                reads=("unscaled.logsumexp",),
                scope="token",
            ),
            Term(
                "confidence_penalty",
                lambda stats, _: negative_entropy(stats),
                self.confidence_penalty,
                weight,
                reads=("entropy",),
                scope="token",
            ),
        ]

    @property
    def family(self) -> CrossEntropyFamily | None:
        kind, own = type(self), CrossEntropyLoss
        is_own = kind.terms is own.terms and kind.token_loss is own.token_loss and kind.weigh is own.weigh
        excludes_target = self.smoothing_mode == "exclude_target"
        numbers = self.label_smoothing, self.focal_gamma, self.z_loss, self.confidence_penalty
        if not is_own or self.special_tokens or not all(type(one) in _NUMBERS for one in numbers):
            return None
        smoothing, *others = numbers
        return _family(smoothing, excludes_target, *others)

    def forward(self, *args: Any, return_detailed: bool = False, **inputs: Any) -> Tensor | dict[str, Tensor]:
        """The loss; see :class:`lossmith.Objective`."""
        if len(args) == 2 and not inputs and not return_detailed and type(self) is CrossEntropyLoss:
            total = self._total(*args)
            if total is not None:
                return total
        return super().forward(*args, return_detailed=return_detailed, **inputs)

    def _total(self, logits: Any, targets: Any) -> Tensor | None:
        """The loss alone of logits and targets alone; None where it takes the long way, which has the
        messages for what is no tensor."""
        is_plain = not self.shift and self.reduction != "none" and self.pad_token_id is None
        if not is_plain or type(self.ignore_index) is not int or not is_eager(logits, targets):
            return None
        if logits is None or targets is None or isinstance(self.temperature, AdaptiveTemperature):
            return None
        predictions, family = Logits(logits), self.family
        predictions.check(targets)
        if family is None or not predictions.has_cross_entropy(self.backend, self.softcap):
            return None
        how = {"ignore_index": self.ignore_index, "reduction": self.reduction, "empty": self.empty}
        return total_of_cross_entropy(family, predictions, targets, self.sweep_options, **how)

    @property
    def token_loss_reads(self) -> Reads:
        return ("nll", "total_nll", "num_finite") if self.label_smoothing else ("nll",)

    def token_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[N] cross-entropy, smoothed and class-weighted; focal weighting is applied afterwards."""
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
