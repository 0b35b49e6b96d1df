"""The checkpoints of a run: finding them, keeping the newest, and checking that they are sound."""

import dataclasses
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from lossmith.integrations.huggingface.loss_state import LOSS_FILE
from lossmith.report.reading import ANALYSIS_FILE
from lossmith.training.config.keys import TrainConfig
from lossmith.training.config.saved_run import CONFIG_FILE, run_of
from lossmith.training.data.tokenizer import read_tokenizer
from lossmith.training.errors import UserError
from lossmith.training.run.folder import RunFolder, numbered
from lossmith.training.run.manifest import (
    EXPECTED,
    Damaged,
    Manifest,
    is_sealed,
    read_manifest,
    require_whole,
    steps_of,
    unseal,
)
from lossmith.training.tasks import task_class
from lossmith.training.tasks.models import EXPERTS, SIZES
from lossmith.training.untrusted import MIB, read_json, shown

T = TypeVar("T")
KEPT = 2
LARGEST_JSON = 256 * MIB  # of a checkpoint; the Trainer's state holds every line of the log
MODEL_FILES = "model*.safetensors"  # large models have several
MODEL_INDEX = "model.safetensors.index.json"
STATE_FILE = "trainer_state.json"
# Without these the Trainer would still resume, but with a fresh optimizer or other random numbers.
FILES_OF_THE_OPTIMIZER = ("optimizer.pt", "scheduler.pt")
OF_TRAINING = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "trainer_state")


@dataclass(frozen=True)
class Found:
    """A sound checkpoint, and the damaged ones after it."""

    step: int
    path: Path
    manifest: Manifest
    damaged: list[tuple[Path, Damaged]]

    @property
    def said(self) -> list[str]:
        """What to say about the damaged ones."""
        return [f"{error.what}. So {self.path.name} is used instead." for _, error in self.damaged]


class KeepCheckpoints(TrainerCallback):
    """Claims a checkpoint before it is written, and deletes the run's older ones.

    The Trainer's own rotation would delete any folder called `checkpoint-N`, even a foreign one.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            name = f"checkpoint-{state.global_step}"
            self.folder.claim(name)
            unseal(self.folder.path / name)  # its files are about to be overwritten
            self.folder.delete_file(f"{name}/{ANALYSIS_FILE}")  # of the model that was there

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.folder.keep_checkpoints(f"checkpoint-{state.global_step}", KEPT, best_of(state.log_history))


def best_of(log_history: Any) -> str | None:
    """The name of the checkpoint after the evaluation with the lowest loss, the first of several; None if
    there was none."""
    found = [row for row in log_history if isinstance(row, dict) and "eval_loss" in row]
    losses = [(row["eval_loss"], row.get("step")) for row in found if isinstance(row["eval_loss"], float)]
    return f"checkpoint-{min(losses, key=lambda pair: pair[0])[1]}" if losses else None


def best_so_far(checkpoint: Path) -> str | None:
    """The same of the run that has come to a checkpoint."""
    found = read_object(checkpoint / STATE_FILE).get("log_history")
    return best_of(found) if isinstance(found, list) else None


def checkpoints(out_dir: Path) -> list[tuple[int, Path]]:
    """The finished checkpoints in a folder as (step, path), oldest first."""
    found = numbered(out_dir, "checkpoint")
    return [(step, path) for step, path in found if is_sealed(path) and (path / STATE_FILE).is_file()]


def last_checkpoint(out_dir: Path) -> tuple[int, Path]:
    """The newest finished checkpoint as (step, path); a UserError if there is none."""
    found = checkpoints(out_dir)
    if not found:
        raise UserError(
            f"there is no complete checkpoint in {out_dir}; expected a folder like checkpoint-100 there. "
            "Start the run anew, without --resume or --eval_only, or name another --out_dir."
        )
    return found[-1]


def newest_sound(out_dir: Path, *, to_train: bool) -> Found:
    """The newest checkpoint in a folder that is as it was saved; a UserError if there is none.

    To evaluate, the state of the training does not have to be.
    """
    last_checkpoint(out_dir)
    damaged: list[tuple[Path, Damaged]] = []
    for step, path in reversed(checkpoints(out_dir)):
        try:
            return Found(step, path, require_whole(path, needed(to_train)), damaged)
        except Damaged as error:  # noqa: PERF203
            damaged.append((path, error))
    if len(damaged) == 1:
        raise damaged[0][1]
    raise UserError(
        f"no checkpoint in {out_dir} is as it was saved: "
        f"{'; '.join(error.what for _, error in damaged)}. Restore one of them, or start the run anew."
    )


def needed(to_train: bool) -> Callable[[str], bool]:
    """Which files of a checkpoint are read."""
    return lambda name: to_train or not name.startswith(OF_TRAINING)


def checkpoint_of(out_dir: Path) -> Found:
    """The checkpoint that the folder is, or the newest sound one in it, to be evaluated."""
    if run_of(out_dir) is None:
        return newest_sound(out_dir, to_train=False)
    step = max(steps_of(out_dir))
    return Found(step, out_dir, require_whole(out_dir, needed(to_train=False)), [])


def require_sound_checkpoint(checkpoint: Path, config: TrainConfig) -> None:
    """Raise UserError if a file of a checkpoint is missing, damaged, or not of the configuration's model."""
    saved = read_object(checkpoint / "config.json")
    require_architecture(saved.get("architectures"), checkpoint, config)
    said = {key: getattr(config, key) for key in SIZES}
    said |= zip(EXPERTS, config.experts or (), strict=False)
    expected = said | {"block_size": task_class(config).num_positions(config)}
    for key, name in (SIZES | EXPERTS).items():
        if key in said and saved.get(name) != expected[key]:
            theirs = f"{checkpoint / 'config.json'} says {name}={shown(saved.get(name))}"
            raise disagreeing(theirs, f"{CONFIG_FILE} of the run says {key}={said[key]}")
    read_object(checkpoint / "tokenizer_config.json")
    path = checkpoint / "tokenizer.json"
    size = contents(path, "a tokenizer", lambda p: read_tokenizer(p).get_vocab_size())
    if size != config.vocab_size:
        raise disagreeing(f"{path} has {size} pieces", f"the model has vocab_size={config.vocab_size}")
    for path in sorted(checkpoint.glob(MODEL_FILES)) or [checkpoint / "model.safetensors"]:
        contents(path, "the model's weights", lambda p: safe_open(p, framework="pt").keys())
    require_index(checkpoint)
    if config.resume:
        require_state(checkpoint)
        ranks = read_manifest(checkpoint).num_ranks
        random = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
        for name in (*FILES_OF_THE_OPTIMIZER, *random):
            # PyTorch saves zip files, whose directory comes last: a truncated one has none.
            if not zipfile.is_zipfile(checkpoint / name):
                raise Damaged(checkpoint / name, "a file saved by PyTorch")


