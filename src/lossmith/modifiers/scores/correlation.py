"""``SequenceScorerCorrelationModifier``: raises the loss of a scorer that ranks badly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from lossmith.core.distributed import StatsScope, masked_mean, sum_over_ranks
from lossmith.core.metrics import Source
from lossmith.modifiers.scores.scorer_modifier import ScorerModifier
from lossmith.options import option

# Above this alpha, the parabola through the three points falls below 1 before c = 1.
LARGEST_QUADRATIC_ALPHA = 9


@dataclass(frozen=True)
class Settings:
    """Parameters of :class:`SequenceScorerCorrelationModifier`."""

    alpha: Annotated[float, option("factor at correlation -1; its square root at 0", low=1)] = 4.0
    mapping: Annotated[Literal["quadratic", "geometric"], option("the curve through the three points")] = (
        "quadratic"
    )
    eps: Annotated[float, option("standard deviations below this have no correlation", above=0)] = 1e-8
    stats_scope: Annotated[StatsScope, option("whether the correlation is that of this rank or of all")] = (
        "local"
    )

    def check(self, key_of: Callable[[str], str]) -> None:
        if self.mapping == "quadratic" and self.alpha > LARGEST_QUADRATIC_ALPHA:
            alpha, mapping = key_of("alpha"), key_of("mapping")
            raise ValueError(
                f"{alpha}={self.alpha:g} is above {LARGEST_QUADRATIC_ALPHA}, where the quadratic mapping "
                "falls below 1 for well-correlated predictions; "
                f"pass {mapping}='geometric', or a smaller {alpha}"
            )


class SequenceScorerCorrelationModifier(ScorerModifier):
    """Multiplies the loss by a decreasing function of the correlation of predictions and targets.

        c = Pearson correlation over the batch, detached
        factor = A c^2 + B c + C      "quadratic"
                 alpha^((1 - c) / 2)  "geometric"
        A = (alpha - 2 sqrt(alpha) + 1) / 2, B = (1 - alpha) / 2, C = sqrt(alpha)

    Both are 1 at c = 1, sqrt(alpha) at 0, alpha at -1. Where the correlation is undefined, the factor is 1
    for a batch of 1 and for constant targets, and constant predictions count as c = 0.

    Args:
        config, parameters: in a mapping or by name, ``enabled`` and the parameters ``alpha``, ``mapping``,
            ``eps``, ``stats_scope``.

    Example:
        >>> import torch, lossmith
        >>> modifier = lossmith.SequenceScorerCorrelationModifier({"alpha": 4.0})
        >>> scores, targets = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.0, 0.5, 1.0])
        >>> round(modifier.modify_loss(scores, targets, torch.tensor(1.0)).item(), 4)
        4.0
    """

    Settings = Settings
    prefix = "sequence_correlation_"

    settings: Settings

    def factor(
        self, predictions: Tensor, targets: Tensor, where: Tensor
    ) -> tuple[Tensor, Mapping[str, Source]]:
        alpha = self.settings.alpha
        root = math.sqrt(alpha)
        a, b = (alpha - 2 * root + 1) / 2, (1 - alpha) / 2
        c, is_defined = self._correlation(predictions, targets, where)
        curve = alpha ** ((1 - c) / 2) if self.settings.mapping == "geometric" else a * c * c + b * c + root
        factor = torch.where(is_defined, curve, 1.0)
        metrics = {"correlation": c, "multiplier": factor, "alpha": alpha, "A": a, "B": b, "C": root}
        return factor, metrics

    def _correlation(self, predictions: Tensor, targets: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Pearson's c, 0 for constant predictions, and whether there is anything to rank."""
        scope, eps = self.settings.stats_scope, self.settings.eps
        x = predictions - masked_mean(predictions, where, scope)
        mean = masked_mean(targets, where, scope)
        y = targets - mean
        xy, xx, yy = (masked_mean(product, where, scope) for product in (x * y, x * x, y * y))
        count = sum_over_ranks(where.sum(), scope)
        # the mean of equal numbers may differ from them by a rounding error
        rounding = 8 * torch.finfo(targets.dtype).eps * mean.abs()
        is_defined = (count > 1) & (yy.sqrt() > eps + rounding)
        c = xy / (xx.sqrt().clamp(min=eps) * yy.sqrt().clamp(min=eps))
        return torch.where(is_defined, c.clamp(-1, 1), 0.0), is_defined
