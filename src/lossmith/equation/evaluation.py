"""``evaluate``: the one equation over a batch, in one pass over its predictions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from lossmith.core.distributed import masked_mean
from lossmith.core.metrics import Metrics
from lossmith.engine.checks import whole_candidates
from lossmith.engine.head.one_sweep import OtherGradient
from lossmith.engine.predictions import LossOf, Predictions
from lossmith.engine.statistics.raw_stats import AskedFor, ByView
from lossmith.engine.statistics.statistic import Columns
from lossmith.engine.statistics.stats import TokenStats
from lossmith.engine.sweep import Sweep
from lossmith.engine.sweep_options import SweepOptions
from lossmith.engine.tokens.family import CrossEntropyFamily
from lossmith.equation.batch import TokenBatch
from lossmith.equation.output import LossOutput
from lossmith.equation.reduction import scaled
from lossmith.equation.term import Reads, Term, Weigh, joined
from lossmith.equation.weighing import together, weighed_sums

# What the metrics read.
METRICS = ("unscaled.nll", "unscaled.correct")

# A term with its columns of the candidates.
OfTerm = tuple[Term, Columns]


@dataclass(frozen=True, eq=False)
class Summands:
    """The terms of a sum.

    Attributes:
        each: the terms.
        family: the same, for where it is one step; None if there is no such.
    """

    each: Sequence[OfTerm]
    family: CrossEntropyFamily | None = None

    def values(self, stats: TokenStats, batch: TokenBatch) -> Sequence[Tensor] | Tensor:
        """What each token adds to each of the terms, before its scale: K tensors [N], or one [K, N]."""
        if self.family is not None:
            found = stats.terms_of(self.family, batch.target_weight)
            if found is not None:
                return found
        return [term.values(stats.declared(term.reads, columns), batch) for term, columns in self.each]

    @property
    def names(self) -> list[str]:
        """Of the terms."""
        return [term.name for term, _ in self.each]


def evaluate(
    terms: Sequence[Term],
    predictions: Predictions,
    batch: TokenBatch,
    options: SweepOptions,
    *,
    stats: TokenStats | None = None,
    weigh: Weigh | None = None,
    reads: Reads = (),
    scalars: Mapping[str, Tensor] | None = None,
    per_token: bool = False,
    family: CrossEntropyFamily | None = None,
) -> LossOutput:
    """The equation: terms over the statistics, plus scalars.

    Args:
        terms: the per-token terms; their names are distinct.
        predictions: logits, or a linear head.
        batch: the aligned batch.
        options: how the predictions are read.
        stats: their statistics, flat, if they are here already.
        weigh: (detached stats, batch) -> [N] what every term of a token is multiplied by, or None for 1.
        reads: what is read of the statistics besides the terms, by ``weigh`` or afterwards: it is computed
            in the same pass.
        scalars: weighted scalars of other tensors, by name.
        per_token: return [..., T] values (the reduction ``none``) rather than their sum.
        family: the same as the terms, for where it is one step.
    """
    terms = [term for term in terms if not term.is_off]
    scalars = {name: value * batch.share for name, value in (scalars or {}).items()}
    _check_names([*(term.name for term in terms), *scalars])
    if per_token and scalars:
        raise ValueError(
            f"the scalars {', '.join(scalars)} belong to no token; reduction='none' has no place for them"
        )
    candidates, of_terms = _gather_candidates(terms, batch)
    summands = Summands(of_terms, family)
    sweep = None
    if stats is None:
        sweep = options.sweep(
            predictions, batch.read_targets, ignore_index=batch.ignore_index, candidates=candidates
        )
        stats = predictions.stats(sweep)
        reads = joined(reads, METRICS if predictions.is_costly else ())
    elif candidates is not None and not stats.has_candidates:
        raise ValueError(
            "a term reads the logits of candidate ids, which the given stats do not have; leave stats out"
        )
    of_loss = joined(*(term.reads for term in terms))
    names = joined(of_loss, reads)
    stats.announce(names or ())
    asked, asked_by_terms = (
        stats.groups_of(some, has_candidates=candidates is not None) for some in (names, of_loss)
    )
    unless = whole_batch_reason(terms, batch, weigh, per_token)
    swept = None
    if sweep is not None:
        swept = _in_one_sweep(summands, predictions, sweep.asking(*asked), batch, unless, asked_by_terms)
    if swept is not None:
        total, parts, shares, known = swept
        stats.hold(known)
        seen, weight = _supervised(stats, batch), None
    else:
        stats.add(asked)
        seen = _supervised(stats, batch)
        total, parts, shares, weight = _parts(summands, seen, batch, weigh, per_token)
    parts.update(scalars)
    total = reduce(operator.add, scalars.values(), total)
    metrics = metrics_of(total, parts, seen, batch)
    if weight is not None:
        batch = replace(batch, scale=scaled(batch.scale, weight.detach()))
    return LossOutput(total, parts, batch.valid, seen, batch, shares, metrics, stats)


def whole_batch_reason(
    terms: Sequence[Term], batch: TokenBatch | None, weigh: Weigh | None, per_token: bool
) -> str | None:
    """Why a linear head has to be swept twice: what needs the whole batch before any gradient, or has a
    gradient of its own. None if nothing does.

    Args:
        terms, batch, weigh, per_token: as for :func:`evaluate`; without a batch nothing is said of it.
    """
    for term in terms:
        if term.scope == "batch" and not term.is_off:
            return f"the term {term.name!r} may depend on the whole batch (its scope is 'batch')"
        if isinstance(term.coefficient, Tensor) and term.coefficient.requires_grad:
            return f"the coefficient of the term {term.name!r} has a gradient"
    for name, value in (batch.features if batch is not None else {}).items():
        if value.requires_grad:
            return f"there is a gradient in something else than the logits, {name}, which would be lost"
    if weigh is not None:
        return "tokens are weighed by what the whole batch shows"
    return "reduction='none' has a gradient of its own for every token" if per_token else None


def _check_names(names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: two parts have one name.
    """
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the parts of an objective need distinct names; {twice!r} is there twice")


