"""``TokenStats``: what a loss may know about a token's distribution, per token and differentiable.

The engine hands over *raw* statistics, measured from the largest wrong logit; this file
derives the named ones from them in plain PyTorch on [N] tensors, so that autograd turns
any loss into gradients of the raw statistics, which the sweep's one backward takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.statistics.logarithms import logaddexp, softplus
from lossmith.engine.statistics.raw import Needs
from lossmith.engine.statistics.raw_stats import AskedFor, ByView, RawStats
from lossmith.engine.statistics.statistic import (
    Columns,
    Declared,
    Statistic,
    derived,
    groups_of,
    read_at,
    statistic,
)
from lossmith.engine.statistics.together import derived_together, family_together
from lossmith.engine.tokens.family import CrossEntropyFamily

# What costs this much has probability 0, in any dtype; inf would make 0 * inf.
_WIDE = 1e4


class TokenStats:
    """Statistics of every token's distribution, computed when they are first asked for.

    All of them come from one pass over the vocabulary, and their gradients from one more,
    when they are announced with :meth:`compute` (objectives do that by themselves).

    At a position whose target is ``ignore_index`` they describe a token that the model
    gets right with certainty: ``nll``, the entropies and the logits 0, ``target_prob`` 1,
    ``correct`` False, and no gradient.

    Attributes:
        logsumexp: log sum_i exp(z_i).
        target_logit: z_y.
        nll: logsumexp - z_y = -log p_y, to full relative precision as p_y -> 1.
        target_prob: p_y.
        target_log1m_prob: log(1 - p_y), to full relative precision as p_y -> 0 or 1.
        entropy: -sum_i p_i log p_i, in nats.
        wrong_logsumexp: logsumexp over the wrong answers i != y.
        wrong_entropy: entropy of the wrong answers q, p without y and renormalised.
        num_wrong: how many wrong answers have q_i > 1e-8 (no gradient).
        normalized_wrong_entropy: wrong_entropy / log(num_wrong), in [0, 1]; 0 where num_wrong <= 1.
        mean_logit: mean of the finite logits (weighed by the class weights, if given).
        total_nll: sum over the finite classes of -log p_i (times the class weights, if given).
        num_finite: how many classes have a finite logit (no gradient).
        top_prob: the largest probability.
        top_wrong_logit: the largest logit among the wrong answers.
        correct: whether the target has the largest logit (bool).
        predicted: the id with the largest logit; the target wins ties (int64).
        candidate_logits: [..., K] logits of the given candidate ids; -inf for id -1.
        candidate_log1m_prob: [..., K] log(1 - p_c) of the candidates; 0 for id -1.

    Example:
        >>> import torch, lossmith
        >>> logits = torch.tensor([[2.0, 1.0, 4.0, 0.5]], requires_grad=True)
        >>> stats = lossmith.token_stats(logits, torch.tensor([2])).compute("nll", "wrong_entropy")
        >>> loss = (stats.nll * (1 - stats.target_prob) ** 2).mean()
        >>> loss.backward()
        >>> round(stats.wrong_entropy.item(), 3)
        0.906
    """

    def __init__(
        self,
        raw: RawStats,
        *,
        view: int = 0,
        detached: bool = False,
        shape: torch.Size | None = None,
        declared: Declared | None = None,
    ) -> None:
        self._raw = raw
        self._view = view
        self._detached = detached
        self._shape = raw.sweep.targets.shape if shape is None else shape
        self._declared = declared
        self._unscaled: TokenStats | None = None
        self._attached: TokenStats | None = None  # what these are without gradients
        self._without_gradient: dict[str, Tensor] = {}

    def compute(self, *names: str) -> TokenStats:
        """Compute the named statistics (``unscaled.nll`` is one at temperature 1) in one pass over the
        vocabulary; returns self.

        Raises:
            AttributeError: a name is not a statistic.
        """
        check_names(names)
        self.announce(names)
        self.add(self.groups_of(names))
        return self

    def announce(self, names: Iterable[str]) -> None:
        """Say which statistics are going to be read: they are derived together."""
        for name in names:
            view, own = read_at(name, self._raw.has_temperature, self._view)
            self._raw.announced[view].add(own)

    def groups_of(self, names: Iterable[str] | None, *, has_candidates: bool = False) -> AskedFor:
        """The groups, of each temperature, that the named statistics are made of; without names those of all,
        with the candidates' if it ``has_candidates``."""
        if names is None:
            everything = ALL_BUT_CANDIDATES | Needs.CANDIDATES if has_candidates else ALL_BUT_CANDIDATES
            return everything, everything if self._raw.has_temperature else None
        return groups_of(names, STATISTICS, self._raw.has_temperature, self._view)

    def terms_of(self, family: CrossEntropyFamily, target_weight: Tensor | None) -> Tensor | None:
        """[K, N] a family's terms, with the class weights of the targets; None where it takes formulas."""
        return family_together(self._raw, family, target_weight, is_detached=self._detached)

    def add(self, asked: AskedFor) -> None:
        """Compute these groups in one pass, as far as they are not here."""
        self._raw.add(*asked)

    def hold(self, known: ByView) -> None:
        """Take raw statistics that are known already."""
        self._raw.hold(known)

    @property
    def has_candidates(self) -> bool:
        """Whether there are candidates to give statistics of."""
        return self._raw.sweep.candidates is not None

    @property
    def unscaled(self) -> TokenStats:
        """The same statistics at temperature 1."""
        if not self._raw.has_temperature or self._view == 1:
            return self
        if self._unscaled is None:
            self._unscaled = self._also(view=1)
            self._unscaled._attached = None if self._attached is None else self._attached.unscaled
            if self._declared is not None:
                self._unscaled._declared = replace(self._declared, whole=self._declared.whole.unscaled)
        return self._unscaled

    def declared(self, names: Iterable[str] | None, columns: Columns = (0, None)) -> TokenStats:
        """The same statistics as a term sees them: those that it has declared alone (all of them for None),
        and these columns of the candidates."""
        view = self._also()
        view._declared = Declared(self, None if names is None else frozenset(names), columns)
        return view

    def detach(self) -> TokenStats:
        """The same statistics without gradients, computed once for both."""
        view = self._also(detached=True)
        view._attached = self
        return view

    def reshape(self, shape: torch.Size) -> TokenStats:
        """The same statistics with their tokens laid out as ``shape``."""
        return self._also(shape=shape)

    def flat(self) -> TokenStats:
        """The same statistics [N], as they go with a :class:`lossmith.TokenBatch`."""
        return self._also(shape=torch.Size([self._raw.sweep.targets.numel()]))

    def restrict(self, targets: Tensor, ignore_index: int, *, keeps_candidates: bool = True) -> TokenStats:
        """The same statistics, flat, as if only these ``targets`` [N] had been given: where one is
        ``ignore_index`` nothing of the logits is left, and no gradient flows."""
        return TokenStats(self._raw.restrict(targets, ignore_index, keeps_candidates))

    @property
    def backend(self) -> str | None:
        """The arithmetic that was asked for."""
        return self._raw.sweep.backend

    @property
    def targets(self) -> Tensor:
        """The ids that the statistics are of."""
        targets = self._raw.sweep.targets
        return targets if len(self._shape) == 1 else targets.reshape(self._shape)

    @property
    def is_valid(self) -> Tensor:
        """Whether a position has a target (bool)."""
        return self.targets != self._raw.sweep.ignore_index

    @property
    def _is_ignored(self) -> Tensor:
        return self.targets == self._raw.sweep.ignore_index

    def _also(self, **changes: Any) -> TokenStats:
        now = {"view": self._view, "detached": self._detached, "shape": self._shape}
        other = TokenStats(self._raw, **{**now, **changes})
        if self._declared is not None:  # what was declared stays so, whatever else changes
            other._declared = replace(self._declared, whole=self._declared.whole._also(**changes))
        return other

    def _read(self, name: str) -> Tensor:
        value = self._raw.read(self._view, name)
        value = value.detach() if self._detached else value
        return value if len(self._shape) == 1 else value.reshape((*self._shape, *value.shape[1:]))

    def _constant(self, name: str) -> Tensor:
        return self._read(name).detach()

    def _derive_with(self, name: str, known: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """A statistic, and those that were announced with it and are not known, in one step; None where it
        takes its formula."""
        found = derived_together(self._raw, self._view, name, known, is_detached=self._detached)
        if found is None or len(self._shape) == 1:
            return found
        return {n: value.reshape((*self._shape, *value.shape[1:])) for n, value in found.items()}

    def __repr__(self) -> str:
        known = [name for name, s in sorted(STATISTICS.items()) if self._raw.has(self._view, s.needs)]
        at_one = ", unscaled" if self._view == 1 else ""
        return f"TokenStats({list(self._shape)}{at_one}, computed: {', '.join(known) or 'nothing yet'})"

    def __dir__(self) -> list[str]:
        return sorted(STATISTICS)

    def __getstate__(self) -> dict[str, Any]:
        """What is known of the statistics, without a graph, for pickle and ``copy.deepcopy``."""
        plain = {"_raw": self._raw, "_view": self._view, "_shape": self._shape, "_detached": True}
        return plain | {"_declared": self._declared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._unscaled, self._attached, self._without_gradient = None, None, {}

    @derived
    def _gap(self) -> Tensor:
        gap = self._read("target_logit") - self._constant("reference")
        return gap.masked_fill(gap == float("inf"), float("nan"))  # a broken logit is no certainty

    @derived
    def _against(self) -> Tensor:
        """W - z_y: the log-odds against the target."""
        return self._read("wrong_log_sum") - self._gap

    @derived
    def _wrong_nll(self) -> Tensor:
        """-log(1 - p_y): what the wrong answers cost together."""
        return softplus(-self._against)

    @derived
    def _logsumexp_from_wrong(self) -> Tensor:
        return self._read("wrong_log_sum") + self._wrong_nll

    @derived
    def _centered_logsumexp(self) -> Tensor:
        return torch.where(self._against > 0, self._logsumexp_from_wrong, self._gap + self.nll)

    # -- the public statistics ------------------------------------------------------------

    @statistic(Needs.CORE)
    def target_logit(self) -> Tensor:
        return self._read("target_logit")

    @statistic(Needs.CORE)
    def logsumexp(self) -> Tensor:
        # From the larger side: a target far above the others is lost in its distance from them.
        from_wrong = self._constant("reference") + self._logsumexp_from_wrong
        return torch.where(self._against > 0, from_wrong, self.target_logit + self.nll)

    @statistic(Needs.CORE)
    def wrong_logsumexp(self) -> Tensor:
        wrong = self._constant("reference") + self._read("wrong_log_sum")
        return wrong.masked_fill(self._is_ignored, 0.0)

    @statistic(Needs.CORE)
    def nll(self) -> Tensor:
        return softplus(self._against)

    @statistic(Needs.CORE)
    def target_prob(self) -> Tensor:
        return (-self.nll).exp()  # a sigmoid's own gradient, p (1 - p), loses 1 - p as p -> 1

    @statistic(Needs.CORE)
    def target_log1m_prob(self) -> Tensor:
        return -self._wrong_nll.masked_fill(self._is_ignored, 0.0)

    @statistic(Needs.ENTROPY)
    def wrong_entropy(self) -> Tensor:
        return self._read("wrong_entropy")

    @statistic(Needs.ENTROPY)
    def entropy(self) -> Tensor:
        wrong_prob = (-self._wrong_nll).exp()
        of_wrong = wrong_prob * (self._wrong_nll.clamp(max=_WIDE) + self.wrong_entropy)
        return self.target_prob * self.nll.clamp(max=_WIDE) + of_wrong

    @statistic(Needs.COUNT)
    def num_wrong(self) -> Tensor:
        return self._constant("num_wrong").long()

    @statistic(Needs.ENTROPY | Needs.COUNT)
    def normalized_wrong_entropy(self) -> Tensor:
        counted = self._constant("num_wrong")
        is_sure = counted <= 1
        most = counted.masked_fill(is_sure, 2.0).log()
        return (self.wrong_entropy / most).clamp(0.0, 1.0).masked_fill(is_sure, 0.0)

    @statistic(Needs.SUM)
    def num_finite(self) -> Tensor:
        return self._constant("num_finite").long()

    @statistic(Needs.SUM)
    def mean_logit(self) -> Tensor:
        of_wrong, of_target = self._constant("sum_weight"), self._constant("target_weight")
        divisor = of_wrong.masked_fill(of_wrong == 0, 1.0)  # of a sum of nothing
        wrong_mean = self._constant("reference") + self._read("centered_sum") / divisor
        both = torch.where(of_target == 0, divisor, of_wrong + of_target)
        mean = (of_wrong / both) * wrong_mean + (of_target / both) * self.target_logit
        return torch.where(of_target == 0, wrong_mean, mean)  # 0 * -inf is NaN

    @statistic(Needs.SUM)
    def total_nll(self) -> Tensor:
        own = self._constant("target_weight")
        own = own * self.nll.masked_fill(own == 0, 0.0)
        return self._constant("sum_weight") * self._centered_logsumexp - self._read("centered_sum") + own

    @statistic(Needs.TOP)
    def top_wrong_logit(self) -> Tensor:
        return self._read("top_wrong_logit")

    @statistic(Needs.TOP)
    def top_prob(self) -> Tensor:
        wrong = (self.top_wrong_logit - self._constant("reference") - self._centered_logsumexp).exp()
        return torch.where(self._target_wins, self.target_prob, wrong)

    @derived
    def _target_wins(self) -> Tensor:
        wrong = self._constant("wrong_log_sum")  # NaN if a wrong logit is: then nothing wins
        return ((self._gap.detach() >= 0) & ~wrong.isnan()) | (wrong == float("-inf"))

    @statistic(Needs.CORE)
    def correct(self) -> Tensor:
        return self._target_wins & self.is_valid

    @statistic(Needs.TOP)
    def predicted(self) -> Tensor:
        return torch.where(self._target_wins, self.targets, self._constant("top_wrong_id"))

    @statistic(Needs.CANDIDATES)
    def candidate_logits(self) -> Tensor:
        self._candidate_ids()
        return self._read("candidate_logits")

    @statistic(Needs.CANDIDATES)
    def candidate_log1m_prob(self) -> Tensor:
        ids = self._candidate_ids()
        total = self._centered_logsumexp.unsqueeze(-1)
        log_p = self.candidate_logits - self._constant("reference").unsqueeze(-1) - total
        # Above 1/2 log(1 - p) is the rest, summed without the class, less the sum of all. Only the
        # most likely class can be there: the target or the top wrong answer.
        is_target = ids == self.targets.unsqueeze(-1)
        is_large = (log_p > -math.log(2)) & ~is_target
        small = torch.where(is_target | is_large, float("-inf"), log_p)
        without_top = logaddexp(self._read("rest_log_sum"), self._gap).unsqueeze(-1) - total
        log1m = torch.where(is_large, without_top, torch.log1p(-small.exp()))
        return torch.where(is_target, self.target_log1m_prob.unsqueeze(-1), log1m)

    def _candidate_ids(self) -> Tensor:
        ids = self._raw.sweep.candidates
        if ids is None:
            raise ValueError("there are no candidates to give statistics of; pass candidates=[..., K] ids")
        return ids.reshape(*self._shape, ids.shape[-1])


STATISTICS: dict[str, Statistic] = {
    name: member
    for name, member in vars(TokenStats).items()
    if isinstance(member, Statistic) and name[0] != "_"
}
STATISTIC_NAMES = frozenset(STATISTICS)
ALL_BUT_CANDIDATES = reduce(or_, (s.needs for s in STATISTICS.values())) & ~Needs.CANDIDATES


def check_names(names: Iterable[str]) -> None:
    """
    Raises:
        AttributeError: a name is not that of a statistic.
    """
    for name in names:
        if read_at(name, False)[1] not in STATISTICS:
            raise AttributeError(unknown_statistic(name))


def unknown_statistic(name: str) -> str:
    """The message for an unknown name."""
    return f"TokenStats has no statistic {name!r}; it has {sorted(STATISTICS)}"
