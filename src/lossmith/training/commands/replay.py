"""``replay``: a batch whose loss or gradient was not finite, computed again part by part."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lossmith.training.commands.tables import table_of
from lossmith.training.config.keys import TrainConfig
from lossmith.training.config.objective import make_objective
from lossmith.training.config.own_loss import MODULE, how_to_name, is_own
from lossmith.training.config.reading import Setting, moderate, resolve
from lossmith.training.config.rules import check
from lossmith.training.config.saved_run import run_of
from lossmith.training.errors import UserError
from lossmith.training.run.batch_file import SavedBatch, read_batch
from lossmith.training.run.folder import BAD_BATCH
from lossmith.training.run.loss_call import Examined
from lossmith.training.run.loss_modifiers import with_modifiers
from lossmith.training.run.runner import quiet_libraries
from lossmith.training.run.terminal import say
from lossmith.training.tasks import task_class
from lossmith.training.tasks.task import TokenTask
from lossmith.training.untrusted import shortened


def replay_batch(console: Console, path: Path, own_loss: str = "") -> None:
    """Print what a saved batch's loss is made of.

    Args:
        console: where to print.
        path: the file, or the folder of a run, whose newest is taken.
        own_loss: `module:function` of a loss of one's own.

    Raises:
        UserError: there is no such file, or it does not belong to its own configuration.
    """
    path = choose_file(path)
    saved = read_batch(path)
    rank = f" of rank {saved.rank}" if saved.num_ranks > 1 else ""
    say(console, f"{path}: step {saved.step}, micro-batch {saved.micro_batch}{rank}", "bold")
    say(console, f"When it was saved: {saved.said}.")
    if saved.call is None:
        say(console, f"It cannot be computed again: {saved.why_not}.", "yellow")
    else:
        with quiet_libraries():
            parts = examine(path, saved, own_loss)
        say(console)
        say(console, table_of("Computed again", HEAD, [row_of(part) for part in parts]))
        say(console, verdict(parts))
    say(console, where_the_weights_are(path, saved))


HEAD = ["part", "value", "norm of its gradient", "first bad, or largest, at"]


def choose_file(path: Path) -> Path:
    """The file, or the newest in a run's folder, which may also be named by one of its checkpoints."""
    if not path.is_dir():
        return path
    path = run_of(path) or path
    found = [(int(match[1]), file) for file in path.iterdir() if (match := BAD_BATCH.fullmatch(file.name))]
    if not found:
        raise UserError(
            f"there is no batch in {path}; expected a file like nonfinite-5.safetensors, which a run saves "
            "when a loss or a gradient is not finite. Name another run, or a file."
        )
    return max(found)[1]


def examine(path: Path, saved: SavedBatch, own_loss: str) -> list[Examined]:
    """The parts of the loss, from the run's own objective and its state."""
    assert saved.call is not None
    config = configuration(path, saved, own_loss)
    task = task_class(config)
    base = make_objective(config, shift=task.shift) if issubclass(task, TokenTask) else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            objective = with_modifiers(config, base, task.mode, "cpu", "float32")
            objective.load_state_dict(saved.state)
            return saved.call.examine(objective)
    except UserError:
        raise
    except Exception as error:  # of many classes: the file may be anybody's
        raise UserError(
            f"{path} does not fit the loss of its own configuration ({shortened(str(error))}); expected "
            "a file as lossmith train saves it. Train again to get a new one."
        ) from None


def configuration(path: Path, saved: SavedBatch, own_loss: str) -> TrainConfig:
    """The checked configuration in the file, whose own loss is code that the command itself has to name."""
    settings = [Setting(str(name), value, str(path)) for name, value in saved.config.items()]
    for setting in settings:
        moderate(setting)
    config = resolve(settings)
    check(config)
    if is_own(config.loss) and not own_loss:
        raise UserError(
            f"the batch in {path} is of a run with loss={config.loss}, which is code: "
            f"{how_to_name(config.loss)}."
        )
    if own_loss and not MODULE.fullmatch(own_loss):
        raise UserError(f"--loss={own_loss}; expected module:function, as the run had it.")
    return replace(config, loss=own_loss or config.loss)


def row_of(part: Examined) -> list[str]:
    """A part in words."""
    return [part.name, f"{part.value:.6g}", f"{part.norm:.6g}", str(part.place or "no token")]


def verdict(parts: list[Examined]) -> str:
    """Which parts are not finite."""
    values = [part.name for part in parts if not part.is_finite]
    gradients = [part.name for part in parts if part.is_finite and not part.has_finite_gradient]
    found = [f"{', '.join(values)} not finite"] if values else []
    found += [f"the gradient of {', '.join(gradients)} not finite"] if gradients else []
    total = math.fsum(part.value for part in parts) if not values else math.nan
    return f"Found: {'; '.join(found)}." if found else f"Every part is finite; they sum to {total:.6g}."


def where_the_weights_are(path: Path, saved: SavedBatch) -> str:
    """How to come to the same step again."""
    text = "The file has the loss's inputs, not the model."
    checkpoint = path.parent / saved.checkpoint
    if saved.checkpoint and checkpoint.is_dir():
        return f"{text} --out_dir={path.parent} --resume goes through this step again, from {checkpoint}."
    return f"{text} The run, started again with the same configuration, goes through this step again."
