"""A run, from its configuration to a trained model: read it top to bottom."""

import contextlib
import logging
import math
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.text import Text
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

from lossmith.training.config.idle_keys import idle_in_evaluation, without_effect
from lossmith.training.config.keys import TrainConfig
from lossmith.training.config.reading import saved_config
from lossmith.training.config.saved_run import save_config
from lossmith.training.data.corpus import Corpus, load_corpus
from lossmith.training.errors import UserError
from lossmith.training.run import folder as rundir
from lossmith.training.run.checkpoints import (
    KeepCheckpoints,
    checkpoint_of,
    last_checkpoint,
    require_loss,
    require_sound_checkpoint,
)
from lossmith.training.run.choices import choose_judge, choose_sizes
from lossmith.training.run.interrupt import StopOnSignal
from lossmith.training.run.loss_modifiers import add_modifiers, show_modifiers, verbose_modifiers
from lossmith.training.run.progress import Display, LogFile, describe, log_row
from lossmith.training.run.terminal import say, saying_warnings
from lossmith.training.run.trackers import open_trackers, require_trackers
from lossmith.training.run.trainer import TaskTrainer, choose_dtype, training_arguments
from lossmith.training.tasks import make_task
from lossmith.training.tasks.task import Task


def run(config: TrainConfig, console: Console, command: str = "python train.py") -> int:
    """Train, or evaluate, as the configuration says.

    Args:
        config: a checked configuration.
        console: where to show it.
        command: how the user started this, for the line that says how to resume.

    Returns:
        The exit code: 0, or 128 plus the signal's number for a run that a signal ended.

    Raises:
        UserError: something that was asked for is not there; nothing has been trained yet, except where
            the loss stopped being a number.
    """
    with quiet_libraries(), saying_warnings(console):
        return evaluate_saved(config, console) if config.eval_only else train(config, console, command)


def train(config: TrainConfig, console: Console, command: str) -> int:
    """A training run, new or resumed."""
    out_dir = Path(config.out_dir)
    rundir.require_writable(out_dir)
    args = training_arguments(config)
    require_trackers(config)
    if args.process_index:  # the first rank alone writes
        return train_in(None, config, args, console, command)
    with rundir.held(out_dir):
        return train_in(rundir.RunFolder(out_dir), config, args, console, command)


def train_in(
    folder: rundir.RunFolder | None,
    config: TrainConfig,
    args: TrainingArguments,
    console: Console,
    command: str,
) -> int:
    """A training run in a folder that no other run is writing to; None on ranks that write nothing."""
    out_dir = Path(config.out_dir)

    # 1. Everything that can be refused is refused before any work.
    first_step, checkpoint = where_to_begin(config, folder)
    config, of_judge = choose_judge(config)

    # 2. Text, tokens, loss, model.
    corpus = load_corpus(config.dataset)
    of_sizes = None
    if checkpoint:
        tokenizer = saved_tokenizer(checkpoint)
    else:
        config, tokenizer, of_sizes = choose_sizes(config, corpus)
    transformers.set_seed(config.seed)
    task = make_task(config, corpus, tokenizer, blocks_to_draw(config, args))
    _ = task.train_blocks[0]  # a text too short for a block is refused here
    add_modifiers(task, str(args.device), choose_dtype(config))
    if checkpoint:
        require_loss(checkpoint, task.pipeline.state_dict())
    model = task.make_model()  # the Trainer reads a checkpoint's weights
    model.to(args.device)  # pyright: ignore[reportArgumentType]
    if folder:
        for said in filter(None, (of_sizes, of_judge)):
            say(console, said)
        show_summary(config, console, corpus, task, model, args)
        show_modifiers(console, task)
        if checkpoint:
            say(console, f"Resuming from {checkpoint}.\n")
        else:
            show_first_loss(console, task, model, config)

    # 3. The loop.
    stop, display = StopOnSignal(console), Display(console, task.step_figures, task.evaluation_figures)
    with open_trackers(config, first_step, is_main=folder is not None) as trackers:
        aside = prepare_folder(folder, config, console) if folder else None
        watchers = [*trackers, LogFile(out_dir / rundir.LOG_FILE), display, stop]
        if folder:
            watchers.append(KeepCheckpoints(folder))
        trainer = TaskTrainer(task, model, config, args, watchers)
        with stop, contextlib.closing(display), verbose_modifiers(config, console):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

        # 4. What came of it.
        step = trainer.state.global_step
        if stop.received and step < config.max_iters:
            say(console, f"Stopped after step {step} of {config.max_iters}; checkpoint saved. To go on:")
            say(console, f"  {command} --out_dir={shlex.quote(config.out_dir)} --resume", "bold")
            return 128 + stop.received
        measures = trainer.evaluate(everything=True)
    show_results(console, out_dir, task, measures, task.sample(model), aside)
    return 0


