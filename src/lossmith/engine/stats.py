"""``TokenStats``: what a loss may know about a token's distribution, per token and differentiable.

The engine hands over *raw* statistics, measured from the largest wrong logit; this file
derives the named ones from them in plain PyTorch on [N] tensors, so that autograd turns
any loss into gradients of the raw statistics, which the sweep's one backward takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lossmith.engine.raw import Needs
from lossmith.engine.raw_stats import AskedFor, RawStats

# A gap this wide leaves nothing of the smaller side, in any dtype; +-inf would make 0 * inf.
_WIDE = 1e4


class statistic:
    """A property of ``TokenStats`` that is computed once; and once more where it was first read under
    ``no_grad``, and then for a gradient.

    ``functools.cached_property`` takes a lock in Python 3.11, which ``torch.compile`` cannot trace.
    """

    def __init__(self, function: Callable[[Any], Tensor]) -> None:
        self.function = function
        self.name = function.__name__

    def __get__(self, owner: TokenStats, kind: type) -> Tensor:
        known = owner.__dict__ if torch.is_grad_enabled() else owner._without_gradient
        if self.name not in known:
            known[self.name] = self._of(owner)
        return known[self.name]

    def _of(self, owner: TokenStats) -> Tensor:
        whole = owner._of_all_candidates
        if whole is None:
            return self.function(owner)
        value = getattr(whole, self.name)  # computed there, once for every term
        return value[..., owner._columns] if self.name.startswith("candidate") else value


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
        columns: slice = slice(None),
        detached: bool = False,
        shape: torch.Size | None = None,
    ) -> None:
        self._raw = raw
        self._view = view
        self._columns = columns
        self._detached = detached
        self._shape = raw.targets.shape if shape is None else shape
        self._of_all_candidates: TokenStats | None = None
        self._unscaled: TokenStats | None = None
        self._targets = raw.targets.reshape(self._shape)
        self._without_gradient: dict[str, Tensor] = {}

    def compute(self, *names: str) -> TokenStats:
        """Compute the named statistics in one pass over the vocabulary; returns self.

        Raises:
            AttributeError: a name is not a statistic.
        """
        unknown = [name for name in names if name not in STATISTIC_NAMES]
        if unknown:
            raise AttributeError(
                f"TokenStats has no statistic {unknown[0]!r}; it has {sorted(STATISTIC_NAMES)}"
            )
        return self.announce(lambda stats: [getattr(stats, name) for name in names])

    def announce(self, function: Callable[[TokenStats], Any]) -> TokenStats:
        """Compute, in one pass, what ``function`` is going to read; returns self."""
        self.add(self.needs_of(function))
        return self

    def add(self, asked: AskedFor) -> None:
        """Compute these groups in one pass, as far as they are not here."""
        self._raw.add(*asked)

    @property
    def seen(self) -> Sequence[Needs | None]:
        """The groups that were read so far, of each view."""
        return self._raw.seen

    def needs_of(self, function: Callable[[TokenStats], Any]) -> AskedFor:
        """The groups that ``function`` reads, found by running it on blank statistics."""
        return self._raw.needs_of(lambda blank: function(TokenStats(blank, shape=self._shape)))

    def sweep_once(
        self, needs: Callable[[], AskedFor], loss_of: Callable[..., Tensor], unless: str | None
    ) -> Any:
        """Compute groups of statistics, and the gradient of ``loss_of``, in one sweep of a linear head; see
        :class:`lossmith.engine.one_sweep.SweptOnce`. None where that is not to be.

        Args:
            needs: the groups, asked for if there is one sweep.
            loss_of: (statistics of some tokens, which they are) -> the sum of their shares of the loss.
            unless: what forbids it, in words, if anything does.

        Raises:
            ValueError: it was asked for, and is forbidden.
        """
        if self._raw.once is None:
            return None
        swept = self._raw.once(needs, loss_of, unless)
        if swept is not None:
            self._raw.hold(*swept.views)
        return swept

    @property
    def is_costly(self) -> bool:
        """Whether a statistic that was not announced takes a matrix product more."""
        return self._raw.once is not None

    @property
    def unscaled(self) -> TokenStats:
        """The same statistics at temperature 1."""
        if not self._raw.has_temperature or self._view == 1:
            return self
        if self._unscaled is None:
            self._unscaled = self._also(view=1)
        return self._unscaled

    def with_candidates(self, columns: slice) -> TokenStats:
        """The same statistics with only these columns of the candidates in view."""
        view = self._also(columns=columns)
        view._of_all_candidates = self
        return view

    def detach(self) -> TokenStats:
        """The same statistics without gradients."""
        return self._also(detached=True)

    def reshape(self, shape: torch.Size) -> TokenStats:
        """The same statistics with their tokens laid out as ``shape``."""
        return self._also(shape=shape)

    def select(self, rows: slice) -> TokenStats:
        """The statistics, flat, of some of the tokens."""
        return TokenStats(self._raw.select(rows), detached=self._detached)

    def restrict(self, targets: Tensor, ignore_index: int) -> TokenStats:
        """The same statistics, flat, as if only these ``targets`` [N] had been given: where one is
        ``ignore_index`` nothing of the logits is left, and no gradient flows."""
        return TokenStats(self._raw.restrict(targets, ignore_index))

    @property
    def targets(self) -> Tensor:
        """The ids that the statistics are of."""
        return self._targets

    @property
    def is_valid(self) -> Tensor:
        """Whether a position has a target (bool)."""
        return self._targets != self._raw.ignore_index

    def _also(self, **changes: Any) -> TokenStats:
        now = {"view": self._view, "columns": self._columns, "detached": self._detached, "shape": self._shape}
        other = TokenStats(self._raw, **(now | changes))
        if self._of_all_candidates is not None:  # of which it has some columns, whatever else it is
            other._of_all_candidates = self._of_all_candidates._also(**changes)
        return other

    def _read(self, name: str) -> Tensor:
        value = self._raw.read(self._view, name)
        value = value.reshape((*self._shape, *value.shape[1:]))
        return value.detach() if self._detached else value

    def _constant(self, name: str) -> Tensor:
        return self._read(name).detach()

    # -- derived, measured from the largest wrong logit ------------------------------------

    @statistic
    def _gap(self) -> Tensor:
        gap = self._read("target_logit") - self._constant("reference")
        return gap.masked_fill(gap == float("inf"), float("nan"))  # a broken logit is no certainty

    @statistic
    def _delta(self) -> Tensor:
        """z_y - W: the log-odds of the target."""
        return self._gap - self._read("wrong_log_sum")

    @statistic
    def _centered_logsumexp(self) -> Tensor:
        return _logaddexp(self._read("wrong_log_sum"), self._gap)

    # -- the public statistics ------------------------------------------------------------

    @statistic
    def target_logit(self) -> Tensor:
        return self._read("target_logit")

    @statistic
    def logsumexp(self) -> Tensor:
        # From the larger side: a target far above the others is lost in its distance from them.
        of_wrong = self._constant("reference") + self._centered_logsumexp
        return torch.where(self._delta >= 0, self.target_logit + self.nll, of_wrong)

    @statistic
    def wrong_logsumexp(self) -> Tensor:
        wrong = self._constant("reference") + self._read("wrong_log_sum")
        return torch.where(self.is_valid, wrong, 0.0)

    @statistic
    def nll(self) -> Tensor:
        return _softplus(-self._delta)

    @statistic
    def target_prob(self) -> Tensor:
        return (-self.nll).exp()  # a sigmoid's own gradient, p (1 - p), loses 1 - p as p -> 1

    @statistic
    def target_log1m_prob(self) -> Tensor:
        return torch.where(self.is_valid, -_softplus(self._delta), 0.0)

    @statistic
    def wrong_entropy(self) -> Tensor:
        return self._read("wrong_entropy")

    @statistic
    def entropy(self) -> Tensor:
        delta = self._delta.clamp(-_WIDE, _WIDE)
        nll, nll_of_wrong = _softplus(-delta), _softplus(delta)
        return (-nll).exp() * nll + (-nll_of_wrong).exp() * (nll_of_wrong + self.wrong_entropy)

    @statistic
    def num_wrong(self) -> Tensor:
        return self._constant("num_wrong").long()

    @statistic
    def normalized_wrong_entropy(self) -> Tensor:
        counted = self._constant("num_wrong")
        most = torch.where(counted > 1, counted, 2.0).log()
        return torch.where(counted > 1, (self.wrong_entropy / most).clamp(0.0, 1.0), 0.0)

    @statistic
    def num_finite(self) -> Tensor:
        return self._constant("num_finite").long()

    @statistic
    def mean_logit(self) -> Tensor:
        of_wrong, of_target = self._constant("sum_weight"), self._constant("target_weight")
        tiny = torch.finfo(of_wrong.dtype).tiny
        wrong_mean = self._constant("reference") + self._read("centered_sum") / of_wrong.clamp(min=tiny)
        both = (of_wrong + of_target).clamp(min=tiny)
        mean = (of_wrong / both) * wrong_mean + (of_target / both) * self.target_logit
        return torch.where(of_target == 0, wrong_mean, mean)  # 0 * -inf is NaN

    @statistic
    def total_nll(self) -> Tensor:
        own = self._constant("target_weight")
        own = torch.where(own == 0, 0.0, own * self.nll)
        return self._constant("sum_weight") * self._centered_logsumexp - self._read("centered_sum") + own

    @statistic
    def top_wrong_logit(self) -> Tensor:
        return self._read("top_wrong_logit")

    @statistic
    def top_prob(self) -> Tensor:
        wrong = (self.top_wrong_logit - self._constant("reference") - self._centered_logsumexp).exp()
        return torch.where(self._target_wins, self.target_prob, wrong)

    @statistic
    def _target_wins(self) -> Tensor:
        no_wrong = self._constant("wrong_log_sum") == float("-inf")
        return (self._gap.detach() >= 0) | no_wrong

    @statistic
    def correct(self) -> Tensor:
        return self._target_wins & self.is_valid

    @statistic
    def predicted(self) -> Tensor:
        return torch.where(self._target_wins, self._targets, self._constant("top_wrong_id"))

    @statistic
    def candidate_logits(self) -> Tensor:
        self._candidate_ids()
        return self._read("candidate_logits")

    @statistic
    def candidate_log1m_prob(self) -> Tensor:
        ids = self._candidate_ids()
        total = self._centered_logsumexp.unsqueeze(-1)
        log_p = self.candidate_logits - self._constant("reference").unsqueeze(-1) - total
        # Above 1/2 log(1 - p) is the rest, summed without the class, less the sum of all. Only the
        # most likely class can be there: the target or the top wrong answer.
        is_target = ids == self._targets.unsqueeze(-1)
        is_large = (log_p > -math.log(2)) & ~is_target
        small = torch.where(is_target | is_large, float("-inf"), log_p)
        without_top = _logaddexp(self._read("rest_log_sum"), self._gap).unsqueeze(-1) - total
        log1m = torch.where(is_large, without_top, torch.log1p(-small.exp()))
        return torch.where(is_target, self.target_log1m_prob.unsqueeze(-1), log1m)

    def _candidate_ids(self) -> Tensor:
        ids = self._raw.candidates
        if ids is None:
            raise ValueError("there are no candidates to give statistics of; pass candidates=[..., K] ids")
        return ids.reshape(*self._shape, ids.shape[-1])


STATISTIC_NAMES = frozenset(
    name for name, member in vars(TokenStats).items() if isinstance(member, statistic) and name[0] != "_"
)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) to the last digit; PyTorch's default switches to x at 20, 2e-9 off."""
    return softplus(x, threshold=50.0)


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)) whose gradient is 0, not NaN, where both are -inf."""
    neither = (a == float("-inf")) & (b == float("-inf"))
    return torch.where(neither, float("-inf"), torch.logaddexp(torch.where(neither, 0.0, a), b))
