"""``TokenBatch``: which token predicts what, and how much it counts — settled once per batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from lossmith.core.warn_user import warn_user
from lossmith.engine.checks import check_ids, check_targets, check_whole
from lossmith.engine.predictions import Predictions
from lossmith.engine.shards.sequence import SequenceShards
from lossmith.engine.shards.sequence_part import SequencePart
from lossmith.engine.sweep import flat
from lossmith.equation.reduction import (
    Denominator,
    Empty,
    Reduction,
    check_reduction,
    scalar_share,
    supervised,
)
from lossmith.options import kind_of
from lossmith.options.shared import IgnoreIndex, Shift, TokenWeight

_IGNORE_INDEX, _TOKEN_WEIGHT = kind_of(IgnoreIndex, "ignore_index"), kind_of(TokenWeight, "token_weight")
_SHIFT = kind_of(Shift, "shift")


@dataclass(frozen=True)
class TokenBatch:
    """The supervised tokens of a batch, aligned with the logits and flattened to [N].

    Attributes:
        targets: [N] the id that logits[n] predict; ``ignore_index`` where nothing is learned.
        valid: [N] bool, where there is something to learn.
        scale: [N] what a token's value is multiplied by in the sum: its share of the loss,
            the caller's ``token_weight`` included.
        ignore_index: the id that marks tokens without a target.
        shape: the shape [..., T] of the targets as they were given.
        input_ids: [N] the ids that the logits were computed from, or None.
        segment_ids: [N] which document of a packed row the position of the logits belongs to, or None.
        features: [N] further numbers of each position, by name.
        share: what a scalar of the whole batch is multiplied by: 1, or this micro-batch's
            part of the caller's denominator.
        count: what this batch alone would be divided by (0-dimensional).
        target_weight: [N] the class weights of the targets, or None.
        num_classes: V, where it was given.
        pad_token_id: the id of padding, or None.
        shift: how many positions at the end of a row have no target by construction.
        also_read: [N] bool, positions without a target whose statistics a loss still reads, such as one of
            tokens further ahead; or None.
        sequence: how the sequences are split across ranks, of which this is the whole; None if they are not.
    """

    targets: Tensor
    valid: Tensor
    scale: Tensor
    ignore_index: int
    shape: torch.Size
    count: Tensor
    share: Tensor | float = 1.0
    input_ids: Tensor | None = None
    segment_ids: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    target_weight: Tensor | None = None
    num_classes: int | None = None
    pad_token_id: int | None = None
    shift: int = 0
    also_read: Tensor | None = None
    sequence: SequenceShards | None = None

    @property
    def read_targets(self) -> Tensor:
        """[N] the targets at which the predictions are swept: any class where they are only looked at."""
        if self.also_read is None:
            return self.targets
        return self.targets.masked_fill(self.also_read & ~self.valid, 0)

    def own(self, values: Tensor) -> Tensor:
        """[N, ...] values at the positions that this rank has: all of them, unless sequences are split."""
        return values if self.sequence is None else self.sequence.own_rows(values)

    @property
    def own_shape(self) -> torch.Size:
        """That of the targets at the positions that this rank has."""
        return self.shape if self.sequence is None else torch.Size((*self.shape[:-1], self.sequence.size))

    def predicted(self, own: Predictions) -> Predictions:
        """Predictions of this rank's positions, as those of all of them."""
        return own if self.sequence is None else SequencePart(own, self.sequence)

    @property
    def num_tokens(self) -> Tensor:
        """How many tokens are supervised (0-dimensional; no synchronisation)."""
        return self.valid.sum()

    @property
    def can_be_unshifted(self) -> bool:
        """Whether the inputs are there to compare the targets with; what is shifted cannot be unshifted, and
        where a graph is made nobody can wait for an answer."""
        if self.input_ids is None or self.shift:
            return False
        is_graph = torch.compiler.is_compiling() or (
            self.targets.is_cuda and torch.cuda.is_current_stream_capturing()
        )
        return not is_graph

    def warn_if_unshifted(self) -> None:
        """Warn where every supervised target is the input at its own position. Waits for the device."""
        differs = (self.targets != self.input_ids) & self.valid
        if self.valid.nonzero().shape[0] > 0 and differs.nonzero().shape[0] == 0:
            warn_user(
                "every target equals the input at its own position, which teaches the model to copy. If the "
                "targets are labels as Hugging Face has them, pass shift=True"
            )

    def rows(self, values: Tensor) -> Tensor:
        """[N] values as [B, T]: a row a sample, all leading dimensions folded into B."""
        return values.reshape(as_rows(self.shape))

    @property
    def row_counts(self) -> Tensor:
        """[B] how many tokens of each sample are supervised."""
        return self.rows(self.valid).sum(-1)

    @property
    def num_positions(self) -> int:
        """How many tokens of a sample could be supervised."""
        return max(as_rows(self.shape)[1] - self.shift, 0)

    def spread(self, values: Tensor) -> Tensor:
        """[B] values of the samples as [N], each token its sample's."""
        return values.unsqueeze(-1).expand(as_rows(self.shape)).reshape(-1)

    def select(self, index: Tensor | slice) -> TokenBatch:
        """These tokens alone, with the scale that they have in the whole batch."""
        chosen: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in chosen.items():
            if isinstance(value, Tensor) and value.dim():
                chosen[name] = value[index]
        chosen["features"] = {name: value[index] for name, value in self.features.items()}
        chosen["shape"] = chosen["targets"].shape
        return TokenBatch(**chosen)