def evaluate_saved(config: TrainConfig, console: Console) -> int:
    """Evaluate the last checkpoint of a run over all of the held-out text."""
    step, checkpoint = checkpoint_of(Path(config.out_dir))
    require_sound_checkpoint(checkpoint, config)
    args = training_arguments(config)
    idle = idle_in_evaluation(config, saved_config(config))
    if idle:
        say(console, f"warning: {no_effect(idle)} with eval_only.\n", "yellow")
    corpus = load_corpus(config.dataset)
    task = make_task(config, corpus, saved_tokenizer(checkpoint), num_blocks=0)
    model = task.load_model(checkpoint)
    model.to(args.device)  # pyright: ignore[reportArgumentType]
    trainer = TaskTrainer(task, model, config, args, [])
    if config.experts and config.moe_balance_mode == "bias":  # experts are chosen with it
        require_loss(checkpoint, task.pipeline.state_dict())
        trainer.load_loss(checkpoint)
    measures = trainer.evaluate(everything=True)
    say(console, f"{checkpoint} (step {step}) on the held-out text of {corpus.name}:")
    say(console, describe(log_row(step, measures) or {}, task.evaluation_figures), "bold")
    return 0


def blocks_to_draw(config: TrainConfig, args: TrainingArguments) -> int:
    """How many training blocks all ranks will draw together."""
    num = config.max_iters * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return min(num, sys.maxsize)  # more is no length in Python


