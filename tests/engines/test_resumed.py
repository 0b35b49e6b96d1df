"""A Trainer whose engine parts a loss's parameters trains them and its buffers as one process does; resumed,
it goes on with the loss that it had."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from engines_case import RANKS, ROWS, V, batches
from fsdp_on_cpu import fsdp_on_cpu
from safetensors.torch import load_file
from trainers import deepspeed_config, llama, options, parameters_of

import lossmith
from lossmith.integrations.huggingface import LossTrainer
from ranks import free_port, like_torchrun, on_two_ranks

pytestmark = pytest.mark.slow
STEPS = 4
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3},
    "FSDP1": {"fsdp_version": 1},
    "FSDP1, flat parameters": {
        "fsdp_version": 1,
        "use_orig_params": False,
        "state_dict_type": "SHARDED_STATE_DICT",
    },
    "FSDP1, bf16": {"fsdp_version": 1, "mixed_precision": "bf16"},
    "FSDP2, sharded checkpoint": {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"},
}


class Learned(lossmith.Component):
    """A parameter, and a buffer that follows it, in one module and read outside its forward. It has a number
    for every rank, as FSDP1 needs to resume from sharded checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.width = torch.nn.Parameter(torch.ones(4))
        self.register_buffer("narrowest", torch.ones(4))

    def scalar(self, inputs, output):
        self.narrowest.copy_(torch.minimum(self.narrowest, self.width.detach()))
        return self.width.square().sum()


def loss() -> lossmith.UnifiedLoss:
    """Heads, a temperature that moves in every step, and a parameter of a user's own."""
    torch.manual_seed(1)
    made = lossmith.UnifiedLoss(V, 8, use_mtp=True, adaptive_temperature=True)
    made.base.temperature.history = torch.zeros(2)
    made.components["learned"] = lossmith.Weighted(Learned())
    return made


def train(
    kind: type, folder: str, max_steps: int = STEPS, resume: str | None = None, **more: Any
) -> dict[str, torch.Tensor]:
    """The model's and the loss's parameters, and the loss's buffers, after so many steps."""
    criterion = loss()
    given = options(
        of=batches() * (STEPS // 2),
        learning_rate=0.01,
        save_strategy="steps",
        save_steps=STEPS // 2,
        save_only_model=False,
        **more,
    )
    given["args"].output_dir, given["args"].max_steps = folder, max_steps
    given["model"] = llama().float()
    trainer = kind(loss=criterion, **given)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.is_deepspeed_enabled == ("deepspeed" in more)
    return parameters_of(trainer.model) | {f"buffer {n}": b.clone() for n, b in criterion.named_buffers()}


def runs_of(rank: int, port: int, name: str, folder: str) -> dict[str, dict]:
    like_torchrun(rank, port)
    engine = dict(ENGINES[name])
    stage = engine.pop("stage", None)
    kind = LossTrainer if stage else fsdp_on_cpu(LossTrainer, **engine)
    more: dict[str, Any] = {"max_grad_norm": 1.0}
    if stage:
        more["deepspeed"] = {**deepspeed_config(stage), "zero_allow_untested_optimizer": True}
    # FSDP1 mixes up the two averages of AdamW on the CPU
    optim = "adagrad" if engine.get("fsdp_version") == 1 else "adamw_torch"
    go = functools.partial(train, kind, optim=optim, **more)
    whole = go(f"{folder}/whole")
    go(f"{folder}/half", STEPS // 2)
    resumed = go(f"{folder}/resumed", resume=f"{folder}/half/checkpoint-{STEPS // 2}")
    # of no optimizer that makes much of what rounding makes of next to nothing
    more["max_grad_norm"] = 0.0
    return {"whole": whole, "resumed": resumed, "plain": train(kind, f"{folder}/plain", optim="sgd", **more)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found with an engine, which is started once, and the folder of its runs."""

    @functools.cache
    def run(name: str) -> tuple[list[dict], Path]:
        if "stage" in ENGINES[name] and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not there")
        folder = tmp_path_factory.mktemp("ranks")
        return on_two_ranks(runs_of, folder, free_port(), name, str(folder)), folder

    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, torch.Tensor]:
    """What one process finds, which takes all rows of a step at once."""
    whole_step = {"per_device_train_batch_size": ROWS * RANKS}
    folder = str(tmp_path_factory.mktemp("alone"))
    return train(LossTrainer, folder, optim="sgd", **whole_step)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_ends_as_the_whole_one(engine, ranks):
    for found in ranks(engine)[0]:
        moved = [name for name in found["whole"] if "temperature.value" in name]
        assert all(found["whole"][name] != 1 for name in moved)
        assert moved
        check(found["resumed"], found["whole"])


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_train_the_loss_as_one_process(engine, ranks, alone):
    close = {"rtol": 0.05, "atol": 1e-3, "check_dtype": False} if "bf16" in engine else CLOSE
    for found in ranks(engine)[0]:
        check(found["plain"], alone, **close)
        assert found["plain"]["buffer components.learned.component.narrowest"].max() < 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_has_the_loss_whole_and_the_model_without_it(engine, ranks):
    found, folder = ranks(engine)
    checkpoint = folder / "whole" / f"checkpoint-{STEPS}"
    saved = torch.load(checkpoint / "lossmith_loss.pt", weights_only=True)
    own = "attached_loss.objective."
    trained = found[0]["whole"]
    state = {n.removeprefix(own): p for n, p in trained.items() if n.startswith(own)}
    state |= {n.removeprefix("buffer "): b for n, b in trained.items() if n.startswith("buffer")}
    assert saved.keys() == state.keys() == loss().state_dict().keys()
    check(saved, state)
    assert saved["base.temperature.value"].dtype == torch.float32  # also where others are cast
    if "SHARDED_STATE_DICT" not in ENGINES[engine].values():
        assert load_file(checkpoint / "model.safetensors").keys() == llama().state_dict().keys()


def check(found: dict, expected: dict, **close: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **close, msg=lambda said, n=name: f"{n}: {said}")
