"""The one equation, evaluated.

    L = sum_j lambda_j sum_t scale[t] omega_j[t] f_j(stats[t])  +  sum_k lambda_k a_k

``f_j`` is a per-token term, a differentiable function of a token's statistics; ``omega_j``
a detached weight, any function of the batch's statistics; ``scale`` the token's share of
the one denominator; ``a_k`` scalars of other tensors. Objectives, modifiers and components
are ways to fill it in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from lossmith.batch import TokenBatch
from lossmith.engine.statistic import UNSCALED, UndeclaredRead
from lossmith.engine.stats import STATISTIC_NAMES, TokenStats, unknown_statistic
from lossmith.metrics import Metrics
from lossmith.options import option, strict_options

PerToken = Callable[[TokenStats, TokenBatch], Tensor]
Weigh = Callable[[TokenStats, TokenBatch], "Tensor | None"]
# Names of statistics, ``unscaled.`` before those at temperature 1; None for every one there is.
Reads = Annotated[Sequence[str] | None, option("names of statistics", advice='Of one, write ("nll",)')]
Scope = Literal["token", "batch"]


# Hashed by identity: torch.compile of PyTorch 2.11 hashes what it calls, before it has its fields.
@dataclass(frozen=True, eq=False)
class TokenLoss:
    """A loss of each token that terms are made of, and what it reads.

    Args:
        of: (stats, batch) -> [N].
        reads: the statistics that it reads.
    """

    of: PerToken
    reads: Reads = None

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return self.of(stats, batch)


@strict_options
@dataclass(frozen=True)
class Term:
    """One per-token term of an objective: ``coefficient * token_weight * loss``.

    What it reads and where it looks is declared. :func:`lossmith.testing.check_term` holds it to that.

    Args:
        name: what the term is called in ``LossOutput.parts``.
        loss: (stats, batch) -> [N], differentiable, never reduced.
        coefficient: lambda; a term whose coefficient is the number 0 is as good as absent.
        token_weight: (stats, batch) -> [N] or a scalar; sees detached statistics, since a weight
            that could be lowered by gradient descent would be lowered instead of the loss.
        reads: names of the statistics that ``loss`` and ``token_weight`` read, ``unscaled.nll`` for one at
            temperature 1; reading another is an error. None: every statistic, still in one pass.
        scope: ``token`` promises that a token's loss and weight depend on that token alone, which lets a
            linear head be swept once; ``batch`` promises nothing.
        candidates: batch -> [N, K] ids (-1 pads) whose logits ``loss`` reads.

    Raises:
        ValueError: an unknown scope or statistic.

    Example:
        >>> import lossmith
        >>> hard = lossmith.Term(
        ...     "hard", lambda s, b: s.nll * (1 - s.target_prob), reads=("nll", "target_prob"), scope="token"
        ... )
    """

    name: str
    loss: PerToken
    coefficient: Annotated[float | Tensor, option("lambda")] = 1.0
    token_weight: PerToken | None = None
    reads: Reads = None
    scope: Scope = "batch"
    candidates: Callable[[TokenBatch], Tensor] | None = None

    def __post_init__(self) -> None:
        for name in self.reads or ():
            if name.removeprefix(UNSCALED) not in STATISTIC_NAMES:
                raise ValueError(f"reads of the term {self.name!r}: {unknown_statistic(name)}")

    @property
    def is_off(self) -> bool:
        return not isinstance(self.coefficient, Tensor) and self.coefficient == 0

    def values(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[N] coefficient * token_weight * loss of each token, before the batch's scale.

        Raises:
            ValueError: not a value per token, or a statistic is read that was not declared.
        """
        try:
            values = self.loss(stats, batch)
            if values.shape != batch.targets.shape:
                raise ValueError(
                    f"term {self.name!r} must return a value per token, {list(batch.targets.shape)}, and "
                    f"leave averaging to the objective; got {list(values.shape)}"
                )
            if self.token_weight is not None:
                weight = self.token_weight(stats.detach(), batch).detach()
                # an infinite loss of weight 0 is 0
                values = torch.where(weight == 0, 0.0, values * weight)
        except UndeclaredRead as undeclared:
            declared = ", ".join(map(repr, (*(self.reads or ()), undeclared.name)))
            raise ValueError(
                f"the term {self.name!r} reads the statistic {undeclared.name!r}, which it does not declare; "
                f"write reads=({declared})"
            ) from None
        return values * self.coefficient


def joined(*reads: Reads) -> Reads:
    """All that one of these reads."""
    return None if None in reads else tuple(dict.fromkeys(name for names in reads for name in names or ()))


@dataclass(frozen=True)
class LossOutput:
    """What an objective made of a batch.

    Attributes:
        total: the loss; the sum of ``parts``. [..., T] per token where the reduction is ``none``.
        parts: each term's contribution, weights and denominator included, by name.
        num_tokens: how many tokens were supervised (0-dimensional tensor).
        stats: the statistics of every token, in the shape of the targets; asking for one that no term used
            costs another pass over the logits. None where there are no tokens but scores.
        batch: the tokens as they were aligned, masked, scaled and weighed, flat [N] (``stats.flat()`` goes
            with it); None likewise.
        contributions: [N] what each token adds to the per-token terms, detached and before ``weigh``.
        metrics: ``loss``, each part, ``nll`` (unsmoothed, temperature 1, a mean over tokens),
            ``perplexity`` and ``accuracy``; computed when they are read.
        all_stats: the statistics, flat, also where something else than a loss looks at the predictions of a
            position without a target (``batch.also_read``).
    """

    total: Tensor
    parts: dict[str, Tensor]
    num_tokens: Tensor
    stats: TokenStats | None
    batch: TokenBatch | None = field(repr=False)
    contributions: Tensor = field(repr=False)
    metrics: Metrics = field(repr=False)
    all_stats: TokenStats | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Tensor]:
        """The parts, and the loss as ``total_loss``."""
        return {**self.parts, "total_loss": self.total}

    def shaped(self) -> LossOutput:
        """The same with the statistics, flat while the loss is made, in the shape of the targets."""
        if self.stats is None or self.batch is None:
            return self
        return replace(self, stats=self.stats.reshape(self.batch.shape))

    def __getstate__(self) -> dict[str, Any]:
        """Numbers without a graph, for pickle and ``copy.deepcopy``."""
        parts = {name: part.detach() for name, part in self.parts.items()}
        return {**self.__dict__, "total": self.total.detach(), "parts": parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # past the frozen setattr


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
    added = Metrics({"loss": total.sum, **{name: part.sum for name, part in parts.items()}})
    metrics = output.metrics.joined(added)
    return replace(output, total=total, parts={**output.parts, **parts}, metrics=metrics)
