"""``ScoreObjective``: the objective of a sequence scorer, squared errors times the modifiers' factors."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lossmith.core.metrics import Metrics
from lossmith.equation.batch import check_mask
from lossmith.equation.output import LossOutput, with_parts
from lossmith.equation.reduction import Denominator, Reduction, scalar_share, token_scale
from lossmith.modifiers.call import Call, check_tensor
from lossmith.modifiers.custom import CustomModifiers


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

    def flat(self) -> tuple[Tensor, Tensor]:
        """Predictions and targets, [B] and [B], in at least fp32."""
        dtype = torch.promote_types(self.predictions.dtype, torch.float32)
        return self.predictions.reshape(-1).to(dtype), self.targets.reshape(-1).to(dtype)

    def squared_errors(self) -> Tensor:
        """Squared errors in the targets' shape; 0 where a sequence does not count, whatever stands there."""
        predictions, targets = self.flat()
        errors = torch.where(self.valid, predictions - targets, 0.0)
        return errors.square().reshape(self.targets.shape)

    def reduce(self, losses: Tensor) -> Tensor:
        """Losses of the sequences, averaged or not as the reduction says."""
        rows = self.valid.unsqueeze(-1)  # [B, 1]: a sequence counts as one token
        scale = token_scale(rows, self.reduction, denominator=self.denominator, dtype=losses.dtype)
        shares = torch.where(self.valid, losses.reshape(-1), 0.0) * scale.squeeze(-1)
        return shares.reshape(self.targets.shape) if self.reduction == "none" else shares.sum()


@dataclass(frozen=True)
class ScoreObjective:
    """The objective of a sequence scorer with the modifiers of one call.

        L = (product of the modifiers' factors) * mean_b (p[b] - y[b])^2

    Args:
        call: the modifiers, and what else the pipeline was given.
    """

    call: Call

    def count(self, targets: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """How many sequences count."""
        return torch.full((), targets.numel(), device=targets.device) if mask is None else mask.bool().sum()

    def evaluate(
        self,
        predictions: Tensor | None,
        targets: Tensor,
        *,
        mask: Tensor | None = None,
        denominator: Denominator | None = None,
        token_weight: Tensor | None = None,
        shift: bool | int | None = None,
        scalars: Mapping[str, Tensor] | None = None,
    ) -> LossOutput:
        """The loss with its parts; the arguments are those of :meth:`lossmith.LossModifierPipeline.evaluate`,
        with predictions [B].

        Raises:
            TypeError: there are none, or there is what belongs to tokens.
        """
        if predictions is None:
            raise TypeError("a sequence scorer's predictions [B] are missing; pass them as logits")
        if token_weight is not None:
            raise TypeError("token_weight weighs tokens, and a sequence scorer has none; leave it out")
        if shift:
            raise TypeError("shift moves targets along a row, and a sequence scorer has none; leave it out")
        batch = ScoreBatch(predictions, targets, mask, denominator, self.call.reduction)
        share = scalar_share(batch.valid.sum().float(), denominator)
        return with_parts(self._modified(batch), {n: v * share for n, v in (scalars or {}).items()})

    def _modified(self, batch: ScoreBatch) -> LossOutput:
        call = self.call
        given, valid = call.per_position_loss, batch.valid
        losses = batch.squared_errors() if given is None else given
        unmodified = batch.reduce(losses) if call.loss is None else call.loss
        scores, before = [values.detach() for values in batch.flat()], unmodified.detach().mean()
        answers = [modifier.on_scores(*scores, valid, before) for modifier in call.built_in]
        factors = [factor for factor in answers if factor is not None]

        def output(name: str, loss: Tensor) -> LossOutput:
            total = reduce(operator.mul, factors, loss).to(loss.dtype)
            metrics = Metrics({"loss": total.sum})
            nothing = torch.zeros(0, device=loss.device)
            return LossOutput(total, {name: total}, valid.sum(), None, None, nothing, metrics)

        replaced: dict[int, Tensor] = {}  # by the custom modifier at this position

        def arguments(position: int, _: LossOutput) -> dict[str, Any]:
            earlier = [p for p in replaced if p < position]
            so_far = replaced[max(earlier)] if earlier else losses
            return {**call.for_custom, "stats": None, "per_position_loss": so_far}

        def put(position: int, loss: Tensor) -> LossOutput:
            replaced[position] = loss
            return output("custom_loss", batch.reduce(loss))

        first = output("squared_error" if call.loss is None else "loss", unmodified)
        return CustomModifiers(call.custom, batch.predictions, batch.targets, arguments, put).apply(first)
