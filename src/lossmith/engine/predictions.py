"""``Predictions``: what a model says of the next token, as logits or as what they would be made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lossmith.engine.checks import check_logits
from lossmith.engine.cross_entropy import CrossEntropy
from lossmith.engine.rows import native_rows
from lossmith.engine.rows.blocks import accumulation_dtype
from lossmith.engine.rows.operators import known_stats_of_logits, stats_of_logits
from lossmith.engine.sampling import sample_ids
from lossmith.engine.statistics.raw import Needs
from lossmith.engine.statistics.raw_stats import AskedFor, ByView, RawStats
from lossmith.engine.statistics.stats import TokenStats
from lossmith.engine.sweep import Rows, Sweep
from lossmith.engine.unchanged import Unchanged
from lossmith.engine.watched import is_eager

if TYPE_CHECKING:
    from lossmith.engine.head.graph_sweep import SweptInGraph
    from lossmith.engine.head.one_sweep import SweptOnce
    from lossmith.engine.head.plan import Plan


@dataclass(frozen=True, eq=False)
class LossOf:
    """The loss of some tokens.

    Attributes:
        of: (statistics of n tokens, which they are) -> the sum of those tokens' shares of the loss; and the
            shares of its K terms [K, n], without a gradient.
        asked: groups of raw statistics that it is made of, of each temperature.
    """

    of: Callable[[TokenStats, Rows], tuple[Tensor, Tensor]]
    asked: AskedFor

    def __call__(self, stats: TokenStats, rows: Rows) -> tuple[Tensor, Tensor]:
        return self.of(stats, rows)


class Predictions(ABC):
    """A distribution over V classes at every position [...].

    Attributes:
        is_costly: whether a statistic that was not announced takes a matrix product more, or a collective.
        has_all_tokens: whether the tokens that are swept here are all of the batch.
    """

    is_costly = False
    has_all_tokens = True

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """V."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where they are."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """That of the statistics and of the loss."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor | None]:
        """What they are made of, by name."""

    @abstractmethod
    def check(self, targets: Tensor) -> None:
        """
        Raises:
            TypeError, ValueError: they and the targets [...] do not belong together.
        """

    @abstractmethod
    def fetch(self, sweep: Sweep) -> Sequence[Tensor]:
        """The raw statistics [N] that a sweep asks for, differentiable, in the operators' order."""

    @abstractmethod
    def sample(self, softcap: float | None) -> Tensor:
        """[...] an id drawn at every position, at temperature 1."""

    @abstractmethod
    def logits(self) -> Tensor:
        """[..., V], differentiable."""

    def capped(self, softcap: float | None) -> float | None:
        """The cap of the logits, where an objective asks for ``softcap``."""
        return softcap

    def sweep_once(
        self, sweep: Sweep, loss_of: LossOf, unless: str | None, scale: Tensor
    ) -> SweptOnce | SweptInGraph | None:
        """The statistics, and the gradient of ``loss_of`` with them, where that saves a matrix product; None
        elsewhere.

        Args:
            sweep: which statistics to compute.
            loss_of: the loss of some tokens.
            unless: what forbids it, in words, if anything does.
            scale: [N] the tokens' shares of the loss.

        Raises:
            ValueError: it was asked for, and is forbidden.
        """
        return None

    def has_cross_entropy(self, backend: str | None, softcap: float | None) -> bool:
        """Whether :meth:`cross_entropy` is there, for an arithmetic that is asked for and a cap."""
        return False

    def cross_entropy(self, of: CrossEntropy) -> tuple[Tensor, dict[str, Tensor], TokenStats]:
        """The cross-entropy family in one step: the loss, its terms, and the statistics, of which some are
        known."""
        raise NotImplementedError

    def total_of_cross_entropy(self, of: CrossEntropy) -> Tensor:
        """The loss alone."""
        raise NotImplementedError

    def plan(self, targets: Tensor, ignore_index: int, unless: str | None) -> Plan:
        """How they are going to be swept at ``targets`` [...], for those that are made chunk by chunk."""
        raise TypeError("only a linear head is swept by a plan; pass hidden_states and lm_head_weight")

    def stats(
        self, sweep: Sweep, shape: torch.Size | None = None, default_needs: Needs = Needs.CORE
    ) -> TokenStats:
        """Lazy statistics, fetched when they are announced, or first read.

        Args:
            sweep: the tokens, and how their logits are read.
            shape: [...] in which the statistics come; [N] if not given.
            default_needs: groups that are fetched along with the first that was not announced.
        """
        read = Unchanged(**self.tensors, **sweep.tensors)

        def fetch(needs: Needs, needs_unscaled: Needs | None) -> ByView:
            read.check()
            asked = sweep.asking(needs, needs_unscaled)
            return asked.by_view(self.fetch(asked))

        return TokenStats(RawStats(sweep, fetch, default_needs), shape=shape)


def source_of(predictions: Tensor | Predictions) -> Tensor:
    """What comes from the model: the logits, or the hidden states of a head."""
    if isinstance(predictions, Tensor):
        return predictions
    source = next(iter(predictions.tensors.values()))
    assert source is not None
    return source


@dataclass(frozen=True)
class Logits(Predictions):
    """Logits [..., V] that are there already."""

    values: Tensor

    @property
    def num_classes(self) -> int:
        return self.values.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.values.dtype)

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        return {"logits": self.values}

    def check(self, targets: Tensor) -> None:
        check_logits(self.values, targets)

    def fetch(self, sweep: Sweep) -> Sequence[Tensor]:
        return stats_of_logits(self.values, sweep)

    def has_cross_entropy(self, backend: str | None, softcap: float | None) -> bool:
        is_there = is_eager(self.values) and backend in (None, "native")
        return is_there and native_rows.takes(self.values, softcap)

    def total_of_cross_entropy(self, of: CrossEntropy) -> Tensor:
        return of.total_of_logits(self.values)

    def cross_entropy(self, of: CrossEntropy) -> tuple[Tensor, dict[str, Tensor], TokenStats]:
        total, parts = of.of_logits(self.values)
        sweep = of.sweep
        read = Unchanged(**self.tensors, **sweep.tensors)

        def fetch(needs: Needs, needs_unscaled: Needs | None) -> ByView:
            read.check()
            if sweep.covers(needs, needs_unscaled):
                return sweep.by_view(known_stats_of_logits(self.values, sweep, of.raw))
            asked = sweep.asking(needs, needs_unscaled)
            return asked.by_view(self.fetch(asked))

        return total, parts, TokenStats(RawStats(sweep, fetch))

    def sample(self, softcap: float | None) -> Tensor:
        return sample_ids(self.values, softcap=softcap)

    def logits(self) -> Tensor:
        return self.values
