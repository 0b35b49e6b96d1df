"""``TargetSmoothingModifier``: label smoothing as a modifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from lossmith.core.metrics import Source
from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.batch import TokenBatch
from lossmith.equation.term import Reads
from lossmith.modifiers.summary import loss_metrics
from lossmith.modifiers.tokens.token_modifier import Measure, Measured, SampleLosses, TokenModifier
from lossmith.options import option
from lossmith.options.shared import LabelSmoothing, SpecialTokens
from lossmith.terms.cross_entropy import SmoothingMode, smooth


@dataclass(frozen=True)
class Settings:
    """Parameters of :class:`TargetSmoothingModifier`."""

    factor: LabelSmoothing = 0.1
    mode: SmoothingMode = "uniform"
    special_tokens: SpecialTokens = ()
    exclude_padding: Annotated[bool, option("leave targets that are `padding_token` out of the loss")] = True
    padding_token: Annotated[int, option("id of padding among the targets")] = -100


class TargetSmoothingModifier(TokenModifier):
    """Label smoothing: cross-entropy against targets that give ``factor`` to the other classes.

        (1 - factor) ell + factor / V  sum_i (-log p_i)                  "uniform"
        (1 - factor) ell + factor / (V - 1)  sum_{i != y} (-log p_i)     "exclude_target"

    ell is the token's loss so far, -log p_y unless something else was given.

    Args:
        config, parameters: in a mapping or by name, ``enabled`` and the parameters ``factor``, ``mode``,
            ``special_tokens``, ``exclude_padding``, ``padding_token``.

    Example:
        >>> import torch, lossmith
        >>> modifier = lossmith.TargetSmoothingModifier({"factor": 0.1})
        >>> logits, targets = torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.long)
        >>> round(modifier.modify_loss(logits, targets).item(), 4)
        1.6094

    Source: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2015.
    """

    Settings = Settings
    prefix = "target_smoothing_"

    settings: Settings

    @property
    def changes_loss(self) -> bool:
        return self.settings.factor != 0

    @property
    def reads(self) -> Reads:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("nll", "total_nll", "num_finite") if self.settings.factor else ()

    def keeps(self, targets: Tensor) -> Tensor | None:
        return targets != self.settings.padding_token if self.settings.exclude_padding else None

    def on_batch(self, batch: TokenBatch, draw: Callable[[], Tensor]) -> Measure:
        largest, num_classes = max(self.settings.special_tokens, default=0), batch.num_classes
        if num_classes is not None and largest >= num_classes:
            raise ValueError(
                f"special_tokens ({self.prefix}special_tokens) holds {largest}, and these are logits of "
                f"{num_classes} classes; expected ids below {num_classes}"
            )
        return super().on_batch(batch, draw)

    def token_loss(self, loss: Tensor, stats: TokenStats, batch: TokenBatch) -> Tensor:
        s = self.settings
        return smooth(
            loss,
            stats,
            batch,
            label_smoothing=s.factor,
            smoothing_mode=s.mode,
            special_tokens=s.special_tokens,
        )

    def measure(self, stats: TokenStats, batch: TokenBatch) -> Measured:
        return Measured(
            metrics={"smoothing_factor": self.settings.factor, "valid_positions": batch.num_tokens}
        )

    def loss_metrics(self, measured: Measured, losses: SampleLosses) -> Mapping[str, Source]:
        return loss_metrics(losses.unmodified.sum(), losses.produced.sum(), "smoothed_loss")
