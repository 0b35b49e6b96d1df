"""Engines around a model whose forward computes the loss, each used as its own documentation has it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from engines_case import LOSSES, MICRO_BATCHES, RANKS, Layer, Model, Step, gradients_of, shares
from torch import Tensor, nn

import lossmith

Found = dict[str, list[Step]]
SGD = {"lr": 0.0}  # the second step begins where the first did


def each(run: Callable[[lossmith.Objective], list[Step]]) -> Found:
    """The steps of every loss."""
    return {name: run(loss.make("global")) for name, loss in LOSSES.items()}


def steps(
    objective: lossmith.Objective,
    rank: int,
    forward: Callable[..., Tensor],
    backward: Callable[[Tensor, bool], None],
    gradients: Callable[[], dict[str, Tensor]],
    around: Callable[[bool], Any] = lambda is_last: contextlib.nullcontext(),
) -> list[Step]:
    """The steps of a loop.

    Args:
        objective, rank: whose micro-batches.
        forward: the wrapped model.
        backward: (loss, whether it is the last micro-batch's) -> nothing.
        gradients: those of the step, dropped in the model.
        around: a context of each micro-batch.
    """
    found = []
    for micro_batches in shares(objective, rank):
        total = torch.zeros(())
        for number, inputs in enumerate(micro_batches, start=1):
            is_last = number == len(micro_batches)
            with around(is_last):
                loss = forward(*inputs)
                backward(loss, is_last)
            total = total + loss.detach()
        found.append({"loss": total, "gradients": gradients()})
    return found


# ── PyTorch's own ─────────────────────────────────────────────────────────────────────────────────


def ddp(rank: int) -> Found:
    def run(objective: lossmith.Objective) -> list[Step]:
        model = Model(objective)
        wrapped = nn.parallel.DistributedDataParallel(model)
        return steps(
            objective,
            rank,
            wrapped,
            lambda loss, _: (loss * RANKS).backward(),
            lambda: gradients_of(model),
            lambda is_last: contextlib.nullcontext() if is_last else wrapped.no_sync(),
        )

    return each(run)


def fsdp1(rank: int) -> Found:
    from fsdp_on_cpu import let_fsdp1_use_the_cpu
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    let_fsdp1_use_the_cpu()

    def run(objective: lossmith.Objective) -> list[Step]:
        model = Model(objective)
        # The layers in units of their own, as those of a transformer; head and loss in the root's.
        layers = ModuleWrapPolicy({Layer})
        given = {"use_orig_params": True, "device_id": torch.device("cpu")}
        wrapped = FullyShardedDataParallel(model, auto_wrap_policy=layers, **given)

        def gradients() -> dict[str, Tensor]:
            with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
                found = gradients_of(model)
            wrapped.zero_grad()
            return {name.replace("_fsdp_wrapped_module.", ""): g for name, g in found.items()}

        return steps(
            objective,
            rank,
            wrapped,
            lambda loss, _: (loss * RANKS).backward(),
            gradients,
            lambda is_last: contextlib.nullcontext() if is_last else wrapped.no_sync(),
        )

    return each(run)


def fsdp2(rank: int, apart: bool = False, **of_the_model: bool) -> Found:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))

    def run(objective: lossmith.Objective) -> list[Step]:
        model = Model(objective, **of_the_model)
        model.unshards_head = apart
        for part in (*model.layers, *([model.head] if apart else []), model):
            fully_shard(part, mesh=mesh)

        def backward(loss: Tensor, is_last: bool) -> None:
            model.set_requires_gradient_sync(is_last)
            (loss * RANKS).backward()

        assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        return steps(objective, rank, model, backward, lambda: gradients_of(model))

    return each(run)


def fsdp2_tied(rank: int) -> Found:
    return fsdp2(rank, tied=True)


def fsdp2_checkpointed(rank: int) -> Found:
    return fsdp2(rank, checkpointed=True)


def fsdp2_apart(rank: int) -> Found:
    return fsdp2(rank, apart=True)


# ── accelerate, Lightning, Fabric ─────────────────────────────────────────────────────────────────


def accelerate(rank: int) -> Found:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
    assert accelerator.num_processes == RANKS
    factor = accelerator.num_processes * accelerator.gradient_accumulation_steps

    def run(objective: lossmith.Objective) -> list[Step]:
        model = Model(objective)
        wrapped = accelerator.prepare(model)
        return steps(
            objective,
            rank,
            wrapped,
            lambda loss, _: accelerator.backward(loss * factor),
            lambda: gradients_of(model),
            lambda _: accelerator.accumulate(wrapped),
        )

    return each(run)


def lightning(rank: int) -> Found:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy

    class Training(LightningModule):
        def __init__(self, objective: lossmith.Objective) -> None:
            super().__init__()
            self.model = Model(objective)
            self.found: list[Step] = []
            self.total = torch.zeros(())

        def training_step(self, inputs: Any, _: int) -> Tensor:
            loss = self.model(*inputs)
            self.total = self.total + loss.detach()
            return loss * self.trainer.world_size * self.trainer.accumulate_grad_batches

        def on_before_optimizer_step(self, _: Any) -> None:
            gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
            self.found.append({"loss": self.total, "gradients": gradients})
            self.total = torch.zeros(())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), **SGD)

    def run(objective: lossmith.Objective) -> list[Step]:
        training = Training(objective)
        trainer = Trainer(
            accelerator="cpu",
            devices=RANKS,
            strategy=DDPStrategy(process_group_backend="gloo"),
            accumulate_grad_batches=MICRO_BATCHES,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        inputs = [one for micro_batches in shares(objective, rank) for one in micro_batches]
        trainer.fit(training, torch.utils.data.DataLoader(inputs, batch_size=None))  # pyright: ignore
        assert trainer.world_size == RANKS
        return training.found

    return each(run)


def fabric(rank: int, strategy: Any = "ddp") -> Found:
    from lightning.fabric import Fabric

    lightning_fabric = Fabric(accelerator="cpu", devices=RANKS, strategy=strategy)
    lightning_fabric.launch()
    assert lightning_fabric.world_size == RANKS

    def run(objective: lossmith.Objective) -> list[Step]:
        model = Model(objective)
        wrapped = lightning_fabric.setup_module(model)
        return steps(
            objective,
            rank,
            wrapped,
            lambda loss, _: lightning_fabric.backward(loss * RANKS),
            lambda: gradients_of(wrapped.module),
            lambda is_last: lightning_fabric.no_backward_sync(wrapped, enabled=not is_last),
        )

    return each(run)


def fabric_fsdp2(rank: int) -> Found:
    from lightning.fabric.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    def shard(model: nn.Module, device_mesh: Any) -> nn.Module:
        mesh = device_mesh["data_parallel"]
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    strategy = ModelParallelStrategy(shard, data_parallel_size=RANKS, tensor_parallel_size=1)
    return fabric(rank, strategy)


# ── DeepSpeed ─────────────────────────────────────────────────────────────────────────────────────


def steps_of_deepspeed(
    objective: lossmith.Objective,
    rank: int,
    model: nn.Module,
    forward_of: Callable[[Any], Callable[..., Tensor]],
    stage: int,
) -> list[Step]:
    """The steps of a model in fp32; ``forward_of`` makes of the engine what takes a micro-batch."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    assert all((parameter.numel() == 0) == (stage == 3) for parameter in model.parameters())
    factor = RANKS * engine.gradient_accumulation_steps()
    found: dict[str, Tensor] = {}

    def backward(loss: Tensor, is_last: bool) -> None:
        engine.backward(loss * factor)
        if is_last:
            found.update({n: safe_get_full_grad(p).clone() for n, p in model.named_parameters()})
        engine.step()

    made = steps(objective, rank, forward_of(engine), backward, lambda: dict(found))
    engine.destroy()
    return made


def zero(rank: int, stage: int) -> Found:
    def run(objective: lossmith.Objective) -> list[Step]:
        model = Model(objective, dtype=torch.float32)
        return steps_of_deepspeed(objective, rank, model, lambda engine: engine, stage)

    return each(run)


def zero_1(rank: int) -> Found:
    return zero(rank, 1)


def zero_2(rank: int) -> Found:
    return zero(rank, 2)


def zero_3(rank: int) -> Found:
    return zero(rank, 3)
