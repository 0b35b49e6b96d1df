"""The loss inside the model's forward, whichever model it is."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

# (logits, labels, the model's other inputs, what to divide by) -> `loss` and whatever else is to be known
Loss = Callable[[Tensor, Tensor, dict[str, Any], Tensor | None], dict[str, Tensor]]


def with_loss(model: PreTrainedModel, loss: Loss) -> PreTrainedModel:
    """Let `model(..., labels=...)` return what `loss` makes of its logits; without labels it is as before.

    Whatever wraps the model (DistributedDataParallel, `torch.compile`, mixed precision) calls its forward,
    so a loss in there has the right gradients under all of them. The model's own loss is never computed:
    it sees no labels. Parameters, `state_dict` and `save_pretrained` are untouched.

    Args:
        model: a model whose output has `logits`.
        loss: see `Loss`; the result is what the forward returns.

    Returns:
        The same model.
    """
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, labels: Any = None, denominator: Any = None, **inputs: Any) -> Any:
        inputs.pop("num_items_in_batch", None)  # the Trainer's own name of the denominator
        output = original(*args, **inputs)
        return output if labels is None else loss(output.logits, labels, inputs, denominator)

    model.forward = forward
    # What the Trainer asks before it counts `num_items_in_batch`.
    model.accepts_loss_kwargs = True  # pyright: ignore[reportArgumentType]
    return model
