"""A run, from its configuration to a trained model: read it top to bottom."""

import contextlib
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

from lossmith import Objective
from lossmith.training.config.idle_keys import idle_in_evaluation
from lossmith.training.config.keys import TrainConfig
from lossmith.training.config.own_loss import find_own, is_own
from lossmith.training.config.reading import read_saved_config, resolve
from lossmith.training.config.saved_run import run_of
from lossmith.training.data.corpus import load_corpus
from lossmith.training.data.tokenizer import END_OF_TEXT
from lossmith.training.run.analysis import analyse, as_text, save_analysis
from lossmith.training.run.beginning import Begin, prepare_folder, where_to_begin
from lossmith.training.run.checkpoints import (
    KeepCheckpoints,
    checkpoint_of,
    checkpoints,
    contents,
    require_loss,
    require_sound_checkpoint,
)
from lossmith.training.run.choices import choose_judge, choose_sizes
from lossmith.training.run.folder import LOG_FILE, opened, writing_into
from lossmith.training.run.interrupt import StopOnSignal
from lossmith.training.run.loss_modifiers import add_modifiers, show_modifiers, verbose_modifiers
from lossmith.training.run.manifest import Damaged
from lossmith.training.run.progress import Display, LogFile, log_row
from lossmith.training.run.summary import no_effect, show_first_loss, show_results, show_summary, warn
from lossmith.training.run.telling import TellFindings
from lossmith.training.run.terminal import say, saying_warnings
from lossmith.training.run.trackers import open_trackers, require_trackers
from lossmith.training.run.trainer import TaskTrainer, choose_dtype, training_arguments, unusable
from lossmith.training.tasks import make_task
from lossmith.training.tasks.task import Task


def run(
    config: TrainConfig,
    console: Console,
    command: str = "python train.py",
    objective: Objective | None = None,
) -> int:
    """Train, or evaluate, as the configuration says.

    Args:
        config: a checked configuration.
        console: where to print.
        command: how the user started this, for the line that says how to resume.
        objective: what to train with, if the keys do not say it.

    Returns:
        The exit code: 0, or 128 plus the signal's number if a signal ended the run.

    Raises:
        UserError: something is missing or impossible. During training, only numbers that are not finite or a
            full disk raise it.
    """
    with quiet_libraries(), saying_warnings(console):
        if config.eval_only:
            return evaluate_saved(config, console)
        return train(config, console, command, objective)


def train(config: TrainConfig, console: Console, command: str, objective: Objective | None = None) -> int:
    """A training run, new or resumed."""
    args = training_arguments(config)
    require_trackers(config)
    out_dir = Path(config.out_dir)
    with opened(out_dir, is_main=not args.process_index) as folder, writing_into(out_dir):
        # 1. Refuse what can be refused before any work.
        begin = where_to_begin(config, folder, args.world_size)
        if is_own(config.loss) and objective is None:
            find_own(config.loss)
        checkpoint = begin.checkpoint
        config, of_judge = choose_judge(config)

        # 2. Text, tokens, loss, model.
        corpus, of_sizes = load_corpus(config.dataset), None
        if checkpoint:
            tokenizer = saved_tokenizer(checkpoint, config)
        else:
            config, tokenizer, of_sizes = choose_sizes(config, corpus)
        transformers.set_seed(config.seed)
        task = make_task(config, corpus, tokenizer, blocks_to_draw(config, args), objective)
        _ = task.train_blocks[0]  # refuses a text shorter than a block
        add_modifiers(task, str(args.device), choose_dtype(config))
        if checkpoint:
            require_loss(checkpoint, task.pipeline.state_dict())
        model = task.make_model()  # the Trainer loads a checkpoint's weights
        model.to(args.device)  # pyright: ignore[reportArgumentType]
        found: list[str] = []  # before the first step
        if folder:
            for said in filter(None, (of_sizes, of_judge)):
                say(console, said)
            found += show_beginning(console, task, model, args, begin)

        # 3. The loop.
        stop, display = StopOnSignal(console), Display(console, task)
        with open_trackers(config, begin.step, is_main=folder is not None) as trackers:
            aside = prepare_folder(folder, config, begin, console) if folder else None
            log = LogFile(out_dir / LOG_FILE)
            findings = TellFindings(console, log, [tracker.tell for tracker in trackers], config, found)
            watchers = [*trackers, log, display, findings, stop]
            watchers += [KeepCheckpoints(folder)] if folder else []
            trainer = TaskTrainer(task, model, args, watchers, folder, findings.say_now)
            with stop, contextlib.closing(display), verbose_modifiers(config, console):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

            # 4. Results.
            step = trainer.state.global_step
            if stop.received and step < config.max_iters:
                say(console, f"Stopped after step {step} of {config.max_iters}; checkpoint saved. To go on:")
                say(console, f"  {command} --out_dir={shlex.quote(config.out_dir)} --resume", "bold")
                return 128 + stop.received
            measures = trainer.evaluate(everything=True)
            sample = task.sample(model)
            if sample is not None:
                for tracker in trackers:
                    tracker.show_sample(step, as_text(sample))
        if trainer.finite.skipped:
            warn(console, f"{trainer.finite.skipped} steps were skipped: a loss or gradient was not finite.")
        if folder:  # the last thing written: a run without it has not ended, and is finished by --resume
            save_analysis(folder, step, analyse(task, model, sample, num_batches=config.eval_iters))
        show_results(console, task, measures, sample, aside, findings.history)
        return 0


