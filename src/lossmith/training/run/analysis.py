"""What a trained model knows of the held-out text: `analysis.json`, from which the report draws."""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.text import Text
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

import lossmith
from lossmith.analysis import (
    CorpusLoss,
    TokenTable,
    expert_usage,
    hardest,
    joined,
    loss_by_frequency,
    loss_by_position,
    reliability,
    rep_l,
    seq_rep_n,
    token_table,
)
from lossmith.report.reading import ANALYSIS_FILE
from lossmith.training.config.saved_run import write_whole
from lossmith.training.data.blocks import IGNORED
from lossmith.training.data.tokenizer import encode
from lossmith.training.errors import UserError
from lossmith.training.run.folder import RunFolder
from lossmith.training.run.terminal import say
from lossmith.training.tasks.causal_language_model import CausalLanguageModel
from lossmith.training.tasks.task import Task, TokenTask

NUM_HARDEST = 20
CONTEXT = 16  # tokens on either side of a hard one
NUM_COMPARED = 32  # held-out blocks whose repetition is compared with that of the sample


def analyse(
    task: Task, model: PreTrainedModel, sample: RenderableType | None = None, *, num_batches: int = 0
) -> dict[str, Any]:
    """What `analysis.json` holds: losses of tokens, calibration, expert usage, and the sample.

    Args:
        task: the mode, whose held-out data is read.
        model: its trained model.
        sample: what `task.sample` returned.
        num_batches: how many batches are read, spread over the held-out data; 0 for all.
    """
    found: dict[str, Any] = {} if sample is None else {"sample": as_text(sample)}
    if not isinstance(task, TokenTask):
        return found
    chosen = range(len(task.held_out))  # pyright: ignore[reportArgumentType]
    if num_batches:
        chosen = chosen[:: math.ceil(len(chosen) / (num_batches * task.config.batch_size))]
    table, usage = look_at(task, model, chosen)
    nll_sum = table.nll.double().sum().item()
    found |= {
        "num_tokens": len(table),
        "loss": nll_sum / len(table),
        "entropy": table.entropy.mean().item(),
        "accuracy": table.correct.float().mean().item(),
        "uniform_loss": task.knowing_nothing().loss,
        "by_position": asdict(loss_by_position(table.nll, table.position)),
        "calibration": asdict(reliability(table.confidence, table.correct)),
        "hardest": hardest_tokens(task, table, chosen),
        "expert_usage": usage,
    }
    if task.num_classes is None:  # the targets are tokens
        counts = torch.bincount(task.train_tokens, minlength=task.config.vocab_size)
        found["by_frequency"] = asdict(loss_by_frequency(table.nll, table.target, counts))
    if isinstance(task, CausalLanguageModel):
        corpus = CorpusLoss(nll_sum, len(table), int(task.bytes_per_token[table.target].sum()))
        found |= {"perplexity": corpus.perplexity, "bits_per_byte": corpus.bits_per_byte}
        found["repetition"] = repetition(task, found.get("sample", ""))
    return {name: value for name, value in found.items() if value not in ([], {})}


def look_at(
    task: TokenTask, model: PreTrainedModel, chosen: Sequence[int]
) -> tuple[TokenTable, list[list[float]]]:
    """The table of the held-out examples' tokens, and the share of each expert in each layer."""
    batches = DataLoader(Subset(task.held_out, chosen), batch_size=task.config.batch_size)
    num_experts, _ = task.config.experts or (0, 0)
    routers = [layer.mlp.gate for layer in model.model.layers] if num_experts else []
    choices: list[list[Tensor]] = [[] for _ in routers]  # of each layer, [N, k] a batch
    hooks = [
        router.register_forward_hook(lambda _, __, output, layer=layer: layer.append(output[2].cpu()))
        for router, layer in zip(routers, choices, strict=True)
    ]
    tables, kept, first = [], [], 0
    model.eval()
    try:
        for batch in batches:
            ids, targets = batch["input_ids"].to(model.device), batch["labels"].to(model.device)
            with torch.no_grad():
                logits = model(input_ids=ids).logits
            kept.append((batch["labels"] != IGNORED).flatten())
            if task.shift:
                logits, targets = logits[:, :-1], targets[:, 1:]
            tables.append(token_table(lossmith.token_stats(logits, targets), first))
            first += len(ids)
    finally:
        for hook in hooks:
            hook.remove()
    usage = [expert_usage(torch.cat(layer), num_experts, torch.cat(kept)).tolist() for layer in choices]
    return joined(tables), usage


def hardest_tokens(task: TokenTask, table: TokenTable, chosen: Sequence[int]) -> list[dict[str, Any]]:
    """The tokens with the largest losses, each in its context."""
    found = []
    for row in hardest(table.nll, NUM_HARDEST).tolist():
        place = int(table.position[row]) + task.shift
        ids = task.held_out[chosen[int(table.sequence[row])]]["input_ids"].clone()
        target, predicted = int(table.target[row]), int(table.predicted[row])
        if task.num_classes is None:
            ids[place] = target  # it may be masked
        names = getattr(task, "head", {}).get("id2label")
        pieces = (ids[max(0, place - CONTEXT) : place], ids[place : place + 1], ids[place + 1 :][:CONTEXT])
        before, token, after = (str(task.tokenizer.decode(piece)) for piece in pieces)
        said = names[predicted] if names else str(task.tokenizer.decode([predicted]))
        found.append({"before": before, "token": token, "after": after, "predicted": said})
        found[-1]["nll"] = table.nll[row].item()
    return found


def repetition(task: CausalLanguageModel, sample: str) -> dict[str, float]:
    """How much the sample repeats itself, and how much as long pieces of the held-out text do."""
    tokens = encode(task.tokenizer, [sample])[1:]
    if len(tokens) < 2:
        return {}
    some = range(min(NUM_COMPARED, len(task.held_out)))  # pyright: ignore[reportArgumentType]
    texts = [task.held_out[i]["labels"][1 : len(tokens) + 1] for i in some]
    texts = [text[text != IGNORED] for text in texts]
    return {
        "seq_rep_4": seq_rep_n(tokens, 4),
        "rep_128": rep_l(tokens, 128),
        "text_seq_rep_4": sum(seq_rep_n(text, 4) for text in texts) / len(texts),
        "text_rep_128": sum(rep_l(text, 128) for text in texts) / len(texts),
    }


def as_text(sample: RenderableType) -> str:
    """A sample as plain text."""
    if isinstance(sample, str | Text):
        return str(sample)
    console = Console(file=io.StringIO(), width=100)
    say(console, sample)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def save_analysis(folder: RunFolder, step: int, found: dict[str, Any]) -> None:
    """Write `analysis.json` into the checkpoint that was analysed, with which it is moved and deleted.

    It is written even if nothing was found, since it says that the run has ended.

    Raises:
        UserError: it cannot be written.
    """
    name = f"checkpoint-{step}"
    if not (folder.path / name).is_dir():
        return
    if f"{name}/{ANALYSIS_FILE}" not in folder.written:
        folder.claim(f"{name}/{ANALYSIS_FILE}")
    path = folder.path / name / ANALYSIS_FILE
    try:
        write_whole(path, json.dumps({"step": step, **found}, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"the model is trained and evaluated, but {path} cannot be written: {error.strerror}. Make room, "
            "and --resume finishes the run."
        ) from None
