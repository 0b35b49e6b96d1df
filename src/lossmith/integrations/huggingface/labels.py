"""Hugging Face's labels and counts, read for an objective; ``compute_loss_func``, which sees no more."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.predictions import Predictions
from lossmith.equation.batch import num_steps
from lossmith.equation.output import LossOutput
from lossmith.modifiers.base import ModelMode
from lossmith.objectives.objective import Objective

IGNORED = -100  # Hugging Face's, whatever the objective's own
NEXT_TOKEN = 1
# Words in the names of outputs whose labels are aligned with their logits.
ALIGNED = ("MaskedLM", "Classif", "Seq2Seq")


def compute_loss_func(loss: Objective) -> Callable[..., Tensor]:
    """``(outputs, labels, num_items_in_batch=None) -> loss``, for ``Trainer(compute_loss_func=...)``.

    The objective's ``shift`` says which logits predict a label. If it is None, the output decides: those of
    masked models, token classifiers and encoder-decoders have aligned labels, a sequence classifier has one
    label per sample, and all others predict the next token. The sum is divided by ``num_items_in_batch``,
    which the Trainer counts over micro-batches and ranks. The function sees only the model's output and the
    labels: labels must be -100 at padding, repetition penalties take the labels as their context, and
    components find ``gate_logits`` and ``hidden_states`` only if the output has ``router_logits`` and
    ``hidden_states``. :class:`LossTrainer` has none of these limits.

    Args:
        loss: an objective without parameters, which nothing would train or save.

    Raises:
        TypeError: not an objective; in a batch, labels that are not ids.
        ValueError: an objective with parameters to train, or one that does not divide by tokens; in a batch,
            a shift without a sequence.

    Example:
        >>> import torch, lossmith
        >>> from lossmith.integrations.huggingface import compute_loss_func
        >>> function = compute_loss_func(lossmith.CrossEntropyLoss(label_smoothing=0.1))
        >>> outputs = {"logits": torch.zeros(2, 4, 10)}
        >>> round(function(outputs, torch.ones(2, 4, dtype=torch.long), num_items_in_batch=12).item(), 4)
        1.1513
    """
    check_objective(loss, modes=(ModelMode.LANGUAGE_MODEL, ModelMode.TOKEN_CLASSIFIER))
    if any(parameter.requires_grad for parameter in loss.parameters()):
        raise ValueError(
            f"this {type(loss).__name__} has parameters, and compute_loss_func would neither train, nor "
            "synchronise, nor save them; use LossTrainer, or attach(model, loss)"
        )
    check_num_items(loss)

    def compute(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        shift = _steps_ahead(loss, outputs, labels)
        if any(buffer.device != logits.device for buffer in loss.buffers()):
            loss.to(logits.device)
        inputs = _made(loss, outputs) if isinstance(outputs, Mapping) else {}
        return evaluate(loss, logits, labels, num_items_in_batch, shift=shift, **inputs).total

    return compute


def evaluate(
    loss: Objective, predictions: Tensor | Predictions, labels: Tensor, num_items: Any, **inputs: Any
) -> LossOutput:
    """The loss at Hugging Face's labels, divided by the inputs' denominator or by ``num_items`` tokens."""
    if num_items is not None and inputs.get("denominator") is None:
        check_num_items(loss)  # for every batch: modifiers may be switched on later
        inputs["denominator"] = num_items
    return loss.evaluate(predictions, targets_of(loss, labels.to(predictions.device)), **inputs)


# ── what is refused ───────────────────────────────────────────────────────────────────────────────


def check_objective(loss: Any, modes: Collection[ModelMode] = (ModelMode.LANGUAGE_MODEL,)) -> None:
    """Refuse anything but an objective, one whose loss is not a scalar, and a pipeline of another mode."""
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
    """Refuse ``num_items_in_batch``, a number of tokens, if the objective divides by something else."""
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


# ── what is read ──────────────────────────────────────────────────────────────────────────────────


def targets_of(loss: Objective, labels: Tensor) -> Tensor:
    """Labels with -100 replaced by the objective's own ``ignore_index``."""
    own = loss.ignore_index
    return labels if own == IGNORED else labels.masked_fill(labels == IGNORED, own)


def label_mask(attention_mask: Any, labels: Tensor) -> Tensor | None:
    """[B, T] bool, False at padding. None unless the mask is [B, T] or, after a cache of S positions,
    [B, S + T]: attention kernels' masks say which tokens attend to which, not which are padding."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    if len(attention_mask) != len(labels) or attention_mask.shape[1] < labels.shape[1]:
        return None
    return attention_mask[:, attention_mask.shape[1] - labels.shape[1] :] != 0


def segments(position_ids: Any, labels: Tensor) -> Tensor | None:
    """[B, T] the number of the document that each token of a packed row belongs to: positions restart where
    one begins. None unless the positions are [B, T] or [1, T]."""
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
        return None
    if position_ids.shape[1] != labels.shape[1] or position_ids.shape[0] not in (1, labels.shape[0]):
        return None
    starts = torch.zeros_like(position_ids, dtype=torch.long)
    starts[:, 1:] = (position_ids[:, 1:] <= position_ids[:, :-1]).long()
    return starts.cumsum(-1).expand(labels.shape)


def _steps_ahead(loss: Objective, outputs: Any, labels: Any) -> int:
    """How many steps ahead the logits of a batch predict its labels."""
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        came = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"labels must be ids, [B, T], or [B] of a sequence classifier; got {came}. A model for "
            "regression, for several labels at once or for spans has a loss of its own"
        )
    said = None if loss.shift is None else num_steps(loss.shift)
    if labels.dim() < 2:
        if said:
            raise ValueError(
                f"labels of shape {list(labels.shape)} are one a sample, and shift={loss.shift!r} would give "
                "each sample another's; make the objective without shift"
            )
        return 0
    if said is not None:
        return said
    is_aligned = any(kind in type(outputs).__name__ for kind in ALIGNED)
    return 0 if is_aligned or hasattr(outputs, "encoder_last_hidden_state") else NEXT_TOKEN


def _made(loss: Objective, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that the objective wants and the output has."""
    wanted, made = loss.wanted_inputs, {}
    if "gate_logits" in wanted and outputs.get("router_logits"):
        made["gate_logits"] = list(outputs["router_logits"])
    if "hidden_states" in wanted and outputs.get("hidden_states"):
        made["hidden_states"] = outputs["hidden_states"][-1]
    return made
