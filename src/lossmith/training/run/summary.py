"""What a run prints before and after training."""

import shlex
from pathlib import Path

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.text import Text
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, TrainingArguments

from lossmith.training.config.idle_keys import without_effect
from lossmith.training.config.saved_run import CONFIG_FILE
from lossmith.training.run.checkpoints import checkpoints, last_checkpoint
from lossmith.training.run.closing import best_checkpoint, closing_table
from lossmith.training.run.findings import History, far_from_knowing_nothing, too_small_a_text
from lossmith.training.run.folder import LOG_FILE, SetAside
from lossmith.training.run.progress import log_row
from lossmith.training.run.terminal import say
from lossmith.training.tasks.task import Task


def show_summary(console: Console, task: Task, model: PreTrainedModel, args: TrainingArguments) -> list[str]:
    """Print what is about to be trained; returns what it warned of: keys without effect, a small text."""
    config = task.config
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    tokens_per_step = config.batch_size * config.gradient_accumulation_steps * config.block_size
    of_the_loss = sum(p.numel() for p in task.pipeline.parameters() if p.requires_grad)
    num_parameters = model.num_parameters() - sum(p.numel() for p in task.pipeline.parameters())
    experts = ", {} experts with {} a token".format(*config.experts) if config.experts else ""
    rows = {
        "mode": config.mode + (f", {config.objective}" if config.is_language_model else ""),
        "text": f"{task.corpus.name}: {len(task.train_tokens):,} tokens to train on, "
        f"{task.num_held_out_tokens:,} held out",
        "vocabulary": f"{config.vocab_size:,} pieces",
        "model": f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}{experts}: "
        f"{num_parameters:,} parameters",
        "objective": task.describe_loss() + (f": {of_the_loss:,} parameters" if of_the_loss else ""),
        "training": f"{config.max_iters:,} steps of {tokens_per_step * args.world_size:,} tokens, "
        f"{args.device.type}, {precision}{', compiled' if config.compile else ''}",
    }
    for name, value in rows.items():
        say(console, Text.assemble((f"{name:<12}", "cyan"), value))
    say(console)
    found = []
    if config.warmup_iters >= config.max_iters:
        found.append(
            f"warmup_iters={config.warmup_iters} is no less than max_iters={config.max_iters}, so "
            "the learning rate never reaches its height. Lower --warmup_iters."
        )
    idle = without_effect(config)
    for need in dict.fromkeys(need for _, need in idle):
        names = [name for name, other in idle if other == need]
        found += [f"{no_effect(names)} without {need}."]
    num_drawn = config.max_iters * tokens_per_step * args.world_size
    found += filter(None, [too_small_a_text(len(task.train_tokens), num_parameters, num_drawn)])
    for text in found:
        warn(console, text)
    return found


def warn(console: Console, text: str) -> None:
    """Print a warning and an empty line."""
    say(console, f"warning: {text}\n", "yellow")


def no_effect(names: list[str]) -> str:
    """Say that keys have no effect."""
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect"


def show_first_loss(console: Console, task: Task, model: PreTrainedModel) -> list[str]:
    """Compare the untrained model's loss with that of one that knows nothing; returns what it warned of."""
    some = range(min(task.config.batch_size, len(task.held_out)))  # pyright: ignore[reportArgumentType]
    first = task.evaluate(model, DataLoader(Subset(task.held_out, some), batch_size=len(some)))["loss"]
    nothing = task.knowing_nothing()
    say(console, f"The initial loss is {first:.3f}; {nothing.said}.\n")
    said = far_from_knowing_nothing(first, nothing.loss, nothing.margin)
    if said is None:
        return []
    warn(console, f"they {said}")
    return [
        f"The initial loss, {first:.3f}, and that of a model that knows nothing, {nothing.loss:.3f}, {said}"
    ]


def show_results(
    console: Console,
    task: Task,
    measures: dict[str, float],
    sample: RenderableType | None,
    aside: SetAside | None,
    history: History,
) -> None:
    """Print a sample, a table of what was logged, the final measures, and where everything is."""
    if sample is not None:
        say(console)
        say(console, Panel(sample, title=task.sample_title, title_align="left", border_style="dim"))
    out_dir = Path(task.config.out_dir)
    step, checkpoint = last_checkpoint(out_dir)
    if history.steps:
        say(console)
        say(console, closing_table(history))
    said = task.describe(log_row(step, measures) or {})
    say(console, f"\nAll held-out text, after step {step}: {said}", "bold")
    if best := best_checkpoint(checkpoints(out_dir), history):
        say(console, best)
    say(console, f"Saved {checkpoint} (model, tokenizer), {out_dir / LOG_FILE}, {out_dir / CONFIG_FILE}")
    say(console, f"A page about it: lossmith report {shlex.quote(str(out_dir))}")
    if aside:
        say(console, f"The earlier run was moved to {aside.folder}: {', '.join(aside.names)}")