def require_index(checkpoint: Path) -> None:
    """Raise UserError if the index of a model in several files names another file than those."""
    path = checkpoint / MODEL_INDEX
    if path.exists():
        inside = {file.name for file in checkpoint.glob(MODEL_FILES)}
        weight_map = read_object(path).get("weight_map")
        named = [*weight_map.values()] if isinstance(weight_map, dict) else [None]
        if not all(isinstance(name, str) and name in inside for name in named):
            raise Damaged(path, f"the names of {MODEL_FILES} in its folder")


def require_state(checkpoint: Path) -> None:
    """Raise UserError if the Trainer's state is not that of the checkpoint's step."""
    path = checkpoint / STATE_FILE
    saved = read_object(path)
    known = {field.name: field.default for field in dataclasses.fields(TrainerState)}
    step = saved.get("global_step")
    if type(step) is not int or step not in steps_of(checkpoint):
        raise disagreeing(f"{path} says global_step={shown(step)}", f"its folder is {checkpoint.name}")
    for name, value in saved.items():
        like = known.get(name, value)
        if name not in known or (isinstance(like, int | float) and not isinstance(value, int | float)):
            raise Damaged(path, "the state of a Trainer")


def require_architecture(architectures: Any, checkpoint: Path, config: TrainConfig) -> None:
    """Raise UserError if a checkpoint is of another mode; its head would be initialised at random."""
    wanted = task_class(config).architecture(config).__name__
    if architectures != [wanted]:
        raise disagreeing(
            f"{checkpoint / 'config.json'} says architectures={shown(architectures)}",
            f"{CONFIG_FILE} of the run says mode={config.mode}, objective={config.objective}, "
            f"model={config.model}, which is a {wanted}",
        )


def require_loss(checkpoint: Path, state: Mapping[str, Tensor]) -> None:
    """Raise UserError if a checkpoint's state of the loss is not that of the current loss."""
    path = checkpoint / LOSS_FILE
    saved: Mapping[str, Tensor] = {}
    if path.exists():
        saved = contents(path, "the state of the loss", lambda p: torch.load(p, "cpu", weights_only=True))
    theirs = {name: value.shape for name, value in saved.items()}
    ours = {name: value.shape for name, value in state.items()}
    if theirs != ours:
        different = sorted(name for name in theirs.keys() | ours if theirs.get(name) != ours.get(name))
        raise UserError(
            f"the loss of {checkpoint} has other heads or another state than this one: {different[0]} and "
            f"{len(different) - 1} more. Keys of the loss that change what it learns cannot change in a run; "
            "leave them out, or start a new run with another --out_dir."
        )


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; Damaged if there is none."""
    value = contents(path, EXPECTED["config.json"], lambda p: read_json(p, LARGEST_JSON))
    if not isinstance(value, dict):
        raise Damaged(path, "a JSON object")
    return value


def contents(path: Path, expected: str, read: Callable[[Path], T]) -> T:
    """What is read from a file; Damaged if it cannot be read."""
    try:
        return read(path)
    except Exception:  # the libraries raise many classes
        raise Damaged(path, expected) from None
    except BaseException as error:  # a library in Rust that gave up
        if type(error).__name__ != "PanicException":
            raise
        raise Damaged(path, expected) from None


def disagreeing(one: str, other: str) -> UserError:
    """The error for files that contradict each other."""
    return UserError(
        f"{one} but {other}; expected them to agree. Restore the file that was changed, or train anew."
    )
