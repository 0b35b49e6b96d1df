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
from typing import Literal

import torch
from torch import Tensor

from lossmith.batch import TokenBatch
from lossmith.distributed import masked_mean
from lossmith.engine.stats import TokenStats
from lossmith.metrics import Metrics

PerToken = Callable[[TokenStats, TokenBatch], Tensor]
Weigh = Callable[[TokenStats, TokenBatch], "Tensor | None"]
StatsOf = Callable[["Tensor | None"], TokenStats]


@dataclass(frozen=True)
class Term:
    """One per-token term of an objective: ``coefficient * weight * loss``.

    Args:
        name: what the term is called in ``LossOutput.parts``.
        loss: (stats, batch) -> [N], differentiable, never reduced.
        coefficient: lambda; a term whose coefficient is the number 0 is as good as absent.
        weight: (stats, batch) -> [N] or a scalar; sees detached statistics, since a weight
            that could be lowered by gradient descent would be lowered instead of the loss.
        scope: ``token`` if a token's weight depends on that token alone, ``batch`` if on others.
        candidates: batch -> [N, K] ids (-1 pads) whose logits ``loss`` reads.
    """

    name: str
    loss: PerToken
    coefficient: float | Tensor = 1.0
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


def evaluate(
    terms: Sequence[Term],
    stats_of: StatsOf,
    batch: TokenBatch,
    *,
    weigh: Weigh | None = None,
    reads: Callable[[TokenStats], object] | None = None,
    scalars: Mapping[str, Tensor] | None = None,
    per_token: bool = False,
) -> LossOutput:
    """The equation: terms over the statistics, plus scalars.

    Args:
        terms: the per-token terms; their names are distinct.
        stats_of: candidates [N, K] or None -> flat lazy statistics of the batch.
        batch: the aligned batch.
        weigh: (detached stats, batch) -> [N] what every term of a token is multiplied by, or None
            for 1. It is also where to look at statistics that no term reads, in the same pass.
        reads: reads what will be wanted of the statistics afterwards, to be computed with the rest.
        scalars: weighted scalars of other tensors, by name.
        per_token: return [..., T] values (the reduction ``none``) rather than their sum.
    """
    terms = [term for term in terms if not term.is_off]
    names = [term.name for term in terms] + list(scalars or ())
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the parts of an objective need distinct names; {twice!r} is there twice")
    if per_token and scalars:
        raise ValueError(
            f"the scalars {', '.join(scalars)} belong to no token; reduction='none' has no place for them"
        )
    candidates, columns = _gather_candidates(terms, batch)
    stats = stats_of(candidates)

    def read(of: TokenStats) -> None:
        for term, c in zip(terms, columns, strict=True):
            term.values(of if c is None else of.with_candidates(c), batch)
        if weigh is not None:
            weigh(of.detach(), batch)
        if reads is not None:
            reads(of.detach())
        if stats.is_costly:  # what the metrics read
            _ = of.unscaled.nll, of.unscaled.correct

    of_terms = list(zip(terms, columns, strict=True))
    once = _in_one_sweep(of_terms, stats, batch, read, unless=whole_batch_reason(terms, weigh, per_token))
    if once is not None:
        total, parts, contributions = once
        weight = None
    else:
        stats.announce(read)
        weight = None if weigh is None else weigh(stats.detach(), batch)
        parts = {}
        contributions = torch.zeros_like(batch.scale)
        for term, column in of_terms:
            shares = _shares(term, column, stats, batch)
            contributions = contributions + shares.detach()
            if weight is not None:
                shares = torch.where(weight == 0, 0.0, shares * weight.detach())
            parts[term.name] = shares.reshape(batch.shape) if per_token else shares.sum()
        total = reduce(operator.add, parts.values()) if parts else _nothing(stats, batch, per_token)
    of_scalars = {name: value * batch.share for name, value in (scalars or {}).items()}
    parts |= of_scalars
    total = reduce(operator.add, of_scalars.values(), total)
    metrics = Metrics(_metrics(total, parts, stats, batch))
    if weight is not None:
        batch = replace(batch, scale=torch.where(weight == 0, 0.0, batch.scale * weight.detach()))
    return LossOutput(total, parts, batch.num_tokens, stats, batch, contributions, metrics)


