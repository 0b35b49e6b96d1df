"""``analyze`` and ``sample``: a checkpoint's model on a text."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel

from lossmith.analysis import initial_gap
from lossmith.integrations.huggingface.loss_state import LOSS_FILE
from lossmith.report.reading import read_run
from lossmith.training.commands.tables import table_of
from lossmith.training.commands.watch import sparkline
from lossmith.training.config.reading import load_config
from lossmith.training.config.saved_run import run_of, write_whole
from lossmith.training.data.corpus import Corpus, load_corpus, read_text
from lossmith.training.data.tokenizer import encode
from lossmith.training.errors import UserError
from lossmith.training.run.analysis import analyse
from lossmith.training.run.checkpoints import (
    checkpoint_of,
    checkpoints,
    needed,
    require_loss,
    require_sound_checkpoint,
)
from lossmith.training.run.manifest import require_whole
from lossmith.training.run.runner import load_model, quiet_libraries, saved_tokenizer
from lossmith.training.run.terminal import say
from lossmith.training.run.trainer import choose_device
from lossmith.training.tasks import make_task
from lossmith.training.tasks.causal_language_model import CausalLanguageModel
from lossmith.training.tasks.task import Task

NUM_SHOWN = 10  # hardest tokens
NO_TEXT = Corpus("no text", ["-"], ["--"])  # for what reads none


@dataclass(frozen=True)
class Saved:
    """A checkpoint: its task, its model, and a sentence that says which one it is."""

    step: int
    task: Task
    model: PreTrainedModel
    said: str


def choose_checkpoint(path: Path, *, best: bool) -> tuple[int, Path, str]:
    """The checkpoint that a folder is, or the newest or the best in it: step, folder, and a sentence.

    Raises:
        UserError: there is none.
    """
    newest = checkpoint_of(path)
    if run_of(path) is not None:
        return newest.step, newest.path, f"{newest.path}, step {newest.step}."
    found = checkpoints(path)
    if best:
        losses = {row["step"]: row["val_loss"] for row in read_run(path).evaluations}
        known = [(losses[n], n, folder) for n, folder in found if losses.get(n) is not None]
        if not known:
            raise UserError(f"no checkpoint in {path} was evaluated, so none is the best. Leave --best out.")
        loss, step, folder = min(known)
        require_whole(folder, needed(to_train=False))
        return step, folder, f"{folder}, the best of {len(found)} checkpoints: validation loss {loss:.4f}."
    said = " ".join([f"{newest.path}, the newest of {len(found)} checkpoints.", *newest.said])
    return newest.step, newest.path, said


def load_saved(path: Path, *, best: bool, text: Path | None = None, reads_text: bool = True) -> Saved:
    """A checkpoint's model, ready to look at the held-out text of its run, or at another text.

    Raises:
        UserError: there is no sound checkpoint, or no text.
    """
    step, checkpoint, said = choose_checkpoint(path, best=best)
    config = load_config(["--eval_only", f"--out_dir={checkpoint}"])
    require_sound_checkpoint(checkpoint, config)
    corpus = load_corpus(config.dataset) if reads_text or not config.is_causal else NO_TEXT
    if text is not None:
        if not text.is_file():
            raise UserError(f"there is no file {text}; expected a text. Check --text.")
        corpus = replace(corpus, name=str(text), held_out=[read_text(text)])
    task = make_task(config, corpus, saved_tokenizer(checkpoint, config), num_blocks=0)
    model = load_model(task, checkpoint)
    if config.experts and config.moe_balance_mode == "bias":  # it chooses the experts
        require_loss(checkpoint, task.pipeline.state_dict())
        state = checkpoint / LOSS_FILE
        if state.exists():
            task.pipeline.load_state_dict(torch.load(state, "cpu", weights_only=True))
    device: Any = choose_device(replace(config, device="auto"))
    model.to(device)
    return Saved(step, task, model, said)


def write_sample(console: Console, path: Path, *, prompt: str, best: bool, drawn: dict[str, Any]) -> None:
    """Print what a causal model writes after a prompt, or another model's own kind of sample."""
    with quiet_libraries():
        saved = load_saved(path, best=best, reads_text=False)
        say(console, saved.said, "dim")
        task, model = saved.task, saved.model
        if not isinstance(task, CausalLanguageModel):
            if prompt:
                raise UserError(
                    f"a {task.config.mode}, objective={task.config.objective}, does not go on from a prompt. "
                    "Leave --prompt out to see what it does with a held-out text."
                )
            say(console, task.sample(model) or "There is no sample with sample_tokens=0.")
            return
        start = encode(task.tokenizer, [prompt])
        room = task.config.block_size - len(start)  # positions beyond block_size were never trained
        if room < 1:
            raise UserError(
                f"the prompt has {len(start) - 1} tokens, but the model reads {task.config.block_size} at "
                "once. Shorten --prompt."
            )
        if room < drawn["length"]:
            say(console, f"It reads {task.config.block_size} tokens at once, so it writes {room}.", "dim")
        tokens = task.generate(model, start, min(drawn.pop("length"), room), **drawn)
        written = task.tokenizer.decode(tokens[len(start) :], skip_special_tokens=True)
        say(console, Text.assemble((prompt, "bold"), str(written)))


