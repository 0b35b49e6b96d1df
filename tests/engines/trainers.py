"""Trainers of Hugging Face and TRL around a small Llama, and what one process makes of the same batches."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from engines_case import (
    LOSSES,
    MICRO_BATCHES,
    RANKS,
    ROWS,
    Batch,
    D,
    Step,
    T,
    V,
    batches,
    denominator_of,
    gradients_of,
    whole,
)
from torch.distributed.fsdp import FullyShardedDataParallel

import lossmith

Found = dict[str, list[Step] | str]
STILL = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
}
FSDP_PREFIX = "_fsdp_wrapped_module."
LAUNCH = Path(__file__).parents[2] / "examples" / "launch"


def llama() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=T,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():  # initialised at 0.02, nothing would differ much
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.double()


def expected(name: str) -> list[Step]:
    """The steps of one process, by itself."""
    from lossmith.integrations.huggingface import attach

    loss = LOSSES[name]
    model = attach(llama(), loss.make("local").double())
    found = []
    for batch in batches():
        denominator = denominator_of(model.attached_loss.objective, batch)
        parts = [batch.of(micro, None) for micro in range(MICRO_BATCHES)]
        total = torch.zeros(())
        for ids, labels in [batch.rows()] if loss.is_whole else parts:
            part = model(ids, labels=labels, denominator=denominator).loss
            part.backward()
            total = total + part.detach()
        found.append({"loss": total, "gradients": gradients_of(model)})
    return found


def recorded(trainer_class: type) -> type:
    """A Trainer that keeps what each of its steps came to."""
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def __init__(self, trainer: Any) -> None:
            self.trainer = trainer

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any):
            with together(model, with_grads=True):
                plain = self.trainer.accelerator.unwrap_model(model)
                given = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
                gradients = {n.replace(FSDP_PREFIX, ""): whole(g).clone() for n, g in given.items()}
            self.trainer.found.append({"loss": self.trainer.total, "gradients": gradients})
            self.trainer.total = torch.zeros(())

    class Recorded(trainer_class):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.found: list[Step] = []
            self.total = torch.zeros(())
            super().__init__(*args, **options)
            self.add_callback(Keep(self))

        def training_step(self, *args: Any, **options: Any) -> Any:
            loss = super().training_step(*args, **options)
            self.total = self.total + loss / self.args.world_size  # it has multiplied the loss by it
            return loss

    return Recorded


@contextlib.contextmanager
def together(model: Any, **options: Any) -> Iterator[None]:
    """Have the parameters of a model whole that FSDP1 or ZeRO-3 has parted."""
    parted = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    with contextlib.ExitStack() as stack:
        if parted:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(parted))
        if isinstance(model, FullyShardedDataParallel):
            stack.enter_context(FullyShardedDataParallel.summon_full_params(model, **options))
        yield


def parameters_of(model: Any) -> dict[str, torch.Tensor]:
    """A copy of each parameter, whole."""
    with together(model):
        named = {n.replace(FSDP_PREFIX, ""): whole(p) for n, p in model.named_parameters()}
        return {name: parameter.detach().clone() for name, parameter in named.items()}


def options(arguments: type | None = None, of: Sequence[Batch] | None = None, **more: Any) -> dict[str, Any]:
    """What a trainer is made with: the model, a step for each batch, and the rows of all in their order."""
    import transformers

    of_both = [batch.rows() for batch in of or batches()]
    rows = [
        {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        for all_ids, all_labels in of_both
        for ids, labels in zip(all_ids, all_labels, strict=True)
    ]
    args = (arguments or transformers.TrainingArguments)(
        tempfile.mkdtemp(),
        max_steps=len(of_both),
        gradient_accumulation_steps=MICRO_BATCHES,
        train_sampling_strategy="sequential",
        **{**STILL, "per_device_train_batch_size": ROWS, **more},
    )
    return {"model": llama(), "args": args, "train_dataset": rows}


def each(make: Callable[[lossmith.Objective], Any]) -> Found:
    """The steps of every loss, or what was said when one was refused."""
    found: Found = {}
    for name, loss in LOSSES.items():
        try:
            trainer = make(loss.make("global").double())
            trainer.train()
        except (ValueError, TypeError) as error:
            found[name] = str(error)
            continue
        assert trainer.args.world_size == RANKS
        found[name] = trainer.found
    return found


def loss_trainer(rank: int) -> Found:
    from lossmith.integrations.huggingface import LossTrainer

    kind = recorded(LossTrainer)
    return each(lambda loss: kind(loss=loss, **options()))


def attached(rank: int) -> Found:
    from transformers import Trainer

    from lossmith.integrations.huggingface import attach

    kind = recorded(Trainer)

    def make(loss: lossmith.Objective) -> Any:
        given = options()
        attach(given["model"], loss)
        return kind(**given)

    return each(make)


def loss_function(rank: int) -> Found:
    from transformers import Trainer

    from lossmith.integrations.huggingface import compute_loss_func

    kind = recorded(Trainer)
    return each(lambda loss: kind(compute_loss_func=compute_loss_func(loss), **options()))


def deepspeed_config(stage: int = 2) -> dict[str, Any]:
    """The one of examples/launch, in a process that is going to use it, or that of another stage."""
    os.environ.pop("ACCELERATE_USE_CPU", None)  # accelerate takes that for a wish to have no DeepSpeed
    config = json.loads((LAUNCH / "deepspeed_zero2.json").read_text())
    if stage == 3:
        parted = {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
        config["zero_optimization"] = {"stage": 3, **parted}
    return config


def zero(rank: int, stage: int) -> Found:
    """DeepSpeed steps with the backward pass, so the gradients are what a step of length 1 changed."""
    from lossmith.integrations.huggingface import LossTrainer

    kind = recorded(LossTrainer)
    config = {**deepspeed_config(stage), "zero_allow_untested_optimizer": True}
    found: Found = {}
    for name, loss in LOSSES.items():
        steps = []
        for batch in batches():
            given = options(of=[batch], deepspeed=config, learning_rate=1.0)
            given["model"] = given["model"].float()
            trainer = kind(loss=loss.make("global"), **given)
            before = parameters_of(trainer.model)
            trainer.train()
            assert (trainer.is_deepspeed_enabled, trainer.args.world_size) == (True, RANKS)
            assert all(p.numel() == 0 for p in trainer.model.parameters()) == (stage == 3)
            after = parameters_of(trainer.model)
            gradients = {n: p - after[n] for n, p in before.items()}
            steps.append({"loss": trainer.found[0]["loss"], "gradients": gradients})
        found[name] = steps
    return found


def zero_2(rank: int) -> Found:
    return zero(rank, 2)


def zero_3(rank: int) -> Found:
    return zero(rank, 3)


def fsdp(version: int) -> Found:
    from fsdp_on_cpu import fsdp_on_cpu

    from lossmith.integrations.huggingface import LossTrainer

    class Sharded(fsdp_on_cpu(recorded(LossTrainer), fsdp_version=version)):
        def train(self, *args: Any, **more: Any) -> Any:
            output = super().train(*args, **more)
            of_two = any(hasattr(p, "full_tensor") for p in self.model.parameters())
            assert of_two if version == 2 else isinstance(self.model, FullyShardedDataParallel)
            return output

    return each(lambda loss: Sharded(loss=loss, **options()))


def fsdp1(rank: int) -> Found:
    return fsdp(1)


def fsdp2(rank: int) -> Found:
    return fsdp(2)


def sft_trainer(rank: int) -> Found:
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import SFTConfig, SFTTrainer

    from lossmith.integrations.huggingface import LossTrainer

    class SFT(LossTrainer, SFTTrainer):
        pass

    kind = recorded(SFT)
    words = {"<pad>": 0, "<end>": 1, **{str(i): i for i in range(2, V)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words)), pad_token="<pad>", eos_token="<end>"
    )

    def make(loss: lossmith.Objective) -> Any:
        given = options(
            SFTConfig, dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False
        )
        rows = [{n: column.tolist() for n, column in row.items()} for row in given.pop("train_dataset")]
        dataset = Dataset.from_list(rows).remove_columns("attention_mask")
        return kind(loss=loss, processing_class=tokenizer, train_dataset=dataset, **given)

    return each(make)
