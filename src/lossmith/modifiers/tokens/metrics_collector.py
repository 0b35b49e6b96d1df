"""``MetricsCollectorModifier``: measures, and changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from lossmith.core.buffers import put
from lossmith.core.distributed import masked_mean
from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.batch import TokenBatch
from lossmith.modifiers.base import ModelMode
from lossmith.modifiers.tokens.token_modifier import Measured, TokenModifier
from lossmith.options import option


@dataclass(frozen=True)
class Settings:
    """Parameters of :class:`MetricsCollectorModifier`."""

    ema_decay: Annotated[float, option("decay of the running average, a batch", low=0, below=1)] = 0.99
    eps: Annotated[float, option("smallest magnitude of a target that errors are relative to", above=0)] = (
        1e-6
    )


class MetricsCollectorModifier(TokenModifier):
    """Metrics of the unmodified model in every mode; the loss stays as it is.

        nll, perplexity, accuracy, entropy, num_tokens            for models of tokens
        mean_absolute_error,
        mean_absolute_relative_error = mean |p - y| / max(|y|, eps), and its running average (..._ema)
                                                                  for a sequence scorer

    Args:
        config, parameters: in a mapping or by name, ``enabled`` and the parameters ``ema_decay``, ``eps``.

    Example:
        >>> import torch, lossmith
        >>> pipeline = lossmith.LossModifierPipeline([lossmith.MetricsCollectorModifier({})])
        >>> scores, targets = torch.tensor([0.5, 0.9]), torch.tensor([0.4, 1.0])
        >>> loss = pipeline.modify_loss(scores, targets, torch.tensor(0.01))
        >>> round(pipeline.get_all_metrics()["MetricsCollectorModifier.mean_absolute_relative_error"], 3)
        0.175
    """

    Settings = Settings
    prefix = "metrics_collector_"
    modes = tuple(ModelMode)
    reads = ("unscaled.nll", "unscaled.correct", "unscaled.entropy")

    settings: Settings
    error_ema: Tensor
    num_batches: Tensor

    def __init__(self, config: Mapping[str, Any] | None = None, **parameters: Any) -> None:
        super().__init__(config, **parameters)
        self.register_buffer("error_ema", torch.zeros(()))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))

    @property
    def changes_loss(self) -> bool:
        return False

    def measure(self, stats: TokenStats, batch: TokenBatch) -> Measured:
        nll, correct, entropy = stats.unscaled.nll, stats.unscaled.correct, stats.unscaled.entropy
        valid = batch.valid
        return Measured(
            metrics={
                "nll": lambda: masked_mean(nll, valid),
                "perplexity": lambda: masked_mean(nll, valid).exp(),
                "accuracy": lambda: masked_mean(correct.to(nll.dtype), valid),
                "entropy": lambda: masked_mean(entropy, valid),
                "num_tokens": lambda: valid.sum(),
            }
        )

    def on_scores(self, predictions: Tensor, targets: Tensor, where: Tensor, loss: Tensor) -> None:
        """Record the errors of a sequence scorer; see :class:`lossmith.modifiers.ScorerModifier`."""
        error = (predictions - targets).abs()
        relative = masked_mean(error / targets.abs().clamp(min=self.settings.eps), where)
        if torch.is_grad_enabled():  # evaluation does not enter the running average
            self._take_in(relative, where.any() & torch.isfinite(relative))
        # after few batches the average is still biased towards its initial zero
        started = 1 - self.settings.ema_decay ** self.num_batches.clamp(min=1)
        self._metrics = {
            "mean_absolute_error": masked_mean(error, where),
            "mean_absolute_relative_error": relative,
            "mean_absolute_relative_error_ema": self.error_ema / started,
        }

    def _take_in(self, error: Tensor, counts: Tensor) -> None:
        decay = self.settings.ema_decay
        average = self.error_ema.to(error)
        moved = torch.where(counts, average * decay + error * (1 - decay), average)
        put(self, error_ema=moved, num_batches=self.num_batches.to(error.device) + counts)

    def reset_metrics(self) -> None:
        super().reset_metrics()
        put(self, error_ema=torch.zeros_like(self.error_ema), num_batches=torch.zeros_like(self.num_batches))
