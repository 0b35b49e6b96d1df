"""The loss inside a model's forward."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lossmith.integrations.huggingface.fused_head import FusedHead

# (`logits` or the head's inputs, labels, the model's other inputs, denominator) -> `loss` and further outputs
Loss = Callable[[Mapping[str, Any], Tensor, dict[str, Any], Tensor | None], dict[str, Tensor]]


def with_loss(model: PreTrainedModel, loss: Loss, fused: FusedHead | None = None) -> PreTrainedModel:
    """Let `model(..., labels=...)` return the `loss` of its logits; without labels it works as before.

    Wrappers of the model (DistributedDataParallel, `torch.compile`, mixed precision) call its forward, so a
    loss inside it has the right gradients under all of them. The model sees no labels and computes no loss of
    its own. Parameters, `state_dict` and `save_pretrained` are untouched.

    Args:
        model: a model whose output has `logits`; it is returned.
        loss: see `Loss`.
        fused: the model's head, if training is to leave out the logits; `loss` gets the head's inputs
        instead.
    """
    original = model.forward
    if fused is not None:
        fused.watch(model)

    @functools.wraps(original)
    def forward(*args: Any, labels: Any = None, denominator: Any = None, **inputs: Any) -> Any:
        inputs.pop("num_items_in_batch", None)  # the Trainer's name of the denominator
        if labels is None:
            return original(*args, **inputs)
        if fused is None:
            predictions = original(*args, **inputs).logits
        else:
            *_, predictions = fused.run(model, lambda: original(*args, **inputs), leaves_out=model.training)
        return loss({"logits": predictions}, labels, inputs, denominator)

    model.forward = forward
    # The Trainer counts `num_items_in_batch` only if this is set.
    model.accepts_loss_kwargs = True  # pyright: ignore[reportArgumentType]
    return model