def _gather_candidates(terms: Sequence[Term], batch: TokenBatch) -> tuple[Tensor | None, list[OfTerm]]:
    """All terms' candidate ids side by side [N, K], and each term with its columns."""
    found: list[Tensor] = []
    of_terms: list[OfTerm] = []
    width = 0
    for term in terms:
        before = width
        if term.candidates is not None:
            ids = whole_candidates(term.candidates(batch), batch.targets, f" of the term {term.name!r}")
            found.append(ids)
            width += ids.shape[-1]
        of_terms.append((term, (before, width)))
    return (torch.cat(found, -1) if found else None), of_terms


def _supervised(stats: TokenStats, batch: TokenBatch) -> TokenStats:
    """The statistics as terms see them: blank where there is nothing to learn, also where they were looked
    at for something else."""
    return stats if batch.also_read is None else stats.restrict(batch.targets, batch.ignore_index)


def _parts(
    summands: Summands, stats: TokenStats, batch: TokenBatch, weigh: Weigh | None, per_token: bool
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor | None]:
    """The sum of the terms, each term, what each token adds to each [K, N], and its weight [N] or None."""
    weight = None if weigh is None else weigh(stats.detach(), batch)
    if not summands.each:
        return _nothing(stats, batch, per_token), {}, batch.scale.new_zeros(0, len(batch.scale)), weight
    values, factor = summands.values(stats, batch), None if weight is None else weight.detach()
    if per_token:
        shares = scaled(together(values), batch.scale)
        each = (shares if factor is None else scaled(shares, factor)).reshape(-1, *batch.shape)
        total, shares = each.sum(0), shares.detach()
    else:
        total, each, shares = weighed_sums(values, batch.scale, factor, backend=stats.backend)
    of_each = each.unbind() if len(summands.each) > 1 else [total]
    return total, dict(zip(summands.names, of_each, strict=True)), shares, weight


def _total(summands: Summands, stats: TokenStats, batch: TokenBatch) -> Tensor:
    return weighed_sums(summands.values(stats, batch), batch.scale, backend=stats.backend)[0]


def _in_one_sweep(
    summands: Summands,
    predictions: Predictions,
    sweep: Sweep,
    batch: TokenBatch,
    unless: str | None,
    asked: AskedFor,
) -> tuple[Tensor, dict[str, Tensor], Tensor, ByView] | None:
    """The sum of the terms, each term, and what each token adds to each [K, N], with gradients that were made
    together with the statistics, which come last; None where that cannot be."""
    if not summands.each:
        return None
    reads = joined(*(term.reads for term, _ in summands.each))

    def loss_of(some: TokenStats, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        tokens = batch.select(rows)
        some.announce(reads or ())
        values = summands.values(_supervised(some, tokens), tokens)
        total, _, shares = weighed_sums(values, tokens.scale, backend=sweep.backend)
        return total, shares

    try:
        swept = predictions.sweep_once(sweep, LossOf(loss_of, asked), unless, batch.scale)
    except OtherGradient:
        names = ", ".join(map(repr, summands.names))
        raise ValueError(
            f"one of the terms {names} has a gradient in something else than its token's statistics (a "
            "parameter, perhaps), which a term of scope='token' promises not to have; give it scope='batch'"
        ) from None
    if swept is None:
        return None
    if not predictions.has_all_tokens:
        with torch.no_grad():
            known = swept.stats(swept.known).detach()
            known.announce(reads or ())
            values = summands.values(_supervised(known, batch), batch)
            swept = replace(swept, shares=weighed_sums(values, batch.scale, backend=sweep.backend)[2])
    sums = swept.shares.sum(-1)
    parts = {
        of_term[0].name: swept.part(
            value, lambda s, of_term=of_term: _total(Summands([of_term]), _supervised(s, batch), batch)
        )
        for of_term, value in zip(summands.each, sums, strict=True)
    }
    return swept.loss(sums), parts, swept.shares, swept.known


def _nothing(stats: TokenStats, batch: TokenBatch, per_token: bool) -> Tensor:
    """0, connected to the logits: an objective whose terms are all off can still be trained with."""
    zeros = stats.nll.masked_fill(batch.valid, 0.0)
    return zeros.reshape(batch.shape) if per_token else zeros.sum()


def metrics_of(total: Tensor, parts: Mapping[str, Tensor], stats: TokenStats, batch: TokenBatch) -> Metrics:
    """The numbers of a loss, its parts, and what the predictions are worth."""

    def mean(of: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: masked_mean(of().detach().to(batch.scale.dtype), batch.valid)

    nll = mean(lambda: stats.unscaled.nll)
    return Metrics(
        {
            "loss": total.sum,
            **{name: part.sum for name, part in parts.items()},
            "nll": nll,
            "perplexity": lambda: nll().exp(),
            "accuracy": mean(lambda: stats.unscaled.correct),
        }
    )
