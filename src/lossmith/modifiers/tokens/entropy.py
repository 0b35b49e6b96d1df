"""``EntropyModifier``: weighs samples by how concentrated the model's wrong answers are."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from lossmith.core.distributed import StatsScope, masked_mean
from lossmith.core.metrics import Metrics, Source
from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.batch import TokenBatch
from lossmith.modifiers.idle import ALONE
from lossmith.modifiers.summary import Spread, loss_metrics
from lossmith.modifiers.tokens.token_modifier import Measured, SampleLosses, SampleWeigher
from lossmith.options import option

logger = logging.getLogger("lossmith.modifiers.entropy")  # the documented name, wherever this file lies


@dataclass(frozen=True)
class Settings:
    """Parameters of :class:`EntropyModifier`."""

    weight: Annotated[
        float, option("strength of the weighting: 0 is none, 1 the weights themselves", low=0)
    ] = 1.0
    threshold: Annotated[float, option("entropies below this count as this", low=0, high=1)] = 0.0
    max_weight: Annotated[float, option("largest weight before normalisation", above=0)] = 10.0
    direction: Annotated[Literal["concentrated", "uniform"], option("which wrong answers weigh more")] = (
        "concentrated"
    )
    use_for_weighting: Annotated[bool, option("off: metrics only")] = True
    eps: Annotated[float, option("added to the entropy before dividing by it", low=0)] = 1e-8
    stats_scope: Annotated[
        StatsScope, option("whether weights average 1 over the samples of this rank or of all")
    ] = "local"
    verbose: Annotated[bool, option("log irregularities of every batch")] = False


@dataclass(frozen=True)
class EntropyReport:
    """One batch in words; tensors until it is printed, so that unread logs do not wait for the device.

    Attributes:
        irregular: how many positions were irregular, by message.
        metrics: the metrics of the batch.
    """

    irregular: Mapping[str, Tensor]
    metrics: Mapping[str, Source]

    def __str__(self) -> str:
        counts, values = Metrics(self.irregular).to_dict(), Metrics(self.metrics).to_dict()
        said = [f"{what}: {int(count)}" for what, count in counts.items() if count]
        said += [
            f"sample weights from {values['weight_min']:.6g} to {values['weight_max']:.6g}",
            f"loss {values['original_loss']:.6g} -> {values['final_loss']:.6g} "
            f"(ratio {values['loss_ratio']:.6g})",
        ]
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            said.append(f"metrics not finite: {', '.join(broken)}")
        return "; ".join(said)


def irregularities(stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
    """How many positions of a batch are irregular, by message."""
    entropy, num_wrong = stats.wrong_entropy, stats.num_wrong
    relative = entropy / num_wrong.clamp(min=2).to(entropy.dtype).log()
    is_finite, has_several = torch.isfinite(entropy), num_wrong > 1
    # rounding alone can take a uniform distribution past 1
    is_outside = (relative < -1e-6) | (relative > 1 + 1e-6)
    where = {
        "positions with no wrong answer probability": stats.target_prob >= 1,
        "positions with at most 1 wrong token, left out": ~has_several & is_finite,
        "entropies outside [0, 1], clamped": has_several & is_outside,
        "entropies not finite, left out": ~is_finite,
    }
    return {what: (batch.valid & found).sum() for what, found in where.items()}


@dataclass(frozen=True)
class EntropyMeasured(Measured):
    """With the report of the verbose mode."""

    irregular: Mapping[str, Tensor] | None = None


class EntropyModifier(SampleWeigher):
    """Weighs samples by the entropy of the model's wrong answers.

        H_norm[t] = H(q) / log(num_wrong)      q: p without the target, renormalised; num_wrong > 1
        H[b]      = mean of H_norm over the supervised positions of sample b
        w[b]      = min(1 / (max(H[b], threshold) + eps), max_weight)       "concentrated"
                    max(H[b], threshold) + eps                              "uniform"
        s[b]      = max(0, 1 + weight * (w[b] / mean(w) - 1)), renormalised to average 1

    Args:
        config, parameters: in a mapping or by name, ``enabled`` and the parameters ``weight``,
            ``threshold``, ``max_weight``, ``direction``, ``use_for_weighting``, ``eps``, ``stats_scope``,
            ``verbose``.

    Example:
        >>> import torch, lossmith
        >>> modifier = lossmith.EntropyModifier({"threshold": 0.5})
        >>> loss = modifier.modify_loss(torch.randn(4, 8, 100), torch.randint(100, (4, 8)))
        >>> round(modifier.get_metrics()["weight_mean"], 4)
        1.0
    """

    Settings = Settings
    prefix = "entropy_modifier_"
    aliases = {"debug": "verbose"}  # noqa: RUF012
    reads = ("unscaled.normalized_wrong_entropy", "unscaled.num_wrong")

    settings: Settings

    @property
    def weighs(self) -> bool:
        return self.settings.use_for_weighting and self.settings.weight != 0

    def idle_because(self, batch: TokenBatch) -> str | None:
        if _has_no_entropy(batch):
            return (
                f"has no effect: with {batch.num_classes} classes a token has one wrong answer at most, and "
                "one answer has no entropy; leave it out, or use it with 3 classes or more"
            )
        if (
            self.settings.stats_scope == "local"
            and self.weighs
            and self.seen.only_singles(len(batch.row_counts))
        ):
            return ALONE.format(what="a weight is relative to the other samples of the batch")
        return None

    def measure(self, stats: TokenStats, batch: TokenBatch) -> Measured:
        plain = stats.unscaled  # the temperature belongs to the loss, not to the model
        entropy = batch.rows(plain.normalized_wrong_entropy)  # [B, T]
        is_defined = batch.rows(batch.valid & (plain.num_wrong > 1)) & torch.isfinite(entropy)
        num_defined = is_defined.sum(-1)
        sample_entropy = torch.where(is_defined, entropy, 0.0).sum(-1) / num_defined.clamp(min=1)  # [B]
        counts = num_defined > 0
        weight, raw = self._weights(sample_entropy, counts)
        is_supervised = batch.row_counts > 0
        entropies: dict[str, Source] = {}
        if not _has_no_entropy(batch):
            entropies |= Spread(entropy, is_defined).metrics(
                "mean_entropy",
                "per_position_mean_entropy",
                "per_position_max_entropy",
                "per_position_min_entropy",
                "per_position_entropy_std",
            )
            entropies |= Spread(sample_entropy, counts).metrics(
                "sample_mean_entropy", "sample_max_entropy", "sample_min_entropy", "sample_entropy_std"
            )
        metrics: dict[str, Source] = {
            **entropies,
            **Spread(weight, is_supervised).metrics("weight_mean", "weight_max", "weight_min", "weight_std"),
            "weight_sum": lambda: (weight * is_supervised).sum(),
            "batch_size": float(len(weight)),
            "loss_fallback": lambda: ~counts.any(),
        }
        irregular = None
        if self.settings.verbose:
            limited = (raw > self.settings.max_weight).sum()
            irregular = irregularities(plain, batch) | {"extreme weights, limited to max_weight": limited}
        return EntropyMeasured(weight if self.weighs else None, metrics, irregular)

    def _weights(self, entropy: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """[B] normalised weights, and the raw weights before the upper limit."""
        s = self.settings
        level = entropy.clamp(min=s.threshold) + s.eps
        raw = level if s.direction == "uniform" else 1 / level
        limited = raw.clamp(max=s.max_weight)
        relative = limited / self._mean(limited, counts).clamp(min=torch.finfo(raw.dtype).tiny)
        weight = torch.relu(1 + s.weight * (relative - 1))
        weight = weight / self._mean(weight, counts).clamp(min=torch.finfo(raw.dtype).tiny)
        # a sample without probability on wrong answers has no entropy: its weight stays 1
        return torch.where(counts, weight, 1.0), torch.where(counts, raw, 0.0)

    def _mean(self, values: Tensor, where: Tensor) -> Tensor:
        return masked_mean(values, where, self.settings.stats_scope)

    def loss_metrics(self, measured: Measured, losses: SampleLosses) -> Mapping[str, Source]:
        original = losses.total.sum()
        weighted = original if measured.weight is None else (losses.total * measured.weight).sum()
        return loss_metrics(original, weighted)

    def record(self, measured: Measured, losses: SampleLosses) -> None:
        super().record(measured, losses)
        irregular = measured.irregular if isinstance(measured, EntropyMeasured) else None
        if irregular is not None and not torch.compiler.is_compiling():
            logger.info("%s", EntropyReport(irregular, self._metrics))


def _has_no_entropy(batch: TokenBatch) -> bool:
    """Whether the vocabulary is too small for two wrong answers."""
    return batch.num_classes is not None and batch.num_classes <= 2
