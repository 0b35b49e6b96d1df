"""Losses, gradients and weights that are not finite: the run stops, or skips the step and counts it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

STATE = "FiniteSteps"  # the class's name, under which the Trainer saves its state


class FiniteSteps(TrainerCallback, ExportableState):
    """Watches the losses and gradients of every step, before the step moves the weights.

    If it skips, a step with one that is not finite changes neither the weights nor the optimizer nor the
    state of the loss; the data and the learning rate go on. To know, the host waits for the device once a
    step.

    Args:
        loss: its buffers are restored if a step is skipped.
        skips: whether such a step is skipped.
        tell: called after the way back of such a step, on all ranks, with whether a loss was not finite,
            rather than a gradient.
    """

    def __init__(self, loss: nn.Module, *, skips: bool, tell: Callable[[bool], None] = lambda is_loss: None):
        self.loss = loss
        self.skips = skips
        self.tell = tell
        self.skipped = 0
        self.is_step_finite: Tensor | None = None  # a bool scalar on the device
        self.is_run_finite = True
        self.before: list[tuple[Tensor, Tensor]] = []
        self.to_restore = False

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"skipped": self.skipped}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = state.stateful_callbacks.setdefault(STATE, self.state())
        found = saved.get("attributes", {}).get("skipped", 0) if isinstance(saved, dict) else 0
        self.skipped = found if type(found) is int else 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.is_step_finite, self.to_restore = None, False
        if self.skips:
            self.before = [(buffer, buffer.clone()) for buffer in self.loss.buffers()]

    def see(self, loss: Tensor) -> Tensor:
        """Take note of the loss of a micro-batch; returns whether it is finite."""
        is_finite = loss.detach().isfinite().all()
        before = self.is_step_finite
        self.is_step_finite = is_finite if before is None else before & is_finite
        return is_finite

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        is_loss = self.is_step_finite
        assert is_loss is not None, "a step without a loss"
        both = torch.stack([is_loss, is_loss])
        if getattr(optimizer, "scaler", None) is None:  # a scaler looks for itself, and skips
            both[1] &= finite_gradients(model.parameters()).to(both.device)
        if args.world_size > 1:
            everywhere = both.to(torch.int32)
            torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
            both = everywhere.bool()
        is_loss_finite, is_finite = both.tolist()  # waits for the device
        if is_finite:
            return
        self.is_run_finite = self.skips
        self.tell(not is_loss_finite)
        if self.skips:
            for parameter in model.parameters():  # an optimizer passes over what has no gradient
                parameter.grad = None
            self.to_restore = True
            self.skipped += 1

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.to_restore:
            for buffer, value in self.before:
                buffer.copy_(value)

    def are_finite(self) -> bool:
        """Whether every loss and gradient that was not skipped was finite."""
        return self.is_run_finite


def finite_gradients(parameters: Iterable[Tensor]) -> Tensor:
    """Whether all gradients are finite, as a bool scalar."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # The largest, since squares overflow. Of NaN and anything it is NaN.
    return whole(get_total_norm(gradients, float("inf"))).isfinite()


@torch.no_grad()
def finite_weights(model: nn.Module) -> bool:
    """Whether all parameters are finite."""
    found = [whole(parameter.isfinite().all()) for parameter in model.parameters()]
    return not found or bool(torch.stack([each.to(found[0].device) for each in found]).all())


def whole(value: Any) -> Tensor:
    """A scalar that may be sharded, in whole."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