def align(
    targets: Tensor,
    *,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    input_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    features: Mapping[str, Tensor] | None = None,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
    num_classes: int | None = None,
    shift: bool | int = False,
    reduction: Reduction = "mean",
    denominator: Denominator | None = None,
    class_weight: Tensor | None = None,
    empty: Empty = "zero",
    dtype: torch.dtype = torch.float32,
) -> TokenBatch:
    """Settle targets, masks, the causal shift and the denominator of a batch.

    Args:
        targets: [..., T] ids. With ``shift`` they are labels, unshifted as Hugging Face has
            them: logits[t] predict targets[t + shift], and the last ``shift`` positions have no target.
        ignore_index: the id of positions without a target.
        mask: [..., T] bool or integers, or floats that are 0 or 1, 0 where a target does not count; it
            belongs to the targets and is shifted with them.
        token_weight: [..., T] weights of the targets, shifted with them; detached.
        input_ids: [..., T] what the logits were computed from; never shifted.
        segment_ids: [..., T] which document of a packed row a token of ``input_ids`` belongs to.
        features: [..., T] further numbers of each position of the logits, by name.
        pad_token_id: targets that equal it do not count, unless it is also ``eos_token_id``:
            then only the mask can tell padding from an end of sequence.
        eos_token_id: see ``pad_token_id``.
        num_classes: V, to check the targets where the caller would look for them.
        shift: how many steps ahead logits[t] predict: True is 1, False is 0.
        reduction, denominator, empty, dtype: see :func:`lossmith.equation.reduction.token_scale`.
        class_weight: [V] what a target counts for in the denominator.

    Raises:
        TypeError: targets, input_ids or segment_ids are not integers, or the shift no number of steps.
        ValueError: a shape differs from the targets', a target is out of range, a mask of floats is not of 0
            and 1, or an option is unknown.
    """
    check_targets(targets)
    check_reduction(reduction, empty)
    ignore_index, token_weight = _IGNORE_INDEX.check(ignore_index), _TOKEN_WEIGHT.check(token_weight)
    shift = num_steps(shift)
    shape, features = targets.shape, features or {}
    of_tokens = {"mask": mask, "token_weight": token_weight, **features}
    _check_given(targets, of_tokens, {"input_ids": input_ids, "segment_ids": segment_ids})
    targets = targets.long()
    if mask is not None:
        check_mask("mask", mask)
        targets = targets.masked_fill(mask == 0, ignore_index)
    if pad_token_id is not None and pad_token_id != eos_token_id:
        targets = targets.masked_fill(targets == pad_token_id, ignore_index)
    else:
        pad_token_id = None
    # those of an accelerator are looked at by its kernels
    seen_classes = num_classes if targets.is_cpu and not torch.compiler.is_compiling() else None
    if seen_classes is not None and shift:  # before they move
        check_ids("targets", targets, seen_classes, exempt=ignore_index, exempt_name="ignore_index")
        seen_classes = None
    weight = None if token_weight is None else token_weight.detach()
    if shift:
        targets = _shifted(targets, shift, ignore_index)
        weight = None if weight is None else _shifted(weight, shift, 0.0)
    counts = None
    if class_weight is not None:
        counts = class_weight.detach().to(dtype)[targets.clamp(0, len(class_weight) - 1)]
    valid, scale, own = supervised(
        targets,
        ignore_index,
        reduction,
        num_classes=seen_classes,
        denominator=denominator,
        weight=counts,
        empty=empty,
        dtype=dtype,
    )
    if weight is not None:
        scale = scale * weight.masked_fill(~valid, 0.0).to(dtype)
    return TokenBatch(
        targets=flat(targets),
        valid=flat(valid),
        scale=flat(scale),
        ignore_index=ignore_index,
        shape=shape,
        count=own,
        share=scalar_share(own, denominator),
        input_ids=None if input_ids is None else flat(input_ids).long(),
        segment_ids=None if segment_ids is None else flat(segment_ids).long(),
        features={name: flat(value) for name, value in features.items()},
        target_weight=None if counts is None else flat(counts),
        num_classes=num_classes,
        pad_token_id=pad_token_id,
        shift=shift,
    )


