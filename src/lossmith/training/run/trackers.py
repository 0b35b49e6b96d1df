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

from lossmith.report.comparison import OF_THE_PLACE
from lossmith.training.config.keys import SPECS, TrainConfig
from lossmith.training.errors import UserError
from lossmith.training.run.folder import TENSORBOARD_FOLDER
from lossmith.training.run.progress import log_row

WANDB_FOLDER = "wandb"  # the library's own, with a folder for each run
FINDING, SAMPLE, CONFIGURATION = "finding", "sample", "configuration"  # the names of texts
TEXTS = "texts"  # TensorBoard's run of the sample and the configuration
# What runs are compared by on TensorBoard's page of hyperparameters.
COMPARED_BY = ("val/loss", "val/perplexity", "val/accuracy")
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
    """Passes on what is logged through `write(step, values)`, and texts by name through
    `put(step, name, text)`; `close()` ends it."""

    def __init__(
        self,
        write: Callable[[int, dict[str, float]], None],
        put: Callable[[int, str, str], None],
        close: Callable[[], None],
    ):
        self.write = write
        self.put = put
        self.close = close

    def tell(self, step: int, text: str) -> None:
        """Pass on a finding."""
        self.put(step, FINDING, text)

    def show_sample(self, step: int, text: str) -> None:
        """Pass on a sample."""
        self.put(step, SAMPLE, text)

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
    from torch.utils.tensorboard.summary import hparams

    # Hide what a killed run wrote after its last checkpoint: those steps will be repeated.
    purge = first_step + 1 if first_step else None
    folder = Path(config.out_dir) / TENSORBOARD_FOLDER
    # Made on the first write, since they create their folders; texts that are long have one of their own.
    writers: dict[Path, SummaryWriter] = {}

    def writer(of: Path = folder) -> SummaryWriter:
        if of not in writers:
            writers[of] = SummaryWriter(str(of), purge_step=purge)
            if of == folder:
                for summary in hparams(hyperparameters(config), dict.fromkeys(COMPARED_BY, 0.0)):
                    # add_hparams would make a run of its own
                    writers[of]._get_file_writer().add_summary(summary)
                put(first_step, CONFIGURATION, configuration_text(config))
        return writers[of]

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer().add_scalar(name, value, step)

    def put(step: int, name: str, text: str) -> None:
        if name == FINDING:
            writer().add_text(name, text, step)
        else:
            writer(folder / TEXTS).add_text(name, as_code(text), step)

    def close() -> None:
        for each in writers.values():
            each.close()

    return Tracker(write, put, close)


def hyperparameters(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """The keys that differ from their defaults, and the loss, as TensorBoard takes them."""
    names = dict.fromkeys(["loss", *config.changed(SPECS)])
    values = {name: getattr(config, name) for name in names if name not in OF_THE_PLACE}
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in values.items()
    }


def configuration_text(config: TrainConfig) -> str:
    """All keys and their values, a line each."""
    return "\n".join(f"{name}: {value}" for name, value in asdict(config).items())


def as_code(text: str) -> str:
    """Text for a viewer of Markdown, left as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


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
        lambda step, name, text: run.log({name: text}, step=step),
        run.finish,
    )
