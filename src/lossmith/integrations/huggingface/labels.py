"""What Hugging Face calls labels and what it counts, read as an objective reads them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from lossmith.equation.batch import num_steps
from lossmith.equation.reduction import Reduction
from lossmith.modifiers.base import ModelMode
from lossmith.modifiers.pipeline import LossModifierPipeline
from lossmith.objectives.composed import ComposedLoss
from lossmith.objectives.objective import Objective
from lossmith.objectives.wrapped import WrappedObjective

IGNORED = -100  # Hugging Face's, whatever an objective has
NEXT_TOKEN = 1


def check_objective(loss: Any, modes: Collection[ModelMode] = (ModelMode.LANGUAGE_MODEL,)) -> None:
    """
    Args:
        loss: what is to be an objective.
        modes: the modes that a pipeline may have.

    Raises:
        TypeError: no objective.
        ValueError: one whose loss is no number, or that is not of tokens.
    """
    if not isinstance(loss, Objective):
        raise TypeError(f"loss must be a lossmith.Objective; got {type(loss).__name__}")
    if isinstance(loss, LossModifierPipeline) and loss.model_mode not in (None, *modes):
        names = " or ".join(mode.name for mode in modes)
        raise ValueError(f"expected a pipeline of model_mode={names}; got {loss.model_mode.name}")
    if resolved_reduction(loss) == "none":
        raise ValueError(
            "a model's loss is one number, and reduction='none' gives one a token; "
            "make the objective with reduction='mean'"
        )


def resolved_reduction(loss: Objective) -> Reduction:
    """How the tokens are averaged now: a pipeline decides by the modifiers that are enabled."""
    if isinstance(loss, LossModifierPipeline):
        return loss._reduction("auto", loss._enabled(loss.model_mode or ModelMode.LANGUAGE_MODEL))
    return loss.reduction


def check_num_items(loss: Objective) -> None:
    """
    Raises:
        ValueError: ``num_items_in_batch``, a number of tokens, is not what the objective divides by.
    """
    divides_by = None
    if resolved_reduction(loss) == "sequence_mean":
        divides_by = "samples (reduction='sequence_mean')"
    elif loss.class_weight is not None:
        divides_by = "tokens times their class weights"
    if divides_by is not None:
        raise ValueError(
            f"num_items_in_batch is a number of tokens, and this {type(loss).__name__} divides by "
            f"{divides_by}. Use LossTrainer, which counts what the objective counts; in a loop of your own "
            "pass denominator=, the sum of loss.count(labels, shift=True) over all micro-batches and ranks"
        )


def steps_read(loss: Objective, own: int | None) -> int:
    """How many steps ahead a model's logits predict its labels: as many as the objective asks for, or else as
    many as in the model's own loss. ``shift=False`` asks for nothing, where that is known.

    Args:
        loss: the objective.
        own: what the model's own loss does, or None if that is not known.
    """
    said = None if loss.shift is None else num_steps(loss.shift)
    if said or own is None:
        return NEXT_TOKEN if said is None else said
    return own


def targets_of(loss: Objective, labels: Tensor) -> Tensor:
    """Labels with the objective's own id where there is none."""
    return (
        labels if loss.ignore_index == IGNORED else labels.masked_fill(labels == IGNORED, loss.ignore_index)
    )


def label_mask(attention_mask: Any, labels: Tensor) -> Tensor | None:
    """[B, T] bool, False at padding, or None where the mask does not say.

    Args:
        attention_mask: [B, T], or [B, S + T] with a cache of S positions before; others (4-dimensional, of a
            kernel) say who sees whom, not which tokens are padding.
        labels: [B, T].
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    if len(attention_mask) != len(labels) or attention_mask.shape[1] < labels.shape[1]:
        return None
    return attention_mask[:, attention_mask.shape[1] - labels.shape[1] :] != 0


def segments(position_ids: Any, labels: Tensor) -> Tensor | None:
    """[B, T] the number of the document that each token of a packed row belongs to: positions start again
    where one begins. None where the positions are not [B, T].

    Args:
        position_ids: [B, T] or [1, T].
        labels: [B, T].
    """
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


def wanted_inputs(loss: Objective) -> set[str]:
    """Names of the inputs that the objective would use, rather than merely take: a component that is off
    wants nothing."""
    if isinstance(loss, ComposedLoss):
        names = wanted_inputs(loss.base)
        for weighted in loss.components.values():
            if weighted.weight != 0:
                component: Any = weighted.component
                names |= {*component.required, *component.optional}
        return names
    return wanted_inputs(loss.base) if isinstance(loss, WrappedObjective) else set(loss.input_names)