def analyze_text(console: Console, path: Path, *, text: Path | None, best: bool, output: Path | None) -> None:
    """Print what a checkpoint's model knows of a text, all of it; and write it as JSON."""
    with quiet_libraries():
        saved = load_saved(path, best=best, text=text)
        say(console, saved.said, "dim")
        found = analyse(saved.task, saved.model, saved.task.sample(saved.model))
    show_analysis(console, saved.task, found)
    if output is not None:
        write_whole(output, json.dumps({"step": saved.step, **found}, indent=1) + "\n")
        say(console, f"\nThe numbers are in {output}.")


def show_analysis(console: Console, task: Task, found: dict[str, Any]) -> None:
    """Print an analysis."""
    if "loss" not in found:
        say(console, f"A {task.config.mode} predicts no tokens. Its sample:\n")
        say(console, found.get("sample", ""))
        return
    say(console, f"{found['num_tokens']:,} tokens of {task.corpus.name}\n", "bold")
    gap = initial_gap(found["loss"], task.num_classes or task.config.vocab_size)  # pyright: ignore
    ece = found["calibration"]["ece"]
    rows = [["loss", f"{found['loss']:.4f} nats per token, {-gap:.3f} below a uniform guess"]]
    rows += [[key, f"{found[key]:.4f}"] for key in ("perplexity", "bits_per_byte", "entropy") if key in found]
    rows += [["accuracy", f"{found['accuracy']:.1%}"], ["calibration", f"ECE {ece:.4f}"]]
    if said := found.get("repetition"):
        rows.append(
            ["seq-rep-4", f"{said['seq_rep_4']:.3f} of a sample, {said['text_seq_rep_4']:.3f} of the text"]
        )
        rows.append(["rep/128", f"{said['rep_128']:.3f} of a sample, {said['text_rep_128']:.3f} of the text"])
    positions = found["by_position"]
    first, last = f"{positions['loss'][0]:.3f}", f"{positions['loss'][-1]:.3f}"
    rows.append(["by position", f"{first} {sparkline(positions['loss'])} {last}"])
    say(console, table_of("Measures", None, rows))
    if bands := found.get("by_frequency"):
        columns = zip(bands["labels"], bands["loss"], bands["num_tokens"], strict=True)
        rows = [[label, f"{loss:.3f}", f"{num:,}"] for label, loss, num in columns]
        say(console)
        say(console, table_of("Loss by occurrences in the training text", ["times", "loss", "tokens"], rows))
    for layer, usage in enumerate(found.get("expert_usage", [])):
        say(console, f"experts of layer {layer}: " + "  ".join(f"{share:.1%}" for share in usage))
    rows = [
        [
            f"{t['nll']:.2f}",
            one_line(t["before"])[-40:] + f"[{one_line(t['token'])}]",
            one_line(t["predicted"]),
        ]
        for t in found["hardest"][:NUM_SHOWN]
    ]
    say(console)
    say(console, table_of("Hardest tokens", ["loss", "in context", "most probable"], rows))


def one_line(text: str) -> str:
    """Text with its line breaks made visible."""
    return text.replace("\n", "↵")
