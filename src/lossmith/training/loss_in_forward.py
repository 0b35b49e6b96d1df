"""The loss inside the model's forward, whichever model it is."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lossmith.integrations.huggingface.fused_head import FusedHead

# (`logits`, or what stands in their place, labels, the model's other inputs, what to divide by) -> `loss` and
# whatever else is to be known
Loss = Callable[[Mapping[str, Any], Tensor, dict[str, Any], Tensor | None], dict[str, Tensor]]


def with_loss(model: PreTrainedModel, loss: Loss, fused: FusedHead | None = None) -> PreTrainedModel:
    """Let `model(..., labels=...)` return what `loss` makes of its logits; without labels it is as before.

    Whatever wraps the model (DistributedDataParallel, `torch.compile`, mixed precision) calls its forward,
    so a loss in there has the right gradients under all of them. The model's own loss is never computed:
    it sees no labels. Parameters, `state_dict` and `save_pretrained` are untouched.

    Args:
        model: a model whose output has `logits`.
        loss: see `Loss`; the result is what the forward returns.
        fused: the model's head, where it is to be left out of the forward in training: `loss` gets what is
            multiplied there, and no logits.

    Returns:
        The same model.
    """
    original = model.forward
    if fused is not None:
        fused.watch(model)

    @functools.wraps(original)
    def forward(*args: Any, labels: Any = None, denominator: Any = None, **inputs: Any) -> Any:
        inputs.pop("num_items_in_batch", None)  # the Trainer's own name of the denominator
        if labels is None:
            return original(*args, **inputs)
        if fused is None:
            predictions = original(*args, **inputs).logits
        else:
            *_, predictions = fused.run(model, lambda: original(*args, **inputs), leaves_out=model.training)
        return loss({"logits": predictions}, labels, inputs, denominator)

    model.forward = forward
    # What the Trainer asks before it counts `num_items_in_batch`.
    model.accepts_loss_kwargs = True  # pyright: ignore[reportArgumentType]
    return model
