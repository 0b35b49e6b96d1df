"""``compute_loss_func``: an objective as the Trainer's argument of that name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lossmith.integrations.huggingface.labels import (
    check_num_items,
    check_objective,
    reading_labels,
    targets_of,
    wanted_inputs,
)
from lossmith.objective import Objective


def compute_loss_func(loss: Objective) -> Callable[..., Tensor]:
    """``(outputs, labels, num_items_in_batch=None) -> loss``, for ``Trainer(compute_loss_func=...)``.

    The causal shift is made once, whatever the objective's ``shift`` says, and the sum is divided by
    ``num_items_in_batch``, which the Trainer counts over micro-batches and ranks. There is nothing here but
    the model's output and the labels: labels have to be -100 at padding, repetition penalties see the labels
    as their context, and components find ``gate_logits`` and ``hidden_states`` where the output has
    ``router_logits`` and ``hidden_states``. :class:`LossTrainer` has none of these limits.

    Args:
        loss: an objective without parameters: nothing would train or save them.

    Raises:
        TypeError: no objective.
        ValueError: an objective with parameters to train, or one that divides by something else than tokens.

    Example:
        >>> import torch, lossmith
        >>> from lossmith.integrations.huggingface import compute_loss_func
        >>> function = compute_loss_func(lossmith.CrossEntropyLoss(label_smoothing=0.1))
        >>> outputs = {"logits": torch.zeros(2, 4, 10)}
        >>> round(function(outputs, torch.ones(2, 4, dtype=torch.long), num_items_in_batch=12).item(), 4)
        1.1513
    """
    check_objective(loss)
    if any(parameter.requires_grad for parameter in loss.parameters()):
        raise ValueError(
            f"this {type(loss).__name__} has parameters, and compute_loss_func would neither train, nor "
            "synchronise, nor save them; use LossTrainer, or attach(model, loss)"
        )
    check_num_items(loss)

    def compute(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if num_items_in_batch is not None:
            check_num_items(loss)  # modifiers may have been switched on
        if any(buffer.device != logits.device for buffer in loss.buffers()):
            loss.to(logits.device)
        targets = targets_of(loss, labels.to(logits.device))
        inputs = _made(loss, outputs) if isinstance(outputs, Mapping) else {}
        return reading_labels(
            loss, lambda: loss.evaluate(logits, targets, denominator=num_items_in_batch, **inputs).total
        )

    return compute


def _made(loss: Objective, outputs: Mapping[str, Any]) -> dict[str, Any]:
    wanted, made = wanted_inputs(loss), {}
    if "gate_logits" in wanted and outputs.get("router_logits"):
        made["gate_logits"] = list(outputs["router_logits"])
    if "hidden_states" in wanted and outputs.get("hidden_states"):
        made["hidden_states"] = outputs["hidden_states"][-1]
    return made
