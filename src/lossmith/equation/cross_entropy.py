"""``evaluate_cross_entropy``: the one equation for the cross-entropy family, where predictions have all of it
in one step."""

from __future__ import annotations

import functools

from torch import Tensor

from lossmith.engine.cross_entropy import KNOWN, CrossEntropy
from lossmith.engine.predictions import Predictions
from lossmith.engine.statistics.raw import Needs
from lossmith.engine.statistics.statistic import groups_of
from lossmith.engine.statistics.stats import STATISTICS
from lossmith.engine.sweep_options import SweepOptions
from lossmith.engine.tokens.family import CrossEntropyFamily
from lossmith.engine.watched import is_eager
from lossmith.equation.batch import TokenBatch
from lossmith.equation.evaluation import metrics_of
from lossmith.equation.output import LossOutput
from lossmith.equation.reduction import Empty, Reduction, check_reduction
from lossmith.equation.term import Reads, joined


@functools.lru_cache
def _asked(names: tuple[str, ...], has_temperature: bool) -> tuple[int, int] | None:
    """The groups of each temperature that the named statistics are made of, -1 for none; None where the step
    does not know one of them."""
    needs, needs_unscaled = groups_of(names, STATISTICS, has_temperature)
    if ((needs or Needs.CORE) | (needs_unscaled or Needs.CORE)) & ~KNOWN:
        return None
    return int(needs or 0), -1 if needs_unscaled is None else int(needs_unscaled)


def total_of_cross_entropy(
    family: CrossEntropyFamily,
    predictions: Predictions,
    targets: Tensor,
    options: SweepOptions,
    *,
    ignore_index: int,
    reduction: Reduction,
    empty: Empty,
) -> Tensor | None:
    """The loss alone of targets [..., T] that are aligned and without weights; None where it takes the long
    way.

    Args:
        family: which terms.
        predictions: that have it in one step.
        targets: [..., T], plain.
        options, ignore_index, reduction, empty: as for an objective.
    """
    asked = _asked(family.reads, options.has_temperature)
    if asked is None or options.class_weight is not None:
        return None
    check_reduction(reduction, empty)
    sweep = options.sweep(predictions, targets, ignore_index=ignore_index, asked=asked)
    num_positions = targets.shape[-1] if targets.dim() else 1
    settling = reduction, num_positions, empty == "nan"
    return predictions.total_of_cross_entropy(CrossEntropy(family, sweep, settling=settling))


def evaluate_cross_entropy(
    family: CrossEntropyFamily,
    predictions: Predictions,
    batch: TokenBatch,
    options: SweepOptions,
    reads: Reads,
) -> LossOutput | None:
    """What :func:`lossmith.equation.evaluation.evaluate` makes of the family's terms, of predictions that
    have it in one step; None where more is read than the step knows.

    Args:
        family: which terms.
        predictions, batch, options: as for ``evaluate``.
        reads: what is read of the statistics besides the terms.
    """
    names = joined(family.reads, reads)
    if names is None or batch.also_read is not None or not is_eager(batch.targets, batch.scale):
        return None
    asked = _asked(names, options.has_temperature)
    if asked is None:
        return None
    sweep = options.sweep(predictions, batch.targets, ignore_index=batch.ignore_index, asked=asked)
    of = CrossEntropy(family, sweep, batch.scale, batch.target_weight)
    total, parts, stats = predictions.cross_entropy(of)
    metrics = metrics_of(total, parts, stats, batch)
    return LossOutput(total, parts, batch.valid, stats, batch, of.shares, metrics, stats)
