"""``EntropyReport``: what the verbose mode of the entropy modifier says about a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lossmith.core.metrics import Metrics
from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.batch import TokenBatch
from lossmith.modifiers.summary import Spread

# What is said of each count, where it is not 0.
IRREGULARITIES = {
    "certain": "positions with no wrong answer probability",
    "undefined": "positions with at most 1 wrong token, left out",
    "clamped": "entropies outside [0, 1], clamped",
    "broken": "entropies not finite, left out",
    "limited": "extreme weights, limited to max_weight",
}


@dataclass(frozen=True)
class EntropyReport:
    """One batch, tensors until it is turned into text, so that logging that nobody listens to does not wait
    for the device.

    Attributes:
        counts: how often there was something irregular.
        weights: of the samples.
        metrics: what came of it.
    """

    counts: Mapping[str, Tensor]
    weights: Spread
    metrics: Metrics

    @classmethod
    def of(cls, stats: TokenStats, batch: TokenBatch, is_limited: Tensor, weights: Spread) -> EntropyReport:
        """Look through the statistics of a batch; ``is_limited`` [B], samples whose weight was too large."""
        entropy, num_wrong = stats.wrong_entropy, stats.num_wrong
        most = num_wrong.clamp(min=2).to(entropy.dtype).log()
        relative, is_finite = entropy / most, torch.isfinite(entropy)
        # rounding alone takes a uniform distribution past 1
        is_outside = (relative < -1e-6) | (relative > 1 + 1e-6)
        found = {
            "certain": batch.valid & (stats.target_prob >= 1),
            "undefined": batch.valid & (num_wrong <= 1) & is_finite,
            "clamped": batch.valid & (num_wrong > 1) & is_outside,
            "broken": batch.valid & ~is_finite,
            "limited": is_limited,
        }
        return cls({name: where.sum() for name, where in found.items()}, weights, Metrics({}))

    def __str__(self) -> str:
        counts, values = Metrics(self.counts).to_dict(), self.metrics.to_dict()
        said = [f"{IRREGULARITIES[name]}: {int(count)}" for name, count in counts.items() if count]
        said += [
            f"sample weights from {float(self.weights.min()):.6g} to {float(self.weights.max()):.6g}",
            f"loss {values['original_loss']:.6g} -> {values['final_loss']:.6g} "
            f"(ratio {values['loss_ratio']:.6g})",
        ]
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            said.append(f"metrics not finite: {', '.join(broken)}")
        return "; ".join(said)
