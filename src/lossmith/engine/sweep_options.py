"""``SweepOptions``: how an objective reads logits before anything is made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lossmith.engine.checks import check_targets, whole_candidates
from lossmith.engine.predictions import Predictions
from lossmith.engine.rows.backends import BackendName
from lossmith.engine.statistics.raw import Needs
from lossmith.engine.statistics.stats import TokenStats
from lossmith.engine.sweep import Sweep, flat
from lossmith.options import strict_options
from lossmith.options.shared import ClassWeight, Softcap, Temperature


@strict_options(name="")  # an objective's, whose attributes may have been set since it was made
@dataclass(frozen=True)
class SweepOptions:
    """How the logits are read: z <- softcap tanh(z / softcap), then over the temperature; and by whom."""

    temperature: Temperature = 1.0
    softcap: Softcap = None
    class_weight: ClassWeight = None
    backend: BackendName = None

    def sweep(
        self,
        predictions: Predictions,
        targets: Tensor,
        *,
        ignore_index: int,
        candidates: Tensor | None = None,
        asked: tuple[int, int] = (0, -1),
    ) -> Sweep:
        """The sweep of predictions [...] read this way, at ids of any integer dtype, for groups of statistics
        of the two temperatures.

        Raises:
            TypeError: ids that are not integers.
            ValueError: candidates that do not belong to the targets.
        """
        check_targets(targets)
        if candidates is not None:
            candidates = whole_candidates(candidates, targets)
            candidates = candidates.reshape(targets.numel(), candidates.shape[-1])
        return Sweep(
            flat(targets.long()),
            candidates,
            fitting_class_weight(self.class_weight, predictions),
            self._temperature_tensor(predictions),
            predictions.capped(self.softcap),
            ignore_index,
            *asked,
            self.backend,
        )

    def stats(
        self,
        predictions: Predictions,
        targets: Tensor,
        *,
        ignore_index: int,
        candidates: Tensor | None = None,
        default_needs: Needs = Needs.CORE,
    ) -> TokenStats:
        """Lazy statistics of predictions [...] read this way, in the targets' shape; see :meth:`sweep`."""
        sweep = self.sweep(predictions, targets, ignore_index=ignore_index, candidates=candidates)
        return predictions.stats(sweep, targets.shape, default_needs)

    @property
    def has_temperature(self) -> bool:
        """Whether there are two temperatures at which the logits can be read."""
        return isinstance(self.temperature, Tensor) or self.temperature != 1

    def _temperature_tensor(self, predictions: Predictions) -> Tensor | None:
        if isinstance(self.temperature, Tensor):
            return self.temperature.detach().to(predictions.device, predictions.dtype).reshape(())
        if not self.has_temperature:
            return None
        return torch.full((), self.temperature, dtype=predictions.dtype, device=predictions.device)


def fitting_class_weight(class_weight: Tensor | None, predictions: Predictions) -> Tensor | None:
    """
    Raises:
        ValueError: weights of another number of classes than the predictions have.
    """
    if class_weight is None:
        return None
    if class_weight.shape != (predictions.num_classes,):
        raise ValueError(
            f"class_weight must be [V] = [{predictions.num_classes}]; got {list(class_weight.shape)}"
        )
    return class_weight.detach().to(predictions.device, predictions.dtype)
