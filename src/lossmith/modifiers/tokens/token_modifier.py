"""``TokenModifier``: a modifier of losses that are summed over tokens, as a part of the one equation.

It may drop targets, replace the loss of tokens, and weigh samples. Weights come from the detached
statistics of the unmodified model, so neither the order of modifiers nor what another one does to
the loss can change them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lossmith.core.metrics import Source
from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.batch import TokenBatch
from lossmith.equation.term import Reads
from lossmith.modifiers.base import ModelMode
from lossmith.modifiers.configured_modifier import BuiltInModifier


@dataclass(frozen=True)
class Measured:
    """What a modifier measured on a batch.

    Attributes:
        weight: [B] the factor of each sample's loss, or None for 1.
        metrics: by name.
    """

    weight: Tensor | None = None
    metrics: Mapping[str, Source] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleLosses:
    """Each sample's share [B] of the loss, detached and unweighted.

    Attributes:
        unmodified: of the token loss, before any modifier.
        produced: of the token loss, after the modifiers that replace it.
        total: of all the objective's terms, built on ``produced``.
    """

    unmodified: Tensor
    produced: Tensor
    total: Tensor


Measure = Callable[[TokenStats], Measured]


class TokenModifier(BuiltInModifier):
    """The base of the modifiers of LANGUAGE_MODEL and TOKEN_CLASSIFIER; override what applies.

    Attributes:
        reads: names of the statistics that ``token_loss`` and the function from ``on_batch`` read; None for
            all, still in one pass.
        favours_sparse: whether its weights are largest for samples with few supervised tokens.
    """

    modes = (ModelMode.LANGUAGE_MODEL, ModelMode.TOKEN_CLASSIFIER)
    reads: Reads = None
    favours_sparse: bool = False

    @property
    def changes_loss(self) -> bool:
        """Whether it does more than measure, with its current parameters."""
        return True

    @property
    def weighs(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether it weighs samples, with its current parameters."""
        return False

    def keeps(self, targets: Tensor) -> Tensor | None:
        """[..., T] bool, the targets that count; None for all."""
        return None

    def token_loss(self, loss: Tensor, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[N] the loss of each token, which replaces ``loss``."""
        return loss

    def on_batch(self, batch: TokenBatch, draw: Callable[[], Tensor]) -> Measure:
        """Called once per batch, before its statistics are computed.

        Args:
            batch: the aligned batch.
            draw: -> [N] ids, one sampled at every position from the model's distribution.

        Returns:
            A function that measures the (detached) statistics.
        """
        return lambda stats: self.measure(stats, batch)

    def measure(self, stats: TokenStats, batch: TokenBatch) -> Measured:
        """Weights and metrics from detached statistics."""
        return Measured()

    def record(self, measured: Measured, losses: SampleLosses) -> None:
        """Store the metrics of a batch."""
        self.keep_metrics({**measured.metrics, **self.loss_metrics(measured, losses)})

    def loss_metrics(self, measured: Measured, losses: SampleLosses) -> Mapping[str, Source]:
        """Metrics that compare losses."""
        return {}


class SampleWeigher(TokenModifier):
    """The base of the modifiers that weigh samples and change nothing else."""

    @property
    def changes_loss(self) -> bool:
        return self.weighs
