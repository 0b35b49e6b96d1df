"""``Aligned``: how an objective aligns targets with predictions, and what it divides by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lossmith.engine.predictions import Predictions
from lossmith.engine.sweep_options import fitting_class_weight
from lossmith.equation.batch import TokenBatch, align
from lossmith.equation.reduction import Empty, Reduction


class Aligned(nn.Module):
    """The part of an :class:`lossmith.Objective` that is about targets: which token predicts what, which of
    them count, and what they are divided by."""

    reduction: Reduction
    ignore_index: int
    shift: bool | int | None
    empty: Empty
    class_weight: Tensor | None
    # Targets that equal it are ignored, unless it is the end-of-text id too: see `align`.
    pad_token_id: int | None
    eos_token_id: int | None
    # Of the inputs, the per-position ones, [..., T].
    feature_names: tuple[str, ...] = ()
    _shift_was_checked: bool

    def kept(self, targets: Tensor, ignore_index: int) -> Tensor:
        """The targets [..., T], with ``ignore_index`` in place of those that a subclass leaves out."""
        return targets

    def also_read(self, batch: TokenBatch, inputs: Mapping[str, Any]) -> Tensor | None:
        """[N] bool, positions without a target whose statistics :meth:`complete` also reads, from
        ``output.all_stats``; None for none."""
        return None

    def features(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The per-position inputs."""
        return {name: inputs[name] for name in self.feature_names if inputs.get(name) is not None}

    def bind(
        self,
        predictions: Predictions,
        targets: Tensor,
        inputs: Mapping[str, Any] | None = None,
        *,
        reduction: Reduction | None = None,
        ignore_index: int | None = None,
        **given: Any,
    ) -> TokenBatch:
        """Check a batch and align it with its predictions.

        Args:
            predictions: logits, or a linear head.
            targets, given: as for :meth:`evaluate`.
            inputs: what else the objective was given; None where only the targets matter.
            reduction, ignore_index: override the objective's own.
        """
        predictions.check(targets)
        batch = self._align(
            targets,
            ignore_index=self.ignore_index if ignore_index is None else ignore_index,
            reduction=reduction or self.reduction,
            num_classes=predictions.num_classes,
            class_weight=fitting_class_weight(self.class_weight, predictions),
            dtype=predictions.dtype,
            features=None if inputs is None else self.features(inputs),
            **given,
        )
        self._warn_if_unshifted(batch)
        also_read = None if inputs is None else self.also_read(batch, inputs)
        return batch if also_read is None else replace(batch, also_read=also_read)

    def count(
        self,
        targets: Tensor,
        *,
        mask: Tensor | None = None,
        reduction: Reduction | None = None,
        ignore_index: int | None = None,
        shift: bool | int | None = None,
    ) -> Tensor:
        """What this objective divides by: the supervised tokens, or samples under ``sequence_mean``.

        Its sum over all micro-batches and ranks is the ``denominator`` to pass with each of them.

        Args:
            targets, mask: [..., T], as for :meth:`evaluate`.
            reduction, ignore_index, shift: override the objective's own.
        """
        ignored = self.ignore_index if ignore_index is None else ignore_index
        return self._align(
            self.kept(targets, ignored),
            mask=mask,
            shift=shift,
            reduction=reduction or self.reduction,
            ignore_index=ignored,
            class_weight=self.class_weight,
        ).count

    def _align(self, targets: Tensor, *, shift: bool | int | None = None, **given: Any) -> TokenBatch:
        own = False if self.shift is None else self.shift
        return align(
            targets,
            shift=own if shift is None else shift,
            empty=self.empty,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_id,
            **given,
        )

    def _warn_if_unshifted(self, batch: TokenBatch) -> None:
        """Checks only the first batch: the mistake is in the wiring, and the check waits for the device."""
        if not self._shift_was_checked and batch.can_be_unshifted:
            self._shift_was_checked = True
            batch.warn_if_unshifted()