def _check_given(
    targets: Tensor, given: Mapping[str, Tensor | None], ids: Mapping[str, Tensor | None]
) -> None:
    """
    Raises:
        TypeError: something is no tensor, or ids are no integers.
        ValueError: a shape differs from the targets'.
    """
    for name, value in (*given.items(), *ids.items()):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a tensor of shape {list(targets.shape)}; got {type(value).__name__}"
            )
        if value.shape != targets.shape:
            raise ValueError(
                f"{name} must have the targets' shape {list(targets.shape)}; got {list(value.shape)}"
            )
        if name in ids:
            check_whole(name, value, "ids")


def check_mask(name: str, mask: Tensor) -> None:
    """A mask of floats is of 0 and 1; others would be weights. An accelerator answers later, so that the host
    need not wait, and so does a compiled loss.

    Raises:
        ValueError: another float; the message has the first one and its position.
    """
    if not mask.is_floating_point():
        return
    outside = (mask != 0) & (mask != 1)
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        message = f"{name} must be 0 or 1"
        torch._assert_async(~outside.any(), message)  # pyright: ignore[reportPrivateImportUsage]
        return
    where = outside.nonzero()
    if where.shape[0]:
        position = tuple(int(i) for i in where[0])
        raise ValueError(
            f"{name} must be 0 or 1 everywhere, 0 for what does not count; got {float(mask[position])} at "
            f"position {position}. Pass weights as token_weight"
        )


def as_rows(shape: torch.Size) -> tuple[int, int]:
    """[..., T] as [B, T]; a single token is one row of one."""
    return (shape[:-1].numel() if len(shape) > 1 else 1, shape[-1] if shape else 1)


def num_steps(shift: bool | int) -> int:
    """How many steps ahead ``shift`` says that logits predict."""
    return int(_SHIFT.check(shift))


def _shifted(values: Tensor, steps: int, fill: float | bool) -> Tensor:
    """values[t + steps] at t, ``fill`` at the end."""
    if values.dim() == 0:
        raise ValueError("shift=True needs targets [..., T]; got a single target without a sequence")
    out = torch.full_like(values, fill)
    out[..., :-steps] = values[..., steps:]
    return out
