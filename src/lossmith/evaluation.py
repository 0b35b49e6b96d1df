"""``evaluate``: the one equation over a batch, in one pass over its predictions."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lossmith.batch import TokenBatch
from lossmith.distributed import masked_mean
from lossmith.engine.checks import whole_candidates
from lossmith.engine.one_sweep import DependsOnMore
from lossmith.engine.raw_stats import AskedFor, union
from lossmith.engine.stats import TokenStats
from lossmith.equation import LossOutput, StatsOf, Term, Weigh
from lossmith.metrics import Metrics

# What batches of one kind read of their statistics, in all and after the loss, by the kind; None where it is
# not the same every time.
Memory = dict[Hashable, "tuple[AskedFor, AskedFor] | None"]


def evaluate(
    terms: Sequence[Term],
    stats_of: StatsOf,
    batch: TokenBatch,
    *,
    weigh: Weigh | None = None,
    reads: Callable[[TokenStats], object] | None = None,
    scalars: Mapping[str, Tensor] | None = None,
    per_token: bool = False,
    memory: Memory | None = None,
) -> LossOutput:
    """The equation: terms over the statistics, plus scalars.

    What the terms read is found by running them on blank statistics first, so that it is computed in one
    pass; ``memory`` spares that the next time.

    Args:
        terms: the per-token terms; their names are distinct.
        stats_of: candidates [N, K] or None -> flat lazy statistics of the batch.
        batch: the aligned batch.
        weigh: (detached stats, batch) -> [N] what every term of a token is multiplied by, or None
            for 1. It is also where to look at statistics that no term reads, in the same pass.
        reads: reads what will be wanted of the statistics afterwards, to be computed with the rest.
        scalars: weighted scalars of other tensors, by name.
        per_token: return [..., T] values (the reduction ``none``) rather than their sum.
        memory: a dictionary of the caller's, the same for every batch of an objective.
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
    of_terms = list(zip(terms, columns, strict=True))
    if torch.compiler.is_compiling():
        memory = None
    stats = stats_of(candidates)
    kind = (tuple(names), weigh is None, tuple(batch.features), torch.is_grad_enabled(), stats.is_costly)
    known = None if memory is None else memory.get(kind)
    one_pass = _Pass(of_terms, stats, batch, weigh, reads, per_token, known)
    total, parts, contributions, weight = one_pass.run()
    if memory is not None and one_pass.read_as_asked():
        memory.setdefault(kind, one_pass.asked_for())
    elif memory is not None:
        # What was remembered had become too little, and a second pass was made, or too much, which shows in
        # the last digit: it is done again as if for the first time, and of this kind nothing is remembered.
        memory[kind] = None
        if known:
            stats = stats_of(candidates)
            one_pass = _Pass(of_terms, stats, batch, weigh, reads, per_token, None)
            total, parts, contributions, weight = one_pass.run()
    of_scalars = {name: value * batch.share for name, value in (scalars or {}).items()}
    parts |= of_scalars
    total = reduce(operator.add, of_scalars.values(), total)
    metrics = Metrics(_metrics(total, parts, stats, batch))
    if weight is not None:
        batch = replace(batch, scale=torch.where(weight == 0, 0.0, batch.scale * weight.detach()))
    return LossOutput(total, parts, batch.num_tokens, stats, batch, contributions, metrics)


@dataclass
class _Pass:
    """One pass over a batch's predictions, for what its terms, its weights and its reader read.

    Attributes:
        terms: each with its columns of the candidates.
        expected: what they will read, in all and after the loss, if that is known.
        asked: what was asked for.
    """

    terms: Sequence[tuple[Term, slice | None]]
    stats: TokenStats
    batch: TokenBatch
    weigh: Weigh | None
    reads: Callable[[TokenStats], object] | None
    per_token: bool
    expected: tuple[AskedFor, AskedFor] | None
    asked: AskedFor | None = None

    def run(self) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor | None]:
        """The total, each part, what each token contributes [N], and its weight [N] or None."""
        stats, batch = self.stats, self.batch
        unless = whole_batch_reason([term for term, _ in self.terms], self.weigh, self.per_token)
        once = _in_one_sweep(self.terms, stats, batch, self._needs, unless)
        if once is not None:
            return (*once, None)
        stats.add(self._needs())
        weight = None if self.weigh is None else self.weigh(stats.detach(), batch)
        parts = {}
        contributions = torch.zeros_like(batch.scale)
        for term, column in self.terms:
            shares = _shares(term, column, stats, batch)
            contributions = contributions + shares.detach()
            if weight is not None:
                shares = torch.where(weight == 0, 0.0, shares * weight.detach())
            parts[term.name] = shares.reshape(batch.shape) if self.per_token else shares.sum()
        total = reduce(operator.add, parts.values()) if parts else _nothing(stats, batch, self.per_token)
        return total, parts, contributions, weight

    def read_as_asked(self) -> bool:
        """Whether nothing was read that was not asked for, and the other way round."""
        asked, later = self.asked_for()
        return union(self.stats.seen, later) == union(asked)

    def asked_for(self) -> tuple[AskedFor, AskedFor]:
        """What was asked for in all, and what of it will be read after the loss."""
        if self.expected is not None:
            return self.expected
        assert self.asked is not None
        return self.asked, self.stats.needs_of(self._read_later)

    def _needs(self) -> AskedFor:
        self.asked = self.stats.needs_of(self._read) if self.expected is None else self.expected[0]
        return self.asked

    def _read(self, blank: TokenStats) -> None:
        for term, column in self.terms:
            _read_by(term, column, blank, self.batch)
        if self.weigh is not None:
            self.weigh(blank.detach(), self.batch)
        self._read_later(blank)

    def _read_later(self, blank: TokenStats) -> None:
        if self.reads is not None:
            self.reads(blank.detach())
        if self.stats.is_costly:  # what the metrics read
            _ = blank.unscaled.nll, blank.unscaled.correct


