"""``Call``: the arguments of one call of a pipeline, besides predictions and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.batch import TokenBatch
from lossmith.equation.reduction import Reduction
from lossmith.modifiers.base import BaseLossModifier, ModelMode

# Inputs that custom modifiers do not see.
OF_THE_EQUATION = ("token_weight", "shift", "scalars")


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a pipeline, besides predictions and targets.

    Attributes:
        modifiers: the enabled ones, in the pipeline's order.
        mode: what the model predicts.
        reduction: how tokens or scores are averaged.
        ignore_index: the id that marks a position without a target.
        loss: the caller's reduced loss so far.
        per_position_loss: [..., T] the caller's, which replaces the objective's own.
        stats: the caller's statistics of the batch.
        inputs: what else the caller gave, by name.
    """

    modifiers: Sequence[Any]  # built-in kinds have different methods
    mode: ModelMode
    reduction: Reduction
    ignore_index: int
    loss: Tensor | None = None
    per_position_loss: Tensor | None = None
    stats: TokenStats | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def built_in(self) -> list[Any]:
        """The modifiers that are not custom."""
        return [modifier for modifier in self.modifiers if not modifier.is_custom]

    @property
    def custom(self) -> list[tuple[int, BaseLossModifier]]:
        """The custom modifiers, with their positions."""
        return [(p, modifier) for p, modifier in enumerate(self.modifiers) if modifier.is_custom]

    @property
    def for_custom(self) -> dict[str, Any]:
        """The arguments of the call that custom modifiers get."""
        return {
            **dict.fromkeys(("input_ids", "segment_ids")),
            **{name: value for name, value in self.inputs.items() if name not in OF_THE_EQUATION},
            "model_mode": self.mode,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
        }

    def check(self, targets: Tensor) -> None:
        """
        Raises:
            TypeError: ``ignore_index``, ``per_position_loss`` or ``stats`` has the wrong type.
            ValueError: the shape of ``per_position_loss`` is not the targets'.
        """
        losses = self.per_position_loss
        if not isinstance(self.ignore_index, Integral) or isinstance(self.ignore_index, bool):
            raise TypeError(f"ignore_index must be an id, a whole number; got {self.ignore_index!r}")
        check_tensor("per_position_loss", losses)
        if losses is not None and not losses.is_floating_point():
            raise TypeError(f"per_position_loss must be floating point; got {losses.dtype}")
        if losses is not None and losses.shape != targets.shape:
            raise ValueError(
                f"per_position_loss must have the targets' shape {list(targets.shape)}; "
                f"got {list(losses.shape)}"
            )
        if self.stats is not None and not isinstance(self.stats, TokenStats):
            raise TypeError(f"stats must be lossmith.TokenStats; got {type(self.stats).__name__}")

    def stats_of(self, batch: TokenBatch) -> TokenStats | None:
        """The caller's statistics, flat, at the batch's targets.

        Raises:
            ValueError: they belong to other targets, or cover fewer positions than the batch reads.
        """
        if self.stats is None:
            return None
        theirs = self.stats.targets
        if theirs.numel() != batch.targets.numel():
            raise ValueError(
                f"stats must be those of the targets, {list(batch.shape)}; got {list(theirs.shape)}"
            )
        # elsewhere the check would wait for the device
        looks = batch.targets.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and ((theirs.reshape(-1) != batch.targets) & batch.valid).nonzero().numel():
            raise ValueError(
                "stats are of other targets than these. With shift=True logits[t] predict targets[t + 1]; "
                "pass the statistics of those"
            )
        if batch.also_read is not None:
            raise ValueError(
                "a component looks at predictions of positions without a target, which the given stats do "
                "not have; leave stats out"
            )
        return self.stats.restrict(batch.targets, batch.ignore_index, keeps_candidates=False)


def check_tensor(name: str, value: Any) -> None:
    """Raise a TypeError unless the value is a tensor or None."""
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
