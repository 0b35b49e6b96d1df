"""Arguments, data and a loss for trainers that make the same steps every time."""

import torch
import transformers
from huggingface_models import D, V, batch

import lossmith

LR = 0.5


def mtp(**options) -> lossmith.UnifiedLoss:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return lossmith.UnifiedLoss(V, D, use_mtp=True, use_ngram_penalty=True, ngram_size=2, **options)


def arguments(folder, **options) -> transformers.TrainingArguments:
    defaults = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": LR,
        "max_grad_norm": 0.0,
        "max_steps": 1,
    }
    return transformers.TrainingArguments(str(folder), **{**defaults, **options})


def rows(num_rows: int = 8, **more) -> list[dict]:
    columns = {**batch(num_rows), **more}
    return [{name: column[i] for name, column in columns.items()} for i in range(num_rows)]


def split(rows_each: int) -> dict[str, int]:
    return {"per_device_train_batch_size": rows_each, "gradient_accumulation_steps": 8 // rows_each}


def parameters(trainer: transformers.Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in trainer.model.named_parameters()}
