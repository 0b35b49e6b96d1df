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
from lossmith.engine.predictions import Predictions
from lossmith.equation.batch import check_mask
from lossmith.equation.output import LossOutput, with_parts
from lossmith.equation.reduction import Denominator, scalar_share, scaled, token_scale
from lossmith.modifiers.call import Call, check_tensor
from lossmith.modifiers.custom import CustomModifiers


@dataclass(frozen=True)
class ScoreObjective:
    """The objective of a sequence scorer with the modifiers of one call.

        L = (product of the modifiers' factors) * mean_b (p[b] - y[b])^2

    Args:
        call: the modifiers and the other arguments of the pipeline.
    """

    call: Call

    def count(self, targets: Tensor, *, mask: Tensor | None = None, shift: Any = None) -> Tensor:
        """How many sequences count; ``shift`` has no meaning for them."""
        return torch.full((), targets.numel(), device=targets.device) if mask is None else mask.bool().sum()

    def evaluate(
        self,
        predictions: Tensor | Predictions | None,
        targets: Tensor,
        *,
        mask: Tensor | None = None,
        denominator: Denominator | None = None,
        token_weight: Tensor | None = None,
        shift: bool | int | None = None,
        sequence: Any = None,
        scalars: Mapping[str, Tensor] | None = None,
        **_: Any,
    ) -> LossOutput:
        """The loss with its parts.

        Args:
            predictions: [B] or [B, 1].
            targets: [B].
            mask: [B], 0 where a sequence is ignored.
            denominator, scalars: as for :meth:`lossmith.LossModifierPipeline.evaluate`.
            token_weight, shift, sequence: refused; further inputs are for custom modifiers.

        Raises:
            TypeError: predictions that are missing or not floating point, or an input that belongs to tokens.
            ValueError: shapes that do not match.
        """
        if not isinstance(predictions, Tensor):
            raise TypeError("a sequence scorer's predictions [B] are missing; pass them as logits")
        if token_weight is not None:
            raise TypeError("token_weight weighs tokens, and a sequence scorer has none; leave it out")
        if shift:
            raise TypeError("shift moves targets along a row, and a sequence scorer has none; leave it out")
        if sequence is not None:
            raise TypeError(
                "sequence splits tokens across ranks, and a sequence scorer has none; leave it out"
            )
        _check_scores(predictions, targets, mask)
        valid = (torch.ones_like(targets, dtype=torch.bool) if mask is None else mask != 0).reshape(-1)
        output = self._modified(predictions, targets, valid, denominator)
        share = scalar_share(valid.sum().float(), denominator)
        return with_parts(output, {name: value * share for name, value in (scalars or {}).items()})

    def _modified(
        self, predictions: Tensor, targets: Tensor, valid: Tensor, denominator: Denominator | None
    ) -> LossOutput:
        """The loss of the sequences that are ``valid`` [B], modified."""
        call = self.call
        dtype = torch.promote_types(predictions.dtype, torch.float32)
        scores, truth = predictions.reshape(-1).to(dtype), targets.reshape(-1).to(dtype)
        # 0 for ignored sequences, whatever their values
        losses = torch.where(valid, scores - truth, 0.0).square().reshape(targets.shape)
        losses = losses if call.per_position_loss is None else call.per_position_loss

        def reduced(losses: Tensor) -> Tensor:
            rows = valid.unsqueeze(-1)  # [B, 1]: a sequence counts as one token
            scale, _ = token_scale(rows, call.reduction, denominator=denominator, dtype=losses.dtype)
            shares = scaled(losses.reshape(-1), scale.squeeze(-1))
            return shares.reshape(targets.shape) if call.reduction == "none" else shares.sum()

        unmodified = reduced(losses) if call.loss is None else call.loss
        seen = scores.detach(), truth.detach(), valid, unmodified.detach().mean()
        answers = [modifier.on_scores(*seen) for modifier in call.built_in]
        factors = [factor for factor in answers if factor is not None]

        def output(name: str, loss: Tensor) -> LossOutput:
            total = reduce(operator.mul, factors, loss).to(loss.dtype)
            nothing, metrics = loss.new_zeros(0, 0), Metrics({"loss": total.sum})
            return LossOutput(total, {name: total}, valid, None, None, nothing, metrics)

        replaced: dict[int, Tensor] = {}  # by position of the custom modifier

        def arguments(position: int, _: LossOutput) -> dict[str, Any]:
            earlier = [p for p in replaced if p < position]
            so_far = replaced[max(earlier)] if earlier else losses
            return {**call.for_custom, "stats": None, "per_position_loss": so_far}

        def put(position: int, loss: Tensor) -> LossOutput:
            replaced[position] = loss
            return output("custom_loss", reduced(loss))

        first = output("squared_error" if call.loss is None else "loss", unmodified)
        return CustomModifiers(call.custom, predictions, targets, arguments, put).apply(first)


def _check_scores(predictions: Tensor, targets: Tensor, mask: Tensor | None) -> None:
    if not predictions.is_floating_point():
        raise TypeError(f"a sequence scorer's predictions must be floating point; got {predictions.dtype}")
    fits = predictions.shape in (targets.shape, (*targets.shape, 1))
    if not fits or targets.dim() > 1 or not targets.numel():
        raise ValueError(
            "a sequence scorer has one prediction and one target a sequence, [B] and [B], at least one; "
            f"got {list(predictions.shape)} and {list(targets.shape)}"
        )
    check_tensor("mask", mask)
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"mask must be [B] = {list(targets.shape)}; got {list(mask.shape)}")
    if mask is not None:
        check_mask("mask", mask)
