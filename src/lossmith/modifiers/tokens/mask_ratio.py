"""``MaskRatioWeightModifier``: weighs samples by how few of their tokens are supervised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.batch import TokenBatch
from lossmith.modifiers.idle import ALIKE, one_limit
from lossmith.modifiers.summary import Spread
from lossmith.modifiers.tokens.token_modifier import Measured, SampleWeigher
from lossmith.options import check_order, option


def mask_ratio(batch: TokenBatch) -> Tensor:
    """[B] the supervised share of each sample's positions."""
    return batch.row_counts.to(batch.scale.dtype) / max(batch.num_positions, 1)


@dataclass(frozen=True)
class Settings:
    """Parameters of :class:`MaskRatioWeightModifier`."""

    power: Annotated[float, option("exponent: 0 no weighting, 0.5 1/sqrt(ratio), 1 1/ratio", low=0)] = 0.5
    min_weight: Annotated[float, option("smallest weight", low=0)] = 0.1
    max_weight: Annotated[float, option("largest weight", above=0)] = 10.0
    eps: Annotated[float, option("added to the ratio before the power", low=0)] = 1e-8

    def check(self, key_of: Callable[[str], str]) -> None:
        check_order(self, "min_weight", "max_weight", key_of)


class MaskRatioWeightModifier(SampleWeigher):
    """Weighs samples with few supervised tokens more.

        r[b] = supervised tokens of sample b / its positions
        s[b] = clamp((r[b] + eps)^-power, min_weight, max_weight)

    Args:
        config, parameters: in a mapping or by name, ``enabled`` and the parameters ``power``,
            ``min_weight`` (or ``min``), ``max_weight`` (or ``max``), ``eps``.

    Example:
        >>> import torch, lossmith
        >>> modifier = lossmith.MaskRatioWeightModifier({})
        >>> targets = torch.tensor([[5, 7, -100, -100], [3, 4, 1, 2], [7, -100, -100, -100]])
        >>> losses = torch.tensor([[1.5], [1.2], [2.0]]).expand(3, 4)
        >>> round(modifier.modify_loss(torch.zeros(3, 4, 8), targets, per_position_loss=losses).item(), 2)
        2.44
    """

    Settings = Settings
    prefix = "mask_ratio_weight_"
    aliases = {"min": "min_weight", "max": "max_weight"}  # noqa: RUF012
    reads = ()
    favours_sparse = True

    settings: Settings

    @property
    def weighs(self) -> bool:
        return self.settings.power != 0

    def idle_because(self, batch: TokenBatch) -> str | None:
        if not self.weighs:
            return None
        if self.settings.min_weight == self.settings.max_weight:
            return one_limit("min_weight", "max_weight")
        if not self.seen.only_one_share(mask_ratio(batch), batch.row_counts > 0):
            return None
        return (
            f"{ALIKE}: every sample has the same share of supervised positions, as in causal training on "
            "full rows; leave it out, or ignore the targets that are not to be learned (-100, or mask=)"
        )

    def measure(self, stats: TokenStats, batch: TokenBatch) -> Measured:
        s = self.settings
        ratio = mask_ratio(batch)
        weight = (ratio + s.eps).pow(-s.power).clamp(s.min_weight, s.max_weight)
        ratios, weights = Spread(ratio, ratio >= 0), Spread(weight, batch.row_counts > 0)
        metrics = ratios.metrics("mean_mask_ratio", "min_mask_ratio", "max_mask_ratio") | weights.metrics(
            "mean_weight", "min_weight", "max_weight", "weight_std"
        )
        return Measured(weight if self.weighs else None, metrics)
