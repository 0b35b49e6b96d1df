"""``compute_loss_func``: an objective as the Trainer's argument of that name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lossmith.equation.batch import num_steps
from lossmith.integrations.huggingface.labels import NEXT_TOKEN, check_num_items, check_objective, targets_of
from lossmith.modifiers.base import ModelMode
from lossmith.objectives.objective import Objective

# In the names of outputs whose labels belong to the logits at their own position.
ALIGNED = ("MaskedLM", "Classif", "Seq2Seq")


def compute_loss_func(loss: Objective) -> Callable[..., Tensor]:
    """``(outputs, labels, num_items_in_batch=None) -> loss``, for ``Trainer(compute_loss_func=...)``.

    The objective's ``shift`` says which logits predict a label. Where it is None, the output does: those of
    masked models, token classifiers and encoder-decoders have labels at their own positions, a sequence
    classifier has one a sample, and all others predict the next token. The sum is divided by
    ``num_items_in_batch``, which the Trainer counts over micro-batches and ranks. There is nothing here but
    the model's output and the labels: labels have to be -100 at padding, repetition penalties see the labels
    as their context, and components find ``gate_logits`` and ``hidden_states`` where the output has
    ``router_logits`` and ``hidden_states``. :class:`LossTrainer` has none of these limits.

    Args:
        loss: an objective without parameters: nothing would train or save them.

    Raises:
        TypeError: no objective; in a batch, labels that are no ids.
        ValueError: an objective with parameters to train, or one that divides by something else than tokens;
            in a batch, a shift where there is no sequence.

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
        if num_items_in_batch is not None:
            check_num_items(loss)  # modifiers may have been switched on
        if any(buffer.device != logits.device for buffer in loss.buffers()):
            loss.to(logits.device)
        targets = targets_of(loss, labels.to(logits.device))
        inputs = _made(loss, outputs) if isinstance(outputs, Mapping) else {}
        return loss.evaluate(logits, targets, denominator=num_items_in_batch, shift=shift, **inputs).total

    return compute


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
    """What the output has of the inputs that the objective wants."""
    wanted, made = loss.wanted_inputs, {}
    if "gate_logits" in wanted and outputs.get("router_logits"):
        made["gate_logits"] = list(outputs["router_logits"])
    if "hidden_states" in wanted and outputs.get("hidden_states"):
        made["hidden_states"] = outputs["hidden_states"][-1]
    return made
