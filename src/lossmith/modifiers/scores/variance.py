"""``SequenceScorerVarianceModifier``: raises the loss of a scorer whose predictions vary too little."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from lossmith.core.distributed import StatsScope, masked_mean
from lossmith.core.metrics import Source
from lossmith.modifiers.scores.scorer_modifier import ScorerModifier
from lossmith.options import option


@dataclass(frozen=True)
class Settings:
    """Parameters of :class:`SequenceScorerVarianceModifier`."""

    scale: Annotated[float, option("largest factor", low=1)] = 2.0
    alpha: Annotated[float, option("how fast the factor approaches it", low=0)] = 1.5
    eps: Annotated[float, option("smallest variance of the predictions to divide by", above=0)] = 1e-8
    stats_scope: Annotated[StatsScope, option("whether variances are those of this rank or of all")] = "local"


class SequenceScorerVarianceModifier(ScorerModifier):
    """Multiplies the loss by a factor above 1 while the targets vary more than the predictions.

        r      = var(targets) / max(var(predictions), eps)       population variances over the batch
        factor = 1 + (scale - 1) (1 - exp(-alpha relu(r - 1)))   detached; 1 for a batch of 1

    Args:
        config, parameters: in a mapping or by name, ``enabled`` and the parameters ``scale``, ``alpha``,
            ``eps``, ``stats_scope``.

    Example:
        >>> import torch, lossmith
        >>> modifier = lossmith.SequenceScorerVarianceModifier({"scale": 2.0, "alpha": 1.5})
        >>> scores, targets = torch.tensor([0.4, 0.6]), torch.tensor([0.0, 1.0])
        >>> round(modifier.modify_loss(scores, targets, torch.tensor(0.16)).item(), 4)
        0.32
    """

    Settings = Settings
    prefix = "sequence_variance_"

    settings: Settings

    def factor(
        self, predictions: Tensor, targets: Tensor, where: Tensor
    ) -> tuple[Tensor, Mapping[str, Source]]:
        s = self.settings
        of_predictions, of_targets = self._variance(predictions, where), self._variance(targets, where)
        ratio = of_targets / of_predictions.clamp(min=s.eps)
        factor = 1 - (s.scale - 1) * torch.expm1(-s.alpha * torch.relu(ratio - 1))
        return factor, {
            "variance_pred": of_predictions,
            "variance_target": of_targets,
            "ratio_y_over_x": ratio,
            "factor_applied": factor,
            "alpha": s.alpha,
            "scale_cap": s.scale,
        }

    def _variance(self, values: Tensor, where: Tensor) -> Tensor:
        mean = masked_mean(values, where, self.settings.stats_scope)
        return masked_mean((values - mean).square(), where, self.settings.stats_scope)