def saved_tokenizer(checkpoint: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that a checkpoint's model was trained with."""
    return PreTrainedTokenizerFast.from_pretrained(checkpoint)


def where_to_begin(config: TrainConfig, folder: rundir.RunFolder | None) -> tuple[int, Path | None]:
    """The step that a run begins after, and the checkpoint that holds it, None for a new run.

    Raises:
        UserError: there is nothing to resume or nothing left to do, or the folder holds what is another's.
    """
    first_step, checkpoint = last_checkpoint(Path(config.out_dir)) if config.resume else (0, None)
    if first_step >= config.max_iters:
        raise UserError(
            f"nothing left to train: the checkpoint is at step {first_step}, max_iters={config.max_iters}. "
            f"Pass --max_iters={first_step * 2} to go on, or --eval_only to evaluate it."
        )
    if folder and checkpoint and not folder.has_list:
        folder.recognise()
    if folder:
        folder.require_room(rundir.names_of(config), after_step=first_step)
    if checkpoint:
        require_sound_checkpoint(checkpoint, config)
    return first_step, checkpoint


def prepare_folder(folder: rundir.RunFolder, config: TrainConfig, console: Console) -> rundir.SetAside | None:
    """Move an earlier run out of the way and write this run's configuration."""
    aside = None if config.resume else folder.set_aside()
    if aside:
        say(console, f"The earlier run in {config.out_dir} is now in {aside.folder}.\n")
    folder.claim(*rundir.names_of(config))
    save_config(config)
    return aside


# ── what is shown ─────────────────────────────────────────────────────────────────────────────────


def show_summary(
    config: TrainConfig,
    console: Console,
    corpus: Corpus,
    task: Task,
    model: PreTrainedModel,
    args: TrainingArguments,
) -> None:
    """What is about to be trained, on what, with what."""
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    tokens_per_step = config.batch_size * config.gradient_accumulation_steps * config.block_size
    of_the_loss = sum(p.numel() for p in task.pipeline.parameters() if p.requires_grad)
    rows = {
        "mode": config.mode + (f", {config.objective}" if config.mode == "language_model" else ""),
        "text": f"{corpus.name}: {len(task.train_tokens):,} tokens to train on, "
        f"{task.num_held_out_tokens:,} held out",
        "vocabulary": f"{config.vocab_size:,} pieces",
        "model": f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}"
        + (", {} experts with {} a token".format(*config.experts) if config.experts else "")
        + f": {model.num_parameters() - sum(p.numel() for p in task.pipeline.parameters()):,} parameters",
        "objective": task.describe_loss() + (f": {of_the_loss:,} parameters" if of_the_loss else ""),
        "training": f"{config.max_iters:,} steps of {tokens_per_step * args.world_size:,} tokens, "
        f"{args.device.type}, {precision}{', compiled' if config.compile else ''}",
    }
    for name, value in rows.items():
        say(console, Text.assemble((f"{name:<12}", "cyan"), value))
    say(console)
    if config.warmup_iters >= config.max_iters:
        say(
            console,
            f"warning: warmup_iters={config.warmup_iters} is no less than max_iters={config.max_iters}, so "
            "the learning rate never reaches its height. Lower --warmup_iters.\n",
            "yellow",
        )
    idle = without_effect(config)
    for need in dict.fromkeys(need for _, need in idle):
        names = [name for name, other in idle if other == need]
        say(console, f"warning: {no_effect(names)} without {need}.\n", "yellow")


def no_effect(names: list[str]) -> str:
    """What to say of keys that change nothing."""
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect"


def show_first_loss(console: Console, task: Task, model: PreTrainedModel, config: TrainConfig) -> None:
    """Compare the untrained model's loss with what knowing nothing costs."""
    some = range(min(config.batch_size, len(task.held_out)))  # pyright: ignore[reportArgumentType]
    first = task.evaluate(model, DataLoader(Subset(task.held_out, some), batch_size=len(some)))["loss"]
    nothing = task.knowing_nothing()
    say(console, f"The initial loss is {first:.3f}; {nothing.said}.\n")
    if not math.isfinite(first) or abs(first - nothing.loss) > nothing.margin:
        say(
            console,
            f"warning: these are more than {nothing.margin} apart. An untrained model should know nothing; "
            "look at the initialisation and at the loss.\n",
            "yellow",
        )


def show_results(
    console: Console,
    out_dir: Path,
    task: Task,
    measures: dict[str, float],
    sample: RenderableType | None,
    aside: rundir.SetAside | None,
) -> None:
    """The final measures, a sample, and where everything is."""
    if sample is not None:
        say(console)
        say(console, Panel(sample, title=task.sample_title, title_align="left", border_style="dim"))
    row = log_row(0, measures) or {}
    step, checkpoint = last_checkpoint(out_dir)
    say(console, f"\nAll held-out text, after step {step}: {describe(row, task.evaluation_figures)}", "bold")
    say(
        console,
        f"Saved {checkpoint} (model, tokenizer), {out_dir / rundir.LOG_FILE}, {out_dir / rundir.CONFIG_FILE}",
    )
    if aside:
        say(console, f"The earlier run was moved to {aside.folder}: {', '.join(aside.names)}")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' own notes off the user's screen; errors still come through."""
    before: Any = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    accelerate_logger = logging.getLogger("accelerate")
    accelerate_level = accelerate_logger.level
    accelerate_logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for module in ("transformers", "accelerate", "torch"):
            warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
        try:
            yield
        finally:
            transformers.logging.set_verbosity(before)
            transformers.logging.enable_progress_bar()
            accelerate_logger.setLevel(accelerate_level)
