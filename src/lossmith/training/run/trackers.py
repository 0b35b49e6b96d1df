"""Logging to TensorBoard and Weights & Biases, under the same names."""

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lossmith.training.config.keys import TrainConfig
from lossmith.training.errors import UserError
from lossmith.training.run.folder import TENSORBOARD_FOLDER
from lossmith.training.run.progress import log_row

WANDB_FOLDER = "wandb"  # the library's own, with a folder for each run
FINDING = "finding"  # the name of sentences
NEEDED = {"tensorboard_log": "tensorboard", "wandb_log": "wandb"}


def require_trackers(config: TrainConfig) -> None:
    """Raise UserError if a tracker that was asked for is not installed or cannot write."""
    for key, package in NEEDED.items():
        if getattr(config, key) and importlib.util.find_spec(package) is None:
            raise UserError(f"{key}=True needs the {package} package; `pip install 'lossmith[track]'`.")
    folder = Path(config.out_dir) / WANDB_FOLDER
    if config.wandb_log and os.path.lexists(folder) and not folder.is_dir():
        raise UserError(
            f"{folder} is no folder, but with wandb_log=True a run writes there. Nothing was touched. "
            "Pass another --out_dir."
        )


class Tracker(TrainerCallback):
    """Passes on what is logged through `write(step, values)`, and text through `tell(step, text)`; `close()`
    ends it."""

    def __init__(
        self,
        write: Callable[[int, dict[str, float]], None],
        tell: Callable[[int, str], None],
        close: Callable[[], None],
    ):
        self.write = write
        self.tell = tell
        self.close = close

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if log_row(state.global_step, logs or {}) is not None:  # else it is the Trainer's closing summary
            self.write(state.global_step, tracked(logs))


def tracked(logs: dict[str, Any]) -> dict[str, float]:
    """What is logged, prefixed with `train/` or `val/` unless a name has a prefix of its own."""
    named = {}
    for name, value in logs.items():
        if name == "epoch" or not math.isfinite(value):
            continue
        if name.startswith("eval_"):
            name = f"val/{name.removeprefix('eval_')}"
        elif "/" not in name:
            name = f"train/{name}"
        named[name] = value
    return named


@contextlib.contextmanager
def open_trackers(config: TrainConfig, first_step: int, is_main: bool) -> Iterator[list[Tracker]]:
    """The trackers that the configuration asks for, on the rank that writes, closed on leaving."""
    with contextlib.ExitStack() as stack:
        trackers = []
        if config.wandb_log and is_main:
            trackers.append(stack.enter_context(contextlib.closing(weights_and_biases(config))))
        if config.tensorboard_log and is_main:
            trackers.append(stack.enter_context(contextlib.closing(tensorboard(config, first_step))))
        yield trackers


def tensorboard(config: TrainConfig, first_step: int) -> Tracker:
    """TensorBoard's event files in the run's folder."""
    from torch.utils.tensorboard import SummaryWriter

    # Hide what a killed run wrote after its last checkpoint: those steps will be repeated.
    purge = first_step + 1 if first_step else None
    folder = Path(config.out_dir) / TENSORBOARD_FOLDER
    writers: list[SummaryWriter] = []  # made on the first write, since it creates the folder

    def writer() -> SummaryWriter:
        if not writers:
            writers.append(SummaryWriter(str(folder), purge_step=purge))
        return writers[0]

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer().add_scalar(name, value, step)

    def tell(step: int, text: str) -> None:
        writer().add_text(FINDING, text, step)

    def close() -> None:
        for each in writers:
            each.close()

    return Tracker(write, tell, close)


def weights_and_biases(config: TrainConfig) -> Tracker:
    """A run of Weights & Biases with its files in the run's folder."""
    import wandb

    try:
        run = wandb.init(
            project=config.wandb_project,
            name=Path(config.out_dir).name,
            dir=config.out_dir,
            config=asdict(config),
            settings=wandb.Settings(quiet=True),
        )
    except (wandb.Error, OSError) as error:
        raise UserError(
            f"wandb_log=True, but Weights & Biases said: {str(error).rstrip('.')}. Run `wandb login`, or set "
            "WANDB_MODE=offline to write to out_dir alone."
        ) from None
    return Tracker(
        lambda step, values: run.log(values, step=step),
        lambda step, text: run.log({FINDING: text}, step=step),
        run.finish,
    )
