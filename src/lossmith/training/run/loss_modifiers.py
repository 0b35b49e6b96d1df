"""The loss modifiers of a run: building them from its keys, showing them, and their logging."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer

import lossmith
from lossmith.modifiers.config import KEYS, MASTER, MODIFIERS
from lossmith.modifiers.configured_modifier import ConfiguredModifier
from lossmith.training.config.keys import TrainConfig
from lossmith.training.errors import UserError
from lossmith.training.run.terminal import say
from lossmith.training.tasks.task import Task, TokenTask

LOGGER = "lossmith.modifiers"
NUM_EXAMPLES = 8  # held-out rows that modifiers see before training


def add_modifiers(task: Task, device: str, dtype: str) -> None:
    """Add the modifiers that the keys switch on to a task's loss; the judge gets the run's device and
    precision.

    Raises:
        UserError: incompatible values, or a judge that cannot be used.
    """
    pipeline = with_modifiers(task.config, task.pipeline.base, task.mode, device, dtype)
    task.pipeline = pipeline.to(device)
    if any(isinstance(m, lossmith.SequenceScoringJudgeWeightModifier) for m in pipeline.modifiers):
        require_same_tokenizer(task, Path(task.config.judge_weight_checkpoint).expanduser())


def with_modifiers(
    config: TrainConfig, base: lossmith.Objective | None, mode: lossmith.ModelMode, device: str, dtype: str
) -> lossmith.LossModifierPipeline:
    """An objective with the modifiers that the keys switch on.

    Raises:
        UserError: as :func:`add_modifiers`.
    """
    values = {name: value for name, value in asdict(config).items() if name in KEYS}
    for modifier in switched_on(config):
        if not acts(modifier, mode):
            values[modifier.enabled_key] = False  # a judge would be loaded for nothing
    try:
        return lossmith.create_loss_modifier_pipeline(
            {**values, "device": device, "dtype": dtype}, base=base, model_mode=mode
        )
    except (ValueError, OSError) as error:
        raise UserError(with_full_stop(str(error))) from None


def switched_on(config: TrainConfig) -> list[type[ConfiguredModifier]]:
    """The modifiers that are switched on, whether they apply or not."""
    return [modifier for modifier in MODIFIERS if getattr(config, modifier.enabled_key)]


def acts(modifier: type[ConfiguredModifier], mode: lossmith.ModelMode) -> bool:
    """Whether a modifier applies to a mode."""
    return modifier({"enabled": False}).supports_mode(mode)


def with_full_stop(text: str) -> str:
    """A message as a sentence."""
    return text if text.endswith(".") else text + "."


def require_same_tokenizer(task: Task, judge: Path) -> None:
    """Raise UserError if the judge comes with another tokenizer than the run's."""
    path = judge / "tokenizer.json"
    if not path.is_file():
        return
    try:
        theirs, ours = Tokenizer.from_file(str(path)).get_vocab(), task.tokenizer.get_vocab()
    except Exception:  # the library raises no other class
        raise UserError(f"{path} is damaged; expected the judge's tokenizer. Restore it.") from None
    if theirs != ours:
        shared = sum(ours.get(piece) == token for piece, token in theirs.items())
        raise UserError(
            f"the judge {judge} has another tokenizer than this run: {shared:,} of {len(ours):,} pieces have "
            "the same number. A judge reads the run's tokens; train it with the same --dataset and "
            "--vocab_size."
        )


def show_modifiers(console: Console, task: Task) -> list[str]:
    """Print which modifiers act and which of those switched on do not; returns what is said of these."""
    if not getattr(task.config, MASTER):
        return []
    wanted, told = switched_on(task.config), told_of(task)
    act = task.pipeline.get_enabled_modifier_names()
    idle = [modifier.__name__ for modifier in wanted if not acts(modifier, task.mode)]
    if act:
        say(console, f"Enabled loss modifiers: {', '.join(act)}", "bold")
    found = [f"Not for mode={task.config.mode}, so without effect: {', '.join(idle)}"] if idle else []
    for text in found:
        say(console, text, "yellow")
    for text in told:
        say(console, f"warning: {with_full_stop(text)}", "yellow")
    if act or idle or told:
        say(console)
    return found + [with_full_stop(text) for text in told]


def told_of(task: Task) -> list[str]:
    """The modifiers' warnings about the data, before training rather than during it."""
    if not isinstance(task, TokenTask):
        return []
    some = range(min(NUM_EXAMPLES, len(task.held_out)))  # pyright: ignore[reportArgumentType]
    labels = torch.stack([task.held_out[i]["labels"] for i in some])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task.pipeline.look_at(labels, num_classes=task.num_classes)
    return [str(warning.message) for warning in caught]


class ConsoleHandler(logging.Handler):
    """Prints log records on a console, above its progress bar."""

    def __init__(self, console: Console):
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        say(self.console, f"{record.name.rpartition('.')[2]}: {record.getMessage()}", "dim")


@contextlib.contextmanager
def verbose_modifiers(config: TrainConfig, console: Console) -> Iterator[None]:
    """Show what the modifiers log while entered, if a `_verbose` key asks for it."""
    if not any(getattr(config, name) for name in KEYS if name.endswith("_verbose")):
        yield
        return
    logger, handler = logging.getLogger(LOGGER), ConsoleHandler(console)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