def whole_batch_reason(terms: Sequence[Term], weigh: Weigh | None, per_token: bool) -> str | None:
    """Why a linear head has to be swept twice: what needs the whole batch before any gradient. None if
    nothing does.

    Args:
        terms, weigh, per_token: as for :func:`evaluate`.
    """
    for term in terms:
        if term.scope == "batch" and not term.is_off:
            return f"the weights of the term {term.name!r} depend on the whole batch"
    if weigh is not None:
        return "tokens are weighed by what the whole batch shows"
    return "reduction='none' has a gradient of its own for every token" if per_token else None


def _shares(term: Term, column: slice | None, stats: TokenStats, batch: TokenBatch) -> Tensor:
    """[N] what each token adds to a term, its scale included."""
    values = term.values(stats if column is None else stats.with_candidates(column), batch)
    return torch.where(batch.scale == 0, 0.0, values * batch.scale)


def _in_one_sweep(
    terms: Sequence[tuple[Term, slice | None]],
    stats: TokenStats,
    batch: TokenBatch,
    read: Callable[[TokenStats], None],
    unless: str | None,
) -> tuple[Tensor, dict[str, Tensor], Tensor] | None:
    """The sum of the terms, each term, and what each token contributes, with gradients that were made
    together with the statistics; None where that cannot be."""
    if not terms:
        return None
    shares = batch.scale.new_zeros(len(terms), len(batch.scale))

    def loss_of(some: TokenStats, rows: slice | Tensor) -> Tensor:
        tokens = batch.select(rows)
        loss = torch.zeros_like(batch.scale[0])
        for k, (term, column) in enumerate(terms):
            own = _shares(term, column, some, tokens)
            shares[k, rows] = own.detach()
            loss = loss + own.sum()
        return loss

    swept = stats.sweep_once(read, loss_of, unless)
    if swept is None:
        return None
    values = shares.sum(-1)
    parts = {
        term.name: swept.part(value, lambda term=term, column=column: _shares(term, column, stats, batch).sum())
        for (term, column), value in zip(terms, values, strict=True)
    }
    return swept.loss(reduce(operator.add, values)), parts, shares.sum(0)


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


def _nothing(stats: TokenStats, batch: TokenBatch, per_token: bool) -> Tensor:
    """0, connected to the logits: an objective whose terms are all off can still be trained with."""
    zeros = torch.where(batch.valid, 0.0, stats.nll)
    return zeros.reshape(batch.shape) if per_token else zeros.sum()


def _gather_candidates(terms: Sequence[Term], batch: TokenBatch) -> tuple[Tensor | None, list[slice | None]]:
    """All terms' candidate ids side by side [N, K], and each term's columns."""
    found: list[Tensor] = []
    columns: list[slice | None] = []
    width = 0
    for term in terms:
        if term.candidates is None:
            columns.append(None)
            continue
        found.append(term.candidates(batch))
        columns.append(slice(width, width + found[-1].shape[-1]))
        width += found[-1].shape[-1]
    return (torch.cat(found, -1) if found else None), columns


def _metrics(
    total: Tensor, parts: Mapping[str, Tensor], stats: TokenStats, batch: TokenBatch
) -> dict[str, Callable[[], Tensor]]:
    def mean(of: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: masked_mean(of().detach().to(batch.scale.dtype), batch.valid)

    nll = mean(lambda: stats.unscaled.nll)
    return {
        "loss": total.sum,
        **{name: part.sum for name, part in parts.items()},
        "nll": nll,
        "perplexity": lambda: nll().exp(),
        "accuracy": mean(lambda: stats.unscaled.correct),
    }
