"""The checkpoints of a run: finding them, keeping the newest, and checking that they are sound."""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import TrainerCallback

from lossmith.integrations.huggingface.trainer import LOSS_FILE
from lossmith.training.config.keys import TrainConfig
from lossmith.training.config.saved_run import CONFIG_FILE, run_of, step_of
from lossmith.training.errors import UserError
from lossmith.training.run.folder import LAST_FILE_OF_A_CHECKPOINT, RunFolder, numbered
from lossmith.training.tasks import task_class
from lossmith.training.tasks.models import EXPERTS, SIZES

T = TypeVar("T")
KEPT = 2
MODEL_FILES = "model*.safetensors"  # large models have several
# Without these two the Trainer would still resume, but with a fresh optimizer.
FILES_OF_THE_OPTIMIZER = ("optimizer.pt", "scheduler.pt")


class KeepCheckpoints(TrainerCallback):
    """Claims a checkpoint before it is written, and deletes the run's older ones.

    The Trainer's own rotation would delete any folder called `checkpoint-N`, even a foreign one.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            self.folder.claim(f"checkpoint-{state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        ranks = range(args.world_size) if args.world_size > 1 else ()
        soon_there = [f"rng_state_{rank}.pth" for rank in ranks]
        self.folder.keep_checkpoints(f"checkpoint-{state.global_step}", KEPT, soon_there)


def checkpoints(out_dir: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints in a folder as (step, path), oldest first."""
    found = numbered(out_dir, "checkpoint")
    return [(step, path) for step, path in found if (path / LAST_FILE_OF_A_CHECKPOINT).is_file()]


def last_checkpoint(out_dir: Path) -> tuple[int, Path]:
    """The newest complete checkpoint as (step, path); a UserError if there is none."""
    found = checkpoints(out_dir)
    if not found:
        raise UserError(
            f"there is no complete checkpoint in {out_dir}; expected a folder like checkpoint-100 there. "
            "Start the run anew, without --resume or --eval_only, or name another --out_dir."
        )
    return found[-1]


def checkpoint_of(out_dir: Path) -> tuple[int, Path]:
    """The checkpoint that the folder is, or the newest complete one in it, as (step, path)."""
    if run_of(out_dir) is None:
        return last_checkpoint(out_dir)
    return max(step_of(path.name) for path in (out_dir.absolute(), out_dir.resolve())), out_dir


def require_sound_checkpoint(checkpoint: Path, config: TrainConfig) -> None:
    """Raise UserError if a file of a checkpoint is missing, damaged, or not of the configuration's model."""
    saved = read_json(checkpoint / "config.json")
    require_architecture(saved.get("architectures"), checkpoint, config)
    said = {key: getattr(config, key) for key in SIZES}
    said |= zip(EXPERTS, config.experts or (), strict=False)
    expected = said | {"block_size": task_class(config).num_positions(config)}
    for key, name in (SIZES | EXPERTS).items():
        if key in said and saved.get(name) != expected[key]:
            theirs = f"{checkpoint / 'config.json'} says {name}={saved.get(name)}"
            raise disagreeing(theirs, f"{CONFIG_FILE} of the run says {key}={said[key]}")
    read_json(checkpoint / "tokenizer_config.json")
    path = checkpoint / "tokenizer.json"
    size = contents(path, "a tokenizer", lambda p: Tokenizer.from_file(str(p)).get_vocab_size())
    if size != config.vocab_size:
        raise disagreeing(f"{path} has {size} pieces", f"the model has vocab_size={config.vocab_size}")
    for path in sorted(checkpoint.glob(MODEL_FILES)) or [checkpoint / "model.safetensors"]:
        contents(path, "the model's weights", lambda p: safe_open(p, framework="pt").keys())
    if config.resume:
        read_json(checkpoint / LAST_FILE_OF_A_CHECKPOINT)
        for name in FILES_OF_THE_OPTIMIZER:
            # PyTorch saves zip files, whose directory comes last: a truncated one has none.
            if not zipfile.is_zipfile(checkpoint / name):
                raise damaged(checkpoint / name, "a file saved by PyTorch")


def require_architecture(architectures: Any, checkpoint: Path, config: TrainConfig) -> None:
    """Raise UserError if a checkpoint is of another mode; its head would be initialised at random."""
    wanted = task_class(config).architecture(config).__name__
    if architectures != [wanted]:
        raise disagreeing(
            f"{checkpoint / 'config.json'} says architectures={architectures}",
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a UserError that names the file if there is none."""
    value = contents(path, "a JSON file", lambda p: json.loads(p.read_text(encoding="utf-8")))
    if not isinstance(value, dict):
        raise damaged(path, "a JSON object")
    return value


def contents(path: Path, expected: str, read: Callable[[Path], T]) -> T:
    """What is read from a file; a UserError that names it if it cannot be read."""
    try:
        return read(path)
    except Exception:  # the libraries raise many classes
        raise damaged(path, expected) from None


def disagreeing(one: str, other: str) -> UserError:
    """The error for files that contradict each other."""
    return UserError(
        f"{one} but {other}; expected them to agree. Restore the file that was changed, or train anew."
    )


def damaged(path: Path, expected: str) -> UserError:
    """The error for a checkpoint's file that cannot be used."""
    state = "is missing" if not path.exists() else "is empty" if not path.stat().st_size else "is damaged"
    return UserError(
        f"{path} {state}; expected {expected}. Restore it, or move {path.parent} away so that the "
        "checkpoint before it is used."
    )