def whole_batch_reason(terms: Sequence[Term], weigh: Weigh | None, per_token: bool) -> str | None:
    """Why a linear head has to be swept twice: what needs the whole batch before any gradient. None if
    nothing does.

    Args:
        terms, weigh, per_token: as for :func:`evaluate`.
    """
    for term in terms:
        if term.scope == "batch" and not term.is_off:
            return f"the weights of the term {term.name!r} depend on the whole batch"
        if isinstance(term.coefficient, Tensor) and term.coefficient.requires_grad:
            return f"the coefficient of the term {term.name!r} has a gradient"
    if weigh is not None:
        return "tokens are weighed by what the whole batch shows"
    return "reduction='none' has a gradient of its own for every token" if per_token else None


def _shares(term: Term, column: slice | None, stats: TokenStats, batch: TokenBatch) -> Tensor:
    """[N] what each token adds to a term, its scale included."""
    values = term.values(stats if column is None else stats.with_candidates(column), batch)
    return torch.where(batch.scale == 0, 0.0, values * batch.scale)


def _read_by(term: Term, column: slice | None, stats: TokenStats, batch: TokenBatch) -> None:
    """Read the statistics that a term is going to read. They are those of every token alike, so that one
    token shows them; unless the term, of the user's own perhaps, looks at the whole batch."""
    if term.scope == "token" and not torch.compiler.is_compiling():
        one = slice(0, 1)
        with contextlib.suppress(Exception):
            _shares(term, column, stats.select(one), batch.select(one))
            return
    _shares(term, column, stats, batch)


def _in_one_sweep(
    terms: Sequence[tuple[Term, slice | None]],
    stats: TokenStats,
    batch: TokenBatch,
    needs: Callable[[], AskedFor],
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
            try:
                own = _shares(term, column, some, tokens)
            except (RuntimeError, ValueError, IndexError) as error:  # it went well on blanks for all tokens
                raise DependsOnMore(f"the term {term.name!r} fails on some tokens alone", WHOLE) from error
            shares[k, rows] = own.detach()
            loss = loss + own.sum()
        return loss

    swept = stats.sweep_once(needs, loss_of, unless)
    if swept is None:
        return None
    looking_around = _who_looks_around(terms, stats, batch, shares) if swept.in_parts else None
    if looking_around is not None:
        swept.fall_back(f"the term {looking_around!r} looks at other tokens than each value's own", WHOLE)
        return None
    values = shares.sum(-1)
    parts = {
        term.name: swept.part(
            value, lambda s, term=term, column=column: _shares(term, column, s, batch).sum()
        )
        for (term, column), value in zip(terms, values, strict=True)
    }
    return swept.loss(reduce(operator.add, values)), parts, shares.sum(0)


WHOLE = "give it scope='batch'"


# The code of terms that came to the same with a part of the tokens in view and with all of them.
_LOCAL: set[Any] = set()


def _who_looks_around(
    terms: Sequence[tuple[Term, slice | None]], stats: TokenStats, batch: TokenBatch, shares: Tensor
) -> str | None:
    """The name of a term that comes to something else than ``shares`` [terms, N] when it sees all tokens
    together. A term is looked at once; one that shows no code would be every time, so that on an accelerator,
    where everybody waits for the answer, it is not."""
    with torch.no_grad():
        for (term, column), some in zip(terms, shares, strict=True):
            code = None if term.weight is not None else _code_of(term.loss)
            if code in _LOCAL or (code is None and shares.device.type != "cpu"):
                continue
            every = _shares(term, column, stats, batch)
            are_known = some.isfinite() & every.isfinite()
            difference = torch.where(are_known, some - every, 0.0).abs().max()
            if difference > 1e-4 * torch.where(are_known, every, 0.0).abs().max():
                return term.name
            if code is not None:
                _LOCAL.add(code)
    return None


def _code_of(function: Any) -> tuple[Any, ...] | None:
    """What a function runs, with the functions that it was made of; None for what shows no code."""
    function = getattr(function, "__func__", function)
    if not hasattr(function, "__code__"):
        return None
    inside = [_code_of(cell.cell_contents) for cell in function.__closure__ or ()]
    return (function.__code__, *inside)


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
        ids = term.candidates(batch)
        found.append(whole_candidates(ids, batch.targets, f" of the term {term.name!r}"))
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