def show_beginning(
    console: Console, task: Task, model: PreTrainedModel, args: TrainingArguments, begin: Begin
) -> list[str]:
    """Print what is going to be trained, and with what; returns what was found to be odd about it."""
    found = [*show_summary(console, task, model, args), *show_modifiers(console, task)]
    for said in begin.warnings:
        warn(console, said)
    if begin.checkpoint:
        say(console, f"Resuming from {begin.checkpoint}.\n")
        return found
    return [*found, *show_first_loss(console, task, model)]


def evaluate_saved(config: TrainConfig, console: Console) -> int:
    """Evaluate the last checkpoint of a run on all held-out text."""
    found = checkpoint_of(Path(config.out_dir))
    checkpoint = found.path
    require_sound_checkpoint(checkpoint, config)
    args = training_arguments(config)
    idle = idle_in_evaluation(config, resolve(read_saved_config(config)))
    if idle:
        warn(console, f"{no_effect(idle)} with eval_only.")
    for said in found.said:
        warn(console, said)
    if run_of(Path(config.out_dir)) is None:
        num = len(checkpoints(Path(config.out_dir)))
        say(console, f"{checkpoint.name} is the newest of {num} checkpoints in {config.out_dir}.", "dim")
    corpus = load_corpus(config.dataset)
    task = make_task(config, corpus, saved_tokenizer(checkpoint, config), num_blocks=0)
    model = load_model(task, checkpoint)
    model.to(args.device)  # pyright: ignore[reportArgumentType]
    trainer = TaskTrainer(task, model, args)
    if config.experts and config.moe_balance_mode == "bias":  # it chooses the experts
        require_loss(checkpoint, task.pipeline.state_dict())
        trainer.load_loss(checkpoint)
    measures = trainer.evaluate(everything=True)
    say(console, f"{checkpoint} (step {found.step}) on the held-out text of {corpus.name}:")
    say(console, task.describe(log_row(found.step, measures) or {}), "bold")
    return 0


def blocks_to_draw(config: TrainConfig, args: TrainingArguments) -> int:
    """How many training blocks all ranks draw together."""
    num = config.max_iters * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return min(num, sys.maxsize)  # the largest length in Python


def load_model(task: Task, checkpoint: Path) -> PreTrainedModel:
    """A checkpoint's model; a UserError if there is none that could be loaded."""
    try:
        return task.load_model(checkpoint)
    except Exception as error:  # of many classes
        raise unusable(checkpoint, error) from error


def saved_tokenizer(checkpoint: Path, config: TrainConfig) -> PreTrainedTokenizerFast:
    """A checkpoint's tokenizer."""
    path = checkpoint / "tokenizer_config.json"
    expected = f"the settings of a tokenizer of {config.vocab_size} pieces"
    tokenizer = contents(path, expected, lambda _: PreTrainedTokenizerFast.from_pretrained(checkpoint))
    vocabulary = tokenizer.get_vocab()
    if sorted(vocabulary.values()) != [*range(config.vocab_size)] or END_OF_TEXT not in vocabulary:
        raise Damaged(path, expected)
    return tokenizer


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries' notes while entered; errors still come through."""
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
