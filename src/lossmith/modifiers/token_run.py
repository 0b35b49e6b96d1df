"""``TokenRun``: one batch of tokens on its way through a pipeline, as one equation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.predictions import Predictions
from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.batch import TokenBatch
from lossmith.equation.evaluation import evaluate
from lossmith.equation.output import LossOutput, with_parts
from lossmith.equation.term import TokenLoss, joined
from lossmith.modifiers.base import BaseLossModifier
from lossmith.modifiers.checks import checked_measured
from lossmith.modifiers.custom import CustomModifiers
from lossmith.modifiers.token_modifier import Measure, Measured, SampleLosses, TokenModifier
from lossmith.objectives.objective import Objective

Step = Callable[[Tensor, TokenStats, TokenBatch], Tensor]


@dataclass
class TokenRun:
    """One batch, the modifiers that are enabled for it, and what they have made of it so far.

    Attributes:
        base: the objective that is modified.
        modifiers: the enabled ones, in the pipeline's order.
        predictions, batch: what is judged, and by what.
        stats: the batch's statistics, flat; None until they are computed, once.
        given_loss: [..., T] the caller's per-position loss, in place of the objective's own.
        is_mean: whether losses are divided by anything.
        options: further arguments of :func:`lossmith.equation.evaluate`.
        inputs: what else the objective was given.
    """

    base: Objective
    modifiers: Sequence[BaseLossModifier]
    predictions: Predictions
    batch: TokenBatch
    stats: TokenStats | None
    given_loss: Tensor | None
    is_mean: bool
    options: Mapping[str, Any]
    inputs: Mapping[str, Any]
    replaced: dict[int, Tensor] = field(default_factory=dict)  # by the custom modifier at this position

    def __post_init__(self) -> None:
        own = [modifier for modifier in self.modifiers if isinstance(modifier, TokenModifier)]
        tell_of_idle(own, self.batch)
        self._measures: dict[TokenModifier, Measure] = {m: m.on_batch(self.batch, self._draw) for m in own}
        self._measured: dict[TokenModifier, Measured] = {}
        self._token_losses: tuple[Tensor, Tensor] | None = None

    def _draw(self) -> Tensor:
        """[N] ids drawn from the model's distribution."""
        return self.predictions.sample(self.base.sweep_options.softcap).reshape(-1)

    def token_loss(self, until: int | None = None) -> TokenLoss:
        """The loss of each token [N] after the modifiers before position ``until``."""
        steps = [self._step(position) for position in range(len(self.modifiers))[:until]]

        def loss_of(stats: TokenStats, batch: TokenBatch) -> Tensor:
            loss = self._unmodified(stats, batch)
            for step in steps:
                loss = step(loss, stats, batch)
            return loss

        own = self.base.token_loss_reads if self.given_loss is None else ()
        return TokenLoss(loss_of, joined(own, *(modifier.reads for modifier in self._measures)))

    def _unmodified(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        if self.given_loss is None:
            return self.base.token_loss(stats, batch)
        return self.given_loss.reshape(batch.targets.shape).to(batch.scale.dtype)

    def _step(self, position: int) -> Step:
        modifier = self.modifiers[position]
        if position in self.replaced:
            given = self.replaced[position].reshape(self.batch.targets.shape).to(self.batch.scale.dtype)
            return lambda loss, stats, batch: given
        if isinstance(modifier, TokenModifier) and modifier.changes_loss:
            return modifier.token_loss
        return lambda loss, stats, batch: loss

    def finish(self, targets: Tensor, loss: Tensor | None, for_custom: Mapping[str, Any]) -> LossOutput:
        """The modified loss.

        Args:
            targets: as they were given.
            loss: the caller's reduced loss, which stays where nothing but custom modifiers changes it.
            for_custom: further arguments of custom modifiers.
        """
        custom = [(p, m) for p, m in enumerate(self.modifiers) if not isinstance(m, TokenModifier)]
        stays = loss is not None and not any(modifier.changes_loss for modifier in self._measures)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (bool(custom) or not stays)):
            output = self._evaluate()
        if stays and loss is not None:
            scalars = {name: part for name, part in output.parts.items() if name in self._scalars()}
            output = with_parts(replace(output, total=loss, parts={"loss": loss}), scalars)
        if custom:
            output = CustomModifiers(
                custom,
                self.predictions.logits(),
                targets,
                lambda position, so_far: {
                    **for_custom,
                    "stats": so_far.shaped().stats,
                    "per_position_loss": self._so_far(position, so_far),
                },
                self._put,
            ).apply(output)
        self._record(output)
        return output.shaped()

    def _scalars(self) -> Mapping[str, Tensor]:
        return self.options.get("scalars") or {}

    def _put(self, position: int, loss: Tensor) -> LossOutput:
        """The objective with the loss that the custom modifier at this position made of each token."""
        self.replaced[position] = loss
        return self._evaluate()

    def _so_far(self, position: int, output: LossOutput) -> Tensor:
        """[..., T] the loss of each position as the modifiers before this one leave it."""
        assert output.stats is not None
        return self.token_loss(position)(output.stats, self.batch).reshape(self.batch.shape)

    def _evaluate(self) -> LossOutput:
        """The objective with all modifiers but the custom ones that work on the reduced loss."""
        needs_all = self.given_loss is not None or any(modifier.weighs for modifier in self._measures)
        output = evaluate(
            self.base.terms(self.token_loss()),
            self.predictions,
            self.batch,
            self.base.sweep_options,
            stats=self.stats,
            weigh=self._weigh if needs_all else None,
            reads=joined(self.base.reads, self.token_loss().reads),
            **self.options,
        )
        assert output.stats is not None
        if not needs_all:  # then nothing waits for what modifiers measure
            self._weigh(output.stats.detach(), self.batch)
        self.stats = output.all_stats  # what is known is not computed again
        return self.base.complete(output, self.inputs)

    def _weigh(self, stats: TokenStats, batch: TokenBatch) -> Tensor | None:
        """[N] the product of the samples' weights."""
        if not self._measures:
            return None
        rows = len(batch.row_counts)
        self._measured = {
            m: checked_measured(m, measure(stats), rows) for m, measure in self._measures.items()
        }
        losses = (self._unmodified(stats, batch).detach(), self.token_loss()(stats, batch).detach())
        before, after = (torch.where(batch.scale == 0, 0.0, loss * batch.scale) for loss in losses)
        self._token_losses = (before, after)
        product = None
        # in an order of their own, so that the last digit does not depend on that of the list
        for _, measured in sorted(self._measured.items(), key=lambda found: found[0].name):
            if measured.weight is not None:
                product = measured.weight if product is None else product * measured.weight
        return None if product is None else batch.spread(product.to(batch.scale.dtype))

    def _record(self, output: LossOutput) -> None:
        """Let every modifier keep its metrics."""
        if self._token_losses is None:
            return
        # means of this batch alone, also where it is a part of a larger one, or its losses are summed
        divisor = self.batch.share if self.is_mean else self.batch.count
        divisor = torch.as_tensor(divisor, device=output.contributions.device)
        divisor = torch.where(divisor == 0, 1.0, divisor)
        rows = [self.batch.rows(v).sum(-1) / divisor for v in (*self._token_losses, output.contributions)]
        for modifier, measured in self._measured.items():
            modifier.record(measured, SampleLosses(*rows))


def tell_of_idle(modifiers: Sequence[BaseLossModifier], batch: TokenBatch) -> None:
    """Let those that cannot act on batches like this one say so; a compiled graph has no say."""
    for modifier in modifiers:
        if isinstance(modifier, TokenModifier) and not torch.compiler.is_compiling():
            modifier.tell_if_idle(modifier.idle_because(batch))
