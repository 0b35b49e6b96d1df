"""The manifest of a checkpoint: its files with sizes and SHA-256, written last and atomically.

A checkpoint without a manifest was never finished. One whose files are not those of its manifest was damaged
or changed, and no run goes on from it.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lossmith.training.config.saved_run import step_of, write_whole
from lossmith.training.errors import UserError
from lossmith.training.untrusted import MIB, Unreadable, read_json

MANIFEST = "lossmith_manifest.json"
LARGEST_MANIFEST = 16 * MIB
CHUNK = MIB
# What a file should be, for messages.
EXPECTED = {
    "config.json": "a JSON file",
    "tokenizer_config.json": "a JSON file",
    "trainer_state.json": "a JSON file",
    "tokenizer.json": "a tokenizer",
    "lossmith_loss.pt": "the state of the loss",
    "optimizer.pt": "a file saved by PyTorch",
    "scheduler.pt": "a file saved by PyTorch",
    MANIFEST: "the list of the checkpoint's files",
}


class Damaged(UserError):
    """A file of a checkpoint is missing or is not what was saved; `what` says so in a clause."""

    def __init__(self, path: Path, expected: str, checkpoint: Path | None = None):
        is_there = path.is_file()
        state = "is missing" if not is_there else "is empty" if not path.stat().st_size else "is damaged"
        self.what = f"{path} {state}; expected {expected}"
        super().__init__(
            f"{self.what}. Restore it, or move {checkpoint or path.parent} away so that the "
            "checkpoint before it is used."
        )


@dataclass(frozen=True)
class SavedFile:
    """A file as it was saved."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of: the files by name, the ranks that wrote it, and the step."""

    step: int
    num_ranks: int
    files: dict[str, SavedFile]


def times_of(checkpoint: Path) -> dict[str, int]:
    """When each regular file in a folder, if there is one, was last written, in ns; by name, in order."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_mtime_ns for path in paths}


def seal(checkpoint: Path, names: Iterable[str], num_ranks: int) -> None:
    """Write the manifest of a checkpoint that consists of these files, after all of them are on the disk."""
    files = {name: saved(checkpoint / name, to_disk=True) for name in names}
    manifest = Manifest(step_of(checkpoint.name), num_ranks, files)
    sync_folder(checkpoint)
    write_whole(checkpoint / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")
    sync_folder(checkpoint)


def unseal(checkpoint: Path) -> None:
    """Delete the manifest, if there is one: the checkpoint is no longer one."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)


def is_sealed(checkpoint: Path) -> bool:
    """Whether a checkpoint was finished."""
    return (checkpoint / MANIFEST).is_file()


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint; Damaged if it is missing, or is none of this checkpoint."""
    path = checkpoint / MANIFEST
    try:
        said = read_json(path, LARGEST_MANIFEST)
        files = {name: SavedFile(**file) for name, file in said["files"].items()}
        manifest = Manifest(said["step"], said["num_ranks"], files)
    except (Unreadable, TypeError, KeyError, AttributeError):
        raise Damaged(path, EXPECTED[MANIFEST]) from None
    numbers = [manifest.step, manifest.num_ranks, *(file.size for file in files.values())]
    is_plain = all(type(number) is int and number >= 0 for number in numbers)
    is_plain = is_plain and 1 <= manifest.num_ranks <= max(1, len(files))
    if not (is_plain and all(map(is_inside, files)) and manifest.step in steps_of(checkpoint)):
        raise Damaged(path, EXPECTED[MANIFEST])
    return manifest


def steps_of(checkpoint: Path) -> set[int]:
    """The step in the name of a checkpoint, or of a link to it."""
    return {step_of(path.name) for path in (checkpoint.absolute(), checkpoint.resolve())} - {-1}


def require_whole(checkpoint: Path, needed: Callable[[str], bool] = lambda name: True) -> Manifest:
    """The manifest of a checkpoint whose needed files are as they were saved; Damaged if one is not."""
    manifest = read_manifest(checkpoint)
    for name, file in manifest.files.items():
        path = checkpoint / name
        if needed(name) and not is_as_saved(path, file):
            raise Damaged(path, EXPECTED.get(name, "the file that was saved"), checkpoint)
    return manifest


def is_as_saved(path: Path, file: SavedFile) -> bool:
    """Whether a file is what it was, to the last bit."""
    try:
        is_plain = path.is_file() and not path.is_symlink() and path.stat().st_size == file.size
        return is_plain and saved(path) == file
    except OSError:
        return False


def saved(path: Path, *, to_disk: bool = False) -> SavedFile:
    """The size and the SHA-256 of a file, which is first forced onto the disk if asked for."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb+" if to_disk else "rb") as file:
        if to_disk:
            os.fsync(file.fileno())
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return SavedFile(size, digest.hexdigest())


def is_inside(name: Any) -> bool:
    """Whether a name is a file inside the checkpoint's folder, on every system."""
    return isinstance(name, str) and not re.search(r"^/|\\|:|\0|(^|/)(\.{0,2})(/|$)", name)


def sync_folder(folder: Path) -> None:
    """Force a folder's list of names onto the disk, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
