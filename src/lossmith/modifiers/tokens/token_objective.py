"""``TokenObjective``: an objective of tokens with the modifiers of one call, as one equation."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.predictions import Logits, Predictions
from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.batch import TokenBatch
from lossmith.equation.output import LossOutput, with_parts
from lossmith.equation.term import Reads, Term, TokenLoss, Weigh, joined
from lossmith.modifiers.call import Call
from lossmith.modifiers.checks import warn_of_sparse_weights
from lossmith.modifiers.custom import CustomModifiers
from lossmith.modifiers.tokens.token_modifier import Measure, Measured, SampleLosses, TokenModifier
from lossmith.objectives.inputs import given_targets
from lossmith.objectives.objective import Objective
from lossmith.objectives.wrapped import WrappedObjective


class TokenObjective(WrappedObjective):
    """An objective of tokens with the modifiers of one call; it serves a single batch.

    Args:
        base: the objective to modify.
        call: the modifiers and the other arguments of the pipeline.
    """

    def __init__(self, base: Objective, call: Call) -> None:
        super().__init__(base)
        self.call = call
        self.reduction, self.ignore_index = call.reduction, call.ignore_index
        self._of_call: Any = {"reduction": call.reduction, "ignore_index": call.ignore_index}
        self.token_modifiers: list[TokenModifier] = call.built_in
        # a loss passed in may have its own graph, whose gradients one sweep of a linear head would lose
        self._needs_all = call.per_position_loss is not None or any(m.weighs for m in self.token_modifiers)
        self._replaced: dict[int, Tensor] = {}  # by position of the custom modifier
        self._measures: list[tuple[TokenModifier, Measure]] = []
        self._measured: list[tuple[TokenModifier, Measured]] = []
        self._token_losses: tuple[Tensor, Tensor] | None = None  # [N], before and after the modifiers
        self._stats: TokenStats | None = None  # of the batch, flat, once computed

    # ── which targets count, and for how much ─────────────────────────────────────────────────────

    def kept(self, targets: Tensor, ignore_index: int) -> Tensor:
        targets = self.base.kept(targets, ignore_index)
        for modifier in self.token_modifiers:
            keeps = modifier.keeps(targets) if modifier.changes_loss else None
            targets = targets if keeps is None else targets.masked_fill(~keeps, ignore_index)
        return targets

    def bind(
        self,
        predictions: Predictions,
        targets: Tensor,
        inputs: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> TokenBatch:
        return self.base.bind(predictions, targets, inputs, **self._of_call, **given)

    def count(self, targets: Tensor, **options: Any) -> Tensor:
        self._refuse_flat(targets)
        return self.base.count(self.kept(targets, self.ignore_index), **self._of_call, **options)

    @property
    def _given(self) -> str | None:
        """What the caller computed of the positions already, by name."""
        given = {"stats": self.call.stats, "per_position_loss": self.call.per_position_loss}
        return next((name for name, value in given.items() if value is not None), None)

    def _refuse_flat(self, targets: Tensor) -> None:
        """Raise a ValueError if a modifier weighs samples but flat targets [N] make a single sample."""
        for modifier in self.token_modifiers:
            if targets.dim() <= 1 and modifier.weighs:
                raise ValueError(
                    f"{modifier.name} weighs samples, and targets {list(targets.shape)} are one sample; pass "
                    "logits [B, T, V] and targets [B, T], not flattened (a single sequence as logits[None], "
                    "targets[None])"
                )

    @property
    def weigh(self) -> Weigh | None:
        return self._weigh if self._needs_all else self.base.weigh

    def _weigh(self, stats: TokenStats, batch: TokenBatch) -> Tensor | None:
        """[N] the product of the samples' weights, and of the base's weight of each token."""
        weight = None if self.base.weigh is None else self.base.weigh(stats, batch)
        product = self._measure(stats, batch)
        if product is None:
            return weight
        product = batch.spread(product.to(batch.scale.dtype))
        return product if weight is None else product * weight

    def _measure(self, stats: TokenStats, batch: TokenBatch) -> Tensor | None:
        """[B] the product of the weights that the modifiers measure, or None for 1."""
        if not self._measures:
            return None
        self._measured = [(m, _checked(m, measure(stats), batch)) for m, measure in self._measures]
        losses = (self._unmodified(stats, batch).detach(), self.token_loss(stats, batch).detach())
        before, after = (torch.where(batch.scale == 0, 0.0, loss * batch.scale) for loss in losses)
        self._token_losses = (before, after)
        # in a fixed order, so that the last digit does not depend on the order of the list
        ordered = sorted(self._measured, key=lambda found: found[0].name)
        weights = [measured.weight for _, measured in ordered if measured.weight is not None]
        return reduce(operator.mul, weights) if weights else None

    # ── the loss of each token ────────────────────────────────────────────────────────────────────

    def token_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return self._loss_before(len(self.call.modifiers), stats, batch)

    @property
    def token_loss_reads(self) -> Reads:
        own = self.base.token_loss_reads if self.call.per_position_loss is None else ()
        return joined(own, *(modifier.reads for modifier in self.token_modifiers))

    @property
    def reads(self) -> Reads:
        return joined(self.base.reads, self.token_loss_reads)

    def terms(self, token_loss: TokenLoss | None = None) -> Sequence[Term]:
        return self.base.terms(token_loss or TokenLoss(self.token_loss, self.token_loss_reads))

    def _loss_before(self, position: int, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[N] the loss of each token as the modifiers before this position leave it."""
        loss = self._unmodified(stats, batch)
        for before, modifier in enumerate(self.call.modifiers[:position]):
            if before in self._replaced:
                loss = _flat(self._replaced[before], batch)
            elif not modifier.is_custom and modifier.changes_loss:
                loss = modifier.token_loss(loss, stats, batch)
        return loss

    def _unmodified(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        given = self.call.per_position_loss
        return self.base.token_loss(stats, batch) if given is None else _flat(given, batch)

    # ── the batch ─────────────────────────────────────────────────────────────────────────────────

    def check_inputs(self, inputs: Iterable[str], more: Iterable[str] = ()) -> None:
        """Checks nothing: the pipeline has, and custom modifiers may take any input."""

    def look_at(self, targets: Tensor, **given: Any) -> None:
        """Show the targets to the modifiers; ``given`` as for :func:`lossmith.equation.batch.align`."""
        seen = self.kept(targets, self.ignore_index)
        self._show(self._align(seen, ignore_index=self.ignore_index, **given))

    def _show(self, batch: TokenBatch) -> None:
        """Show a batch to the modifiers, each of which says whether it can act on it."""
        for modifier in self.token_modifiers:
            modifier.look_at(batch)
        warn_of_sparse_weights(self.token_modifiers, self.reduction)

    def evaluate(
        self, logits: Tensor | Predictions | None = None, targets: Tensor | None = None, **inputs: Any
    ) -> LossOutput:
        self.targets = given_targets(targets)
        self._refuse_flat(self.targets)
        if inputs.get("sequence") is not None and (self._given is not None or self.call.custom):
            raise ValueError(
                "where sequences are split across ranks a pipeline takes no "
                f"{self._given or 'custom modifiers'}, which would be of this rank's positions alone; leave "
                "them out"
            )
        return super().evaluate(logits, targets, **inputs)

    def evaluate_batch(
        self,
        predictions: Predictions,
        batch: TokenBatch,
        inputs: Mapping[str, Any],
        scalars: Mapping[str, Tensor] | None = None,
        stats: TokenStats | None = None,
    ) -> LossOutput:
        call, custom, once_more = self.call, self.call.custom, super().evaluate_batch
        self._stats = call.stats_of(batch)
        if custom:
            predictions = Logits(predictions.logits())  # custom modifiers read them
        self._show(batch)

        def draw() -> Tensor:
            return predictions.sample(self.sweep_options.softcap).reshape(-1)

        self._measures = [(modifier, modifier.on_batch(batch, draw)) for modifier in self.token_modifiers]

        def evaluated() -> LossOutput:
            """The output with all modifiers except custom ones that change the reduced loss."""
            output = once_more(predictions, batch, inputs, scalars, self._stats)
            assert output.stats is not None
            if not self._needs_all:  # then no later step uses what modifiers measure
                self._measure(output.stats.detach(), batch)
            self._stats = output.all_stats  # do not compute them again
            return output

        def arguments(position: int, so_far: LossOutput) -> dict[str, Any]:
            assert so_far.stats is not None
            losses = self._loss_before(position, so_far.stats, batch).reshape(batch.shape)
            return {**call.for_custom, "stats": so_far.shaped().stats, "per_position_loss": losses}

        def put(position: int, loss: Tensor) -> LossOutput:
            self._replaced[position] = loss
            return evaluated()

        stays = call.loss is not None and not any(m.changes_loss for m in self.token_modifiers)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (bool(custom) or not stays)):
            output = evaluated()
        if stays and call.loss is not None:
            added = {name: part for name, part in output.parts.items() if name in (scalars or {})}
            output = with_parts(replace(output, total=call.loss, parts={"loss": call.loss}), added)
        if custom:
            logits = predictions.logits()
            output = CustomModifiers(custom, logits, self.targets, arguments, put).apply(output)
        self._record(output, batch)
        return output

    def _record(self, output: LossOutput, batch: TokenBatch) -> None:
        """Let every modifier store its metrics."""
        if self._token_losses is None:
            return
        # means over this batch alone, even if it is a micro-batch, or its losses are summed
        is_mean = isinstance(batch.share, Tensor) or self.reduction not in ("sum", "none")
        divisor = torch.as_tensor(batch.share if is_mean else batch.count, device=output.contributions.device)
        divisor = torch.where(divisor == 0, 1.0, divisor)
        rows = [batch.rows(v).sum(-1) / divisor for v in (*self._token_losses, output.contributions)]
        for modifier, measured in self._measured:
            modifier.record(measured, SampleLosses(*rows))


def _flat(loss: Tensor, batch: TokenBatch) -> Tensor:
    """[N] the given per-position losses."""
    return loss.reshape(batch.targets.shape).to(batch.scale.dtype)


def _checked(modifier: TokenModifier, measured: Any, batch: TokenBatch) -> Measured:
    """What a modifier measured, checked."""
    if not isinstance(measured, Measured):
        raise TypeError(f"{modifier.name}.measure must return a Measured; got {type(measured).__name__}")
    num_samples = len(batch.row_counts)
    if measured.weight is not None and measured.weight.shape != (num_samples,):
        raise ValueError(
            f"{modifier.name}.measure must give each sample a weight, [{num_samples}]; "
            f"got {list(measured.weight.shape)}"
        )
    return measured
