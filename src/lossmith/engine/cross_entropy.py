"""The cross-entropy family of given logits in one step: statistics, loss and parts on the way there, and the
gradient of the logits on the way back. Where no arithmetic has it, the same is made of terms, step by step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossmith.engine.checks import refuse_batched
from lossmith.engine.differentiable_once import once
from lossmith.engine.rows import native_cross_entropy
from lossmith.engine.statistics.raw import Needs
from lossmith.engine.tokens.family import CrossEntropyFamily

if TYPE_CHECKING:
    from lossmith.engine.sweep import Sweep


# The groups of statistics that the step may be asked for.
KNOWN = Needs.ENTROPY | Needs.SUM


class CrossEntropy:
    """The family at the tokens of a batch.

    Args:
        family: which terms.
        sweep: the tokens, and the groups of statistics that the terms are made of.
        scale: [N] what a token's value is multiplied by; None where ``settling`` says what to make it of, and
            nothing but the loss is wanted.
        target_weight: [N] class weights of the targets, or None.
        settling: how the shares of targets without weights are made on the way there: the reduction, how many
            positions a sample has, and whether the loss of an empty batch is NaN.

    Attributes:
        room: [R + K, N] the raw statistics in the engine's order, and what each token adds to each term, once
            :meth:`of_logits` has been there; with a row more for a scale that is made.
    """

    def __init__(
        self,
        family: CrossEntropyFamily,
        sweep: Sweep,
        scale: Tensor | None = None,
        target_weight: Tensor | None = None,
        *,
        settling: tuple[str, int, bool] | None = None,
    ) -> None:
        self.family, self.sweep, self.scale, self.target_weight = family, sweep, scale, target_weight
        self.settling, self.num_raw = settling, len(sweep.names)
        num_rows = self.num_raw + len(family.names) + (scale is None)
        self.room = sweep.targets.new_empty((num_rows, sweep.targets.numel()), dtype=torch.float32)

    @property
    def raw(self) -> Tensor:
        """[R, N] the raw statistics."""
        return self.room[: self.num_raw]

    @property
    def shares(self) -> Tensor:
        """[K, N] what each token adds to each term."""
        return self.room[self.num_raw : self.num_raw + len(self.family.names)]

    def of_logits(self, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of logits [..., V], such as the arithmetic takes, and its terms; differentiable."""
        total, *parts = _CrossEntropy.apply(self, logits)
        return total, dict(zip(self.family.names, parts or [total], strict=True))

    def total_of_logits(self, logits: Tensor) -> Tensor:
        """The loss alone."""
        return _CrossEntropy.apply(self, logits)[0]

    @property
    def read(self) -> list[Tensor]:
        """What comes from others, and is read on the way back."""
        sweep = self.sweep
        read = self.scale, self.target_weight, sweep.targets, sweep.class_weight, sweep.temperature
        return [one for one in read if one is not None]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of: CrossEntropy, logits: Tensor) -> tuple[Tensor, ...]:
        ctx.of = of
        # all that the way back reads, so that autograd sees when it is written over before
        ctx.save_for_backward(logits, *of.read)
        ctx.set_materialize_grads(False)
        return tuple(native_cross_entropy.forward(of, logits))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_batched(*upstream)
        (logits, *_) = ctx.saved_tensors
        if all(one is None for one in upstream):
            return None, None
        gradient = native_cross_entropy.backward(ctx.of, logits, upstream)
        return (None, *once([gradient], (logits, *upstream)))
