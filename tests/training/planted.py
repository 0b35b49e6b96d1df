"""Faults planted into a run at a step, a sample and a position."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from lossmith.training.run.trainer import TaskTrainer

STEP, SAMPLE, POSITION = 5, 2, 7
# What happens to a model's parts at that step: (module, its output) -> another output
Fault = Callable[[Any, Tensor], Tensor]


def plant(
    monkeypatch: pytest.MonkeyPatch, module: str, fault: Fault, steps: tuple[int, ...] = (STEP,)
) -> None:
    """Let the output of a module pass through a fault at some steps, whenever they are computed."""
    original = TaskTrainer.compute_loss
    watched: list[Any] = []

    def compute_loss(self: Any, model: Any, *args: Any, **options: Any) -> Any:
        if not watched:

            def hook(found: Any, _: Any, output: Any) -> Any:
                if model.training and self.state.global_step + 1 in steps:
                    return fault(found, output)
                return None

            watched.append(self.model.get_submodule(module).register_forward_hook(hook))
        return original(self, model, *args, **options)

    monkeypatch.setattr(TaskTrainer, "compute_loss", compute_loss)


def with_row(value: float) -> Fault:
    """All numbers of one position become a value."""

    def fault(_: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[SAMPLE, POSITION] = value
        return output

    return fault


def with_gradient(_: Any, output: Tensor) -> Tensor:
    """The gradient becomes infinite."""
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient * math.inf)
    return output


def with_parameter(module: Any, output: Tensor) -> Tensor:
    """A parameter of the module becomes no number."""
    module.weight.data[0] = math.nan
    return output * module.weight.data.sum()


LAST_NORM = "model.norm"
