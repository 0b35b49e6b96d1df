"""The gradients of one step through the Trainer, for tests of what it makes of a batch."""

import torch
from every_mode import make_task
from torch.utils.data import Dataset
from transformers import TrainerCallback

from lossmith.training.config.reading import load_config
from lossmith.training.data.blocks import IGNORED
from lossmith.training.run.loss_modifiers import add_modifiers
from lossmith.training.run.runner import quiet_libraries
from lossmith.training.run.trainer import TaskTrainer, training_arguments


class Uneven(Dataset):
    """The task's blocks with a different number of targets in each, so that a mean of means shows."""

    def __init__(self, blocks: Dataset):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        example = self.blocks[index]
        if example["labels"].dim():
            example["labels"][: 1 + index % 11] = IGNORED
        return example


class KeepGradients(TrainerCallback):
    """A copy of the gradients just before the optimizer uses them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def gradients_of_one_step(flags: list[str], batch_size: int, accumulation: int) -> dict[str, torch.Tensor]:
    split = [f"--batch_size={batch_size}", f"--gradient_accumulation_steps={accumulation}"]
    config = load_config([*flags, *split, "--max_iters=1", "--grad_clip=0"])
    with quiet_libraries():
        task = make_task(config)
        add_modifiers(task, "cpu", "float32")
        task.train_blocks = Uneven(task.train_blocks)
        torch.manual_seed(0)
        keep = KeepGradients()
        TaskTrainer(task, task.make_model(), training_arguments(config), [keep]).train()
    return keep.gradients
