"""What Hugging Face calls labels and what it counts, read as an objective reads them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from lossmith.equation.batch import num_steps
from lossmith.modifiers.base import ModelMode
from lossmith.objectives.objective import Objective

IGNORED = -100  # Hugging Face's, whatever an objective has
NEXT_TOKEN = 1


def check_objective(loss: Any, modes: Collection[ModelMode] = (ModelMode.LANGUAGE_MODEL,)) -> None:
    """
    Raises:
        TypeError: no objective.
        ValueError: one whose loss is no number, or a pipeline of another mode than these.
    """
    if not isinstance(loss, Objective):
        raise TypeError(f"loss must be a lossmith.Objective; got {type(loss).__name__}")
    mode: ModelMode | None = getattr(loss, "model_mode", None)
    if mode is not None and mode not in modes:
        names = " or ".join(mode.name for mode in modes)
        raise ValueError(f"expected a pipeline of model_mode={names}; got {mode.name}")
    if loss.resolved_reduction == "none":
        raise ValueError(
            "a model's loss is one number, and reduction='none' gives one a token; "
            "make the objective with reduction='mean'"
        )


def check_num_items(loss: Objective) -> None:
    """
    Raises:
        ValueError: ``num_items_in_batch``, a number of tokens, is not what the objective divides by.
    """
    if loss.resolved_reduction == "sequence_mean":
        divides_by = "samples (reduction='sequence_mean')"
    elif loss.class_weight is not None:
        divides_by = "tokens times their class weights"
    else:
        return
    raise ValueError(
        f"num_items_in_batch is a number of tokens, and this {type(loss).__name__} divides by "
        f"{divides_by}. Use LossTrainer, which counts what the objective counts; in a loop of your own "
        "pass denominator=, the sum of loss.count(labels, shift=True) over all micro-batches and ranks"
    )


def steps_read(loss: Objective, own: int | None) -> int:
    """How many steps ahead a model's logits predict its labels: as many as the objective asks for, or else as
    many as in the model's own loss, if these are known. ``shift=False`` asks for nothing where they are."""
    said = None if loss.shift is None else num_steps(loss.shift)
    if said or own is None:
        return NEXT_TOKEN if said is None else said
    return own


def targets_of(loss: Objective, labels: Tensor) -> Tensor:
    """Labels with the objective's own id where there is none."""
    own = loss.ignore_index
    return labels if own == IGNORED else labels.masked_fill(labels == IGNORED, own)


def label_mask(attention_mask: Any, labels: Tensor) -> Tensor | None:
    """[B, T] bool, False at padding. None where the mask is neither [B, T] nor, with a cache of S positions
    before, [B, S + T]: others, of a kernel, say who sees whom, not which tokens are padding."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    if len(attention_mask) != len(labels) or attention_mask.shape[1] < labels.shape[1]:
        return None
    return attention_mask[:, attention_mask.shape[1] - labels.shape[1] :] != 0


def segments(position_ids: Any, labels: Tensor) -> Tensor | None:
    """[B, T] the number of the document that each token of a packed row belongs to: positions start again
    where one begins. None where the positions are neither [B, T] nor [1, T]."""
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
        return None
    if position_ids.shape[1] != labels.shape[1] or position_ids.shape[0] not in (1, labels.shape[0]):
        return None
    starts = torch.zeros_like(position_ids, dtype=torch.long)
    starts[:, 1:] = (position_ids[:, 1:] <= position_ids[:, :-1]).long()
    return starts.cumsum(-1).expand(labels.shape)


def count(loss: Objective, labels: Tensor, attention_mask: Any = None, shift: int = NEXT_TOKEN) -> Tensor:
    """What ``loss`` divides by for labels as Hugging Face has them; see :meth:`lossmith.Objective.count`."""
    return loss.count(targets_of(loss, labels), mask=label_mask(attention_mask, labels), shift=shift)
