"""A Trainer under DeepSpeed that is resumed goes on with the loss that it had."""

import importlib.util

import pytest
import torch
from engines_case import V, batches
from trainers import deepspeed_config, llama, options

import lossmith
from ranks import free_port, like_torchrun, on_two_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not there"),
]
STEPS = 4


def train(folder: str, max_steps: int, resume: str | None = None) -> dict[str, torch.Tensor]:
    """The parameters and the loss's buffers after so many steps with AdamW."""
    from lossmith.integrations.huggingface import LossTrainer

    torch.manual_seed(1)
    loss = lossmith.UnifiedLoss(V, 8, use_mtp=True, adaptive_temperature=True)
    loss.base.temperature.history = torch.zeros(2)
    given = options(
        of=batches() * (STEPS // 2),
        deepspeed=deepspeed_config(),
        optim="adamw_torch",
        learning_rate=0.01,
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=STEPS // 2,
        save_only_model=False,
    )
    given["args"].output_dir, given["args"].max_steps = folder, max_steps
    given["model"] = llama().float()
    trainer = LossTrainer(loss=loss, **given)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.is_deepspeed_enabled
    state = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return state | {f"buffer {name}": b.clone() for name, b in loss.named_buffers()}


def runs_of(rank: int, port: int, folder: str) -> dict[str, dict]:
    like_torchrun(rank, port)
    whole = train(f"{folder}/whole", STEPS)
    train(f"{folder}/half", STEPS // 2)
    resumed = train(f"{folder}/resumed", STEPS, f"{folder}/half/checkpoint-{STEPS // 2}")
    return {"whole": whole, "resumed": resumed}


def test_a_resumed_run_ends_as_the_whole_one(tmp_path):
    for found in on_two_ranks(runs_of, tmp_path, free_port(), str(tmp_path)):
        moved = [name for name in found["whole"] if "temperature.value" in name]
        assert all(found["whole"][name] != 1 for name in moved)
        assert moved
        for name, expected in found["whole"].items():
            torch.testing.assert_close(
                found["resumed"][name], expected, msg=lambda said, n=name: f"{n}: {said}"
            )
