"""The one equation, evaluated.

    L = sum_j lambda_j sum_t scale[t] omega_j[t] f_j(stats[t])  +  sum_k lambda_k a_k

``f_j`` is a per-token term, a differentiable function of a token's statistics; ``omega_j``
a detached weight, any function of the batch's statistics; ``scale`` the token's share of
the one denominator; ``a_k`` scalars of other tensors. Objectives, modifiers and components
are ways to fill it in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Annotated, Literal

import torch
from torch import Tensor

from lossmith.batch import TokenBatch
from lossmith.engine.stats import TokenStats
from lossmith.metrics import Metrics
from lossmith.options import option, strict_options

PerToken = Callable[[TokenStats, TokenBatch], Tensor]
Weigh = Callable[[TokenStats, TokenBatch], "Tensor | None"]
StatsOf = Callable[["Tensor | None"], TokenStats]


@strict_options
@dataclass(frozen=True)
class Term:
    """One per-token term of an objective: ``coefficient * weight * loss``.

    Args:
        name: what the term is called in ``LossOutput.parts``.
        loss: (stats, batch) -> [N], differentiable, never reduced.
        coefficient: lambda; a term whose coefficient is the number 0 is as good as absent.
        weight: (stats, batch) -> [N] or a scalar; sees detached statistics, since a weight
            that could be lowered by gradient descent would be lowered instead of the loss.
        scope: ``token`` if a token's loss and weight depend on that token alone, ``batch`` if on others.
        candidates: batch -> [N, K] ids (-1 pads) whose logits ``loss`` reads.
    """

    name: str
    loss: PerToken
    coefficient: Annotated[float | Tensor, option("lambda")] = 1.0
    weight: PerToken | None = None
    scope: Literal["token", "batch"] = "token"
    candidates: Callable[[TokenBatch], Tensor] | None = None

    @property
    def is_off(self) -> bool:
        return not isinstance(self.coefficient, Tensor) and self.coefficient == 0

    def values(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[N] coefficient * weight * loss of each token, before the batch's scale."""
        values = self.loss(stats, batch)
        if values.shape != batch.targets.shape:
            raise ValueError(
                f"term {self.name!r} must return a value per token, {list(batch.targets.shape)}, and leave "
                f"averaging to the objective; got {list(values.shape)}"
            )
        if self.weight is not None:
            weight = self.weight(stats.detach(), batch).detach()
            # an infinite loss of weight 0 is 0
            values = torch.where(weight == 0, 0.0, values * weight)
        return values * self.coefficient


@dataclass(frozen=True)
class LossOutput:
    """What an objective made of a batch.

    Attributes:
        total: the loss; the sum of ``parts``. [..., T] per token where the reduction is ``none``.
        parts: each term's contribution, weights and denominator included, by name.
        num_tokens: how many tokens were supervised (0-dimensional tensor).
        stats: the statistics of every token, flat [N]; asking for one that no term used costs
            another pass over the logits. None where there are no tokens but scores.
        batch: the tokens as they were aligned, masked, scaled and weighed; None likewise.
        contributions: [N] what each token adds to the per-token terms, detached and before ``weigh``.
        metrics: ``loss``, each part, ``nll`` (unsmoothed, temperature 1, a mean over tokens),
            ``perplexity`` and ``accuracy``; computed when they are read.
    """

    total: Tensor
    parts: dict[str, Tensor]
    num_tokens: Tensor
    stats: TokenStats | None
    batch: TokenBatch | None = field(repr=False)
    contributions: Tensor = field(repr=False)
    metrics: Metrics = field(repr=False)

    def as_dict(self) -> dict[str, Tensor]:
        """The parts, and the loss as ``total_loss``."""
        return {**self.parts, "total_loss": self.total}


def with_parts(output: LossOutput, parts: Mapping[str, Tensor]) -> LossOutput:
    """The output with further parts, weighted and divided already, added to its total."""
    if not parts:
        return output
    if output.total.dim():
        raise ValueError(
            f"the parts {', '.join(parts)} belong to no token; reduction='none' has no place for them"
        )
    twice = [name for name in parts if name in output.parts]
    if twice:
        raise ValueError(f"the parts of an objective need distinct names; {twice[0]!r} is there twice")
    total = reduce(operator.add, parts.values(), output.total)
    metrics = output.metrics | Metrics(
        {"loss": total.sum, **{name: part.sum for name, part in parts.items()}}
    )
    return replace(output, total=total, parts={**output.parts, **parts}, metrics=metrics)
