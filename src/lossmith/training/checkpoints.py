"""The checkpoints of a run: which there are, and whether they are sound."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import TrainerCallback

from lossmith.integrations.huggingface.trainer import LOSS_FILE
from lossmith.training.errors import UserError
from lossmith.training.keys import TrainConfig
from lossmith.training.rundir import (
    CONFIG_FILE,
    LAST_FILE_OF_A_CHECKPOINT,
    RunFolder,
    numbered,
    run_of,
    step_of,
)
from lossmith.training.tasks import task_class

KEPT = 2
MODEL_FILES = "model*.safetensors"  # a large model is written in several
# What a run needs to go on, beyond what its model needs to be evaluated. Without these two the Trainer
# would go on all the same, with an optimizer that remembers nothing.
FILES_OF_THE_OPTIMIZER = ("optimizer.pt", "scheduler.pt")
# Our keys and what the model's own configuration calls them.
KEYS_OF_THE_MODEL = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
}
KEYS_OF_THE_EXPERTS = {"num_experts": "num_local_experts", "moe_top_k": "num_experts_per_tok"}


class KeepCheckpoints(TrainerCallback):
    """Lists a checkpoint before it is written, and deletes what is listed of all but the newest.

    The Trainer's own rotation deletes whatever is called `checkpoint-1...`, whoever made it.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self.folder.claim(f"checkpoint-{state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ranks = range(args.world_size) if args.world_size > 1 else ()
        self.folder.keep_checkpoints(
            f"checkpoint-{state.global_step}", KEPT, soon_there=[f"rng_state_{rank}.pth" for rank in ranks]
        )


def checkpoints(out_dir: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a folder, (step, path), oldest first."""
    return [
        pair for pair in numbered(out_dir, "checkpoint") if (pair[1] / LAST_FILE_OF_A_CHECKPOINT).is_file()
    ]


def last_checkpoint(out_dir: Path) -> tuple[int, Path]:
    """Step and path of the newest complete checkpoint.

    Raises:
        UserError: there is none.
    """
    found = checkpoints(out_dir)
    if not found:
        raise UserError(
            f"there is no complete checkpoint in {out_dir}; expected a folder like checkpoint-100 there. "
            "Start the run anew, without --resume or --eval_only, or name another --out_dir."
        )
    return found[-1]


def checkpoint_of(out_dir: Path) -> tuple[int, Path]:
    """Step and path of a checkpoint, or of the newest complete one of a run.

    Args:
        out_dir: either's folder.

    Raises:
        UserError: there is none.
    """
    around = run_of(out_dir)
    if around is None:
        return last_checkpoint(out_dir)
    names = (out_dir.absolute().name, out_dir.resolve().name)
    return max(map(step_of, names)), out_dir


def require_sound_checkpoint(checkpoint: Path, config: TrainConfig) -> None:
    """Look at the files of a checkpoint before anything relies on them.

    Args:
        checkpoint: its folder.
        config: the run's configuration; its keys that shape the model have to be the checkpoint's.

    Raises:
        UserError: a file is missing or damaged, or the checkpoint is of another model.
    """
    saved = read_json(checkpoint / "config.json")
    require_architecture(saved.get("architectures"), checkpoint, config)
    said = {key: getattr(config, key) for key in KEYS_OF_THE_MODEL}
    said |= zip(KEYS_OF_THE_EXPERTS, config.experts or (), strict=False)
    expected = said | {"block_size": task_class(config).num_positions(config)}
    for key, name in (KEYS_OF_THE_MODEL | KEYS_OF_THE_EXPERTS).items():
        if key in said and saved.get(name) != expected[key]:
            raise UserError(
                f"{checkpoint / 'config.json'} says {name}={saved.get(name)} but {CONFIG_FILE} of "
                f"the run says {key}={said[key]}; expected them to agree. Restore the file that was "
                "changed, or train anew."
            )
    read_json(checkpoint / "tokenizer_config.json")
    require_tokenizer(checkpoint / "tokenizer.json", config.vocab_size)
    for path in sorted(checkpoint.glob(MODEL_FILES)) or [checkpoint / "model.safetensors"]:
        require_weights(path)
    if config.resume:
        read_json(checkpoint / LAST_FILE_OF_A_CHECKPOINT)
        for name in FILES_OF_THE_OPTIMIZER:
            # PyTorch saves zip files, whose table of contents comes last: one that was cut short has none.
            if not zipfile.is_zipfile(checkpoint / name):
                raise damaged(checkpoint / name, "a file saved by PyTorch")


def require_architecture(architectures: Any, checkpoint: Path, config: TrainConfig) -> None:
    """Raise UserError when a checkpoint is of another mode; its head would be filled with random numbers."""
    wanted = task_class(config).architecture(config).__name__
    if architectures != [wanted]:
        raise UserError(
            f"{checkpoint / 'config.json'} says architectures={architectures} but {CONFIG_FILE} of the run "
            f"says mode={config.mode}, objective={config.objective}, model={config.model}, which is "
            f"a {wanted}; expected them to agree. Restore the file that was changed, or train anew."
        )


def require_loss(checkpoint: Path, state: Mapping[str, Tensor]) -> None:
    """Raise UserError when a checkpoint holds another state of the loss than this one can take.

    Args:
        checkpoint: its folder.
        state: that of the loss that goes on.
    """
    path = checkpoint / LOSS_FILE
    saved: Mapping[str, Tensor] = {}
    if path.exists():
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # whatever the library raises of a file that was cut short
            raise damaged(path, "the state of the loss") from None
    theirs = {name: value.shape for name, value in saved.items()}
    ours = {name: value.shape for name, value in state.items()}
    if theirs != ours:
        different = sorted(name for name in theirs.keys() | ours if theirs.get(name) != ours.get(name))
        raise UserError(
            f"the loss of {checkpoint} has other heads or another state than this one: {different[0]} and "
            f"{len(different) - 1} more. Keys of the loss that change what it learns cannot change in a run; "
            "leave them out, or start a new run with another --out_dir."
        )


def require_tokenizer(path: Path, vocab_size: int) -> None:
    """Raise UserError when a checkpoint's tokenizer cannot be read or has another vocabulary."""
    try:
        size = Tokenizer.from_file(str(path)).get_vocab_size()
    except Exception:  # the library raises no other class
        raise damaged(path, "a tokenizer") from None
    if size != vocab_size:
        raise UserError(
            f"{path} has {size} pieces but the model has vocab_size={vocab_size}; expected them to agree. "
            "Restore the file that was changed, or train anew."
        )


def require_weights(path: Path) -> None:
    """Raise UserError when a file of weights is missing or cut short; only its header is read."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError):
        raise damaged(path, "the model's weights") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint, or a UserError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise damaged(path, "a JSON file") from None
    if not isinstance(value, dict):
        raise damaged(path, "a JSON object")
    return value


def damaged(path: Path, expected: str) -> UserError:
    """The error for a file of a checkpoint that cannot be used."""
    state = "is missing" if not path.exists() else "is empty" if not path.stat().st_size else "is damaged"
    return UserError(
        f"{path} {state}; expected {expected}. Restore it, or move {path.parent} away so that the "
        "checkpoint before it is used."
    )
