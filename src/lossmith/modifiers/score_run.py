"""The loss of a sequence scorer: squared error times the modifiers' factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.core.metrics import Metrics
from lossmith.equation.batch import check_mask
from lossmith.equation.output import LossOutput
from lossmith.equation.reduction import Denominator, Reduction, scalar_share, token_scale
from lossmith.modifiers.base import BaseLossModifier
from lossmith.modifiers.checks import check_tensor, checked_factor
from lossmith.modifiers.custom import CustomModifiers
from lossmith.modifiers.metrics_collector import MetricsCollectorModifier
from lossmith.modifiers.scorer_modifier import ScorerModifier


@dataclass(frozen=True)
class ScoreBatch:
    """Predictions [B] (or [B, 1]) and targets [B] of sequences, and how their errors are averaged.

    Raises:
        TypeError: predictions that are not floating point, or a mask that is none.
        ValueError: shapes that do not match.
    """

    predictions: Tensor
    targets: Tensor
    mask: Tensor | None
    denominator: Denominator | None
    reduction: Reduction

    def __post_init__(self) -> None:
        if not self.predictions.is_floating_point():
            raise TypeError(
                f"a sequence scorer's predictions must be floating point; got {self.predictions.dtype}"
            )
        fits = self.predictions.shape in (self.targets.shape, (*self.targets.shape, 1))
        if not fits or self.targets.dim() > 1 or not self.targets.numel():
            raise ValueError(
                "a sequence scorer has one prediction and one target a sequence, [B] and [B], at least one; "
                f"got {list(self.predictions.shape)} and {list(self.targets.shape)}"
            )
        check_tensor("mask", self.mask)
        if self.mask is not None and self.mask.shape != self.targets.shape:
            raise ValueError(f"mask must be [B] = {list(self.targets.shape)}; got {list(self.mask.shape)}")
        if self.mask is not None:
            check_mask("mask", self.mask)

    @property
    def valid(self) -> Tensor:
        """[B] bool, the sequences that count."""
        everything = torch.ones_like(self.targets, dtype=torch.bool)
        return everything.reshape(-1) if self.mask is None else self.mask.reshape(-1) != 0

    @property
    def share(self) -> Tensor | float:
        """This batch's part of the caller's denominator."""
        return scalar_share(self.valid.sum().float(), self.denominator)

    def flat(self) -> tuple[Tensor, Tensor]:
        """Predictions and targets, [B] and [B], in at least fp32."""
        dtype = torch.promote_types(self.predictions.dtype, torch.float32)
        return self.predictions.reshape(-1).to(dtype), self.targets.reshape(-1).to(dtype)

    def reduce(self, losses: Tensor) -> Tensor:
        """Losses [B] of the sequences, averaged or not as the reduction says."""
        rows = self.valid.unsqueeze(-1)  # [B, 1]: a sequence counts as one token
        scale = token_scale(rows, self.reduction, denominator=self.denominator, dtype=losses.dtype)
        shares = torch.where(self.valid, losses.reshape(-1), 0.0) * scale.squeeze(-1)
        return shares.reshape(self.targets.shape) if self.reduction == "none" else shares.sum()

    def squared_errors(self) -> Tensor:
        """[B] squared errors; 0 where a sequence does not count, whatever stands there."""
        predictions, targets = self.flat()
        return torch.where(self.valid, predictions - targets, 0.0).square()


def evaluate_scores(
    modifiers: Sequence[BaseLossModifier],
    batch: ScoreBatch,
    loss: Tensor | None,
    per_position_loss: Tensor | None,
    for_custom: Mapping[str, Any],
) -> LossOutput:
    """The loss (squared error unless another is given), modified.

    Args:
        modifiers: the enabled ones, in order.
        batch: the predictions and targets.
        loss: the caller's reduced loss.
        per_position_loss: [B] the caller's loss of each sequence.
        for_custom: further arguments of custom modifiers.
    """
    predictions, targets = (values.detach() for values in batch.flat())
    losses = batch.squared_errors() if per_position_loss is None else per_position_loss
    losses = losses.reshape(batch.targets.shape)
    unmodified = batch.reduce(losses) if loss is None else loss
    product: Tensor | float = 1.0
    for modifier in modifiers:
        if isinstance(modifier, ScorerModifier):
            if not torch.compiler.is_compiling():
                modifier.tell_if_idle(modifier.idle_because(predictions.numel()))
            factor, metrics = checked_factor(modifier, modifier.factor(predictions, targets, batch.valid))
            modifier.record(factor, metrics, unmodified.detach().mean())
            product = product * factor.detach()
        elif isinstance(modifier, MetricsCollectorModifier):
            modifier.observe_scores(predictions, targets, batch.valid)

    def output(name: str, of: Tensor) -> LossOutput:
        total = (of * product).to(of.dtype) if isinstance(product, Tensor) else of
        num_scores, nothing = batch.valid.sum(), torch.zeros(0, device=of.device)
        return LossOutput(total, {name: total}, num_scores, None, None, nothing, Metrics({"loss": total.sum}))

    replaced: dict[int, Tensor] = {}  # by the custom modifier at this position

    def arguments(position: int, _: LossOutput) -> dict[str, Any]:
        before = [p for p in replaced if p < position]
        so_far = replaced[max(before)] if before else losses
        return {**for_custom, "stats": None, "per_position_loss": so_far}

    def put(position: int, given: Tensor) -> LossOutput:
        replaced[position] = given
        return output("custom_loss", batch.reduce(given))

    custom = [
        (position, modifier)
        for position, modifier in enumerate(modifiers)
        if not isinstance(modifier, ScorerModifier | MetricsCollectorModifier)
    ]
    first = output("squared_error" if loss is None else "loss", unmodified)
    return CustomModifiers(custom, batch.predictions, batch.targets, arguments, put).apply(first)
