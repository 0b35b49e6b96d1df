"""Engines around a small Llama that ``attach`` gave its loss; the logits are never made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engines_case import RANKS, Step, gradients_of
from loops import Found, each, steps, steps_of_deepspeed
from torch import Tensor
from trainers import llama

import lossmith


def forward_of(wrapped: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(ids, labels, denominator) -> the loss."""

    def forward(ids: Tensor, labels: Tensor, denominator: Tensor) -> Tensor:
        output = wrapped(ids, labels=labels, denominator=denominator)
        assert output.logits is None
        return output.loss

    return forward


def fsdp2(rank: int) -> Found:
    """The head in a group of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from lossmith.integrations.huggingface import attach

    mesh = init_device_mesh("cpu", (RANKS,))

    def run(objective: lossmith.Objective) -> list[Step]:
        model = attach(llama(), objective.double())
        for part in (*model.model.layers, model.lm_head, model):
            fully_shard(part, mesh=mesh)

        def backward(loss: Tensor, is_last: bool) -> None:
            model.set_requires_gradient_sync(is_last)
            (loss * RANKS).backward()

        return steps(objective, rank, forward_of(model), backward, lambda: gradients_of(model))

    return each(run)


def zero_3(rank: int) -> Found:
    from lossmith.integrations.huggingface import attach

    def run(objective: lossmith.Objective) -> list[Step]:
        model = attach(llama().float(), objective)
        return steps_of_deepspeed(objective, rank, model, forward_of, stage=3)

    return each(run)
