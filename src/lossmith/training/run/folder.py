"""The folder of a run, which touches only what it wrote itself.

`lossmith_run.json` lists what the run wrote. A name is added before its file is created. A file that has one
of our names but is not listed is foreign: it is never overwritten, moved or deleted, and a run that would
have to do so is refused. An earlier run is moved aside as a whole.
"""

import contextlib
import errno
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lossmith.report.reading import ANALYSIS_FILE
from lossmith.training.config.keys import TrainConfig
from lossmith.training.config.saved_run import CONFIG_FILE, step_of, write_whole
from lossmith.training.errors import UserError
from lossmith.training.run.manifest import MANIFEST, is_sealed, read_manifest
from lossmith.training.untrusted import MIB, Unreadable, parse_json, read_json

RUN_FILE = "lossmith_run.json"
BAD_BATCH = re.compile(r"nonfinite-(\d+)(-rank-\d+)?\.safetensors", re.ASCII)
LOG_FILE = "log.jsonl"
LOCK_FILE = ".lossmith_run.lock"  # where a folder cannot be locked
TENSORBOARD_FOLDER = "tensorboard"
EVENTS_OF_TENSORBOARD = "events.out.tfevents."
PROGRAM = "lossmith train"
LARGEST_LIST = 64 * MIB
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
OF_THE_FOLDER = (CONFIG_FILE, LOG_FILE, RUN_FILE, ANALYSIS_FILE)
IS_WRITABLE = ".lossmith_is_writable."  # a file without a name, where the system can
# What a kill leaves in the folder of a run: files of `write_whole`, and the folder in which a batch is made.
HALF_WRITTEN = re.compile(
    rf"\.({'|'.join([*map(re.escape, OF_THE_FOLDER), BAD_BATCH.pattern])})\.[0-9a-f]{{8}}"
    rf"|{re.escape(IS_WRITABLE)}\w{{8}}",
    re.ASCII,
)
# And in a checkpoint: files of `write_whole` and of safetensors.
HALF_A_FILE = re.compile(
    rf"\.({re.escape(MANIFEST)}|{re.escape(ANALYSIS_FILE)})\.[0-9a-f]{{8}}|\.tmp\w{{6}}", re.ASCII
)


@dataclass(frozen=True)
class SetAside:
    """An earlier run that was moved: its new place and the names moved."""

    folder: Path
    names: list[str]


class RunFolder:
    """A run's folder and the list of what the run wrote into it."""

    def __init__(self, path: Path):
        self.path = path
        self.has_list, self.written = read_list(path / RUN_FILE)
        self.passed_over: set[str] = set()  # damaged checkpoints that this run did not resume from

    def owns(self, name: str) -> bool:
        """Whether the run wrote the file or folder with this name."""
        path = self.path / name
        if name not in self.written or path.is_symlink():  # a run creates no links
            return False
        is_file = name in (CONFIG_FILE, LOG_FILE) or BAD_BATCH.fullmatch(name)
        return path.is_file() if is_file else path.is_dir()

    def recognise(self) -> None:
        """List what an older run without a list must have written; its configuration has been read."""
        log, events = self.path / LOG_FILE, self.path / TENSORBOARD_FOLDER
        self.written.add(CONFIG_FILE)
        if log.is_file() and all(step_in(line) is not None for line in lines_of(log)[:-1]):
            self.written.add(LOG_FILE)
        if events.is_dir() and all(p.name.startswith(EVENTS_OF_TENSORBOARD) for p in events.iterdir()):
            self.written.add(TENSORBOARD_FOLDER)

    def require_room(self, names: Iterable[str], after_step: int = sys.maxsize) -> None:
        """Raise UserError if one of the names, or a checkpoint of a later step, is foreign."""
        later = [path.name for step, path in numbered(self.path, "checkpoint") if step > after_step]
        taken = [n for n in (*names, *later) if os.path.lexists(self.path / n) and not self.owns(n)]
        if taken:
            was = "was" if len(taken) == 1 else "were"
            raise UserError(
                f"{', '.join(str(self.path / name) for name in taken)} {was} not written by a run in this "
                "folder; a run would overwrite it, or take it for its own. Nothing was touched. "
                "Pass another --out_dir."
            )

    def claim(self, *names: str) -> None:
        """List names before they are written; a UserError if one is foreign."""
        self.require_room(names)
        self.written |= {*names}
        self._write_list()

    def set_aside(self) -> SetAside | None:
        """Move an earlier run, if there is one, to `previous-1/`, `previous-2/` and so on.

        Training again should just work, as in nanoGPT, but must not cost users a long run that they forgot
        to resume. A move that was interrupted is completed.
        """
        names = in_order(name for name in self.written if "/" not in name and self.owns(name))
        last, aside = max(numbered(self.path, "previous"), default=(0, self.path))
        moved = self._moved_to(aside) if last else []
        self.written = set()
        if not names and not moved:
            return None
        if not moved:
            aside = self.path / f"previous-{last + 1}"
        try:
            aside.mkdir(exist_ok=bool(moved))
            for name in (*names, RUN_FILE):  # the list last, since it says what is still here
                (self.path / name).rename(aside / name)
        except OSError as error:
            raise UserError(
                f"the earlier run in {self.path} cannot be moved to {aside}: {error.strerror}. "
                "Pass another --out_dir."
            ) from None
        return SetAside(aside, in_order([*moved, *names]))

    def _moved_to(self, aside: Path) -> list[str]:
        """What an interrupted move has moved to a folder: the list, which says so, comes last."""
        if aside.is_symlink() or not aside.is_dir():
            return []
        there = [path.name for path in aside.iterdir()]
        is_part = all(name in self.written and not os.path.lexists(self.path / name) for name in there)
        return there if is_part else []

    def keep_checkpoints(self, newest: str, num: int, best: str | None) -> None:
        """List the newest checkpoint's files and delete those of all but the `num` newest sound ones, and the
        best one; and what is half written in any of them.

        A run that was killed has not listed what it was writing; those files have the same names. Later
        checkpoints than the newest were passed over on resuming, and stay until the run is there again.
        """
        names = [*read_manifest(self.path / newest).files, MANIFEST]
        own = [path for step, path in numbered(self.path, "checkpoint") if step <= step_of(newest)]
        own = [path for path in own if self.owns(path.name)]
        for path in own:
            delete_half_written(path, HALF_A_FILE)
            self.written |= {f"{path.name}/{name}" for name in names if os.path.lexists(path / name)}
        self.passed_over.discard(newest)
        sound = [path for path in own if is_sealed(path) and path.name not in self.passed_over]
        for path in own:
            if path not in sound[-num:] and path.name != best:
                self._delete(path)
        self._write_list()

    def drop(self, checkpoint: str, names: Iterable[str]) -> None:
        """Delete what was written of a checkpoint that could not be finished."""
        self.written |= {f"{checkpoint}/{name}" for name in names}
        self._delete(self.path / checkpoint)

    def delete_file(self, name: str) -> None:
        """Delete a file if it is listed and there."""
        if name in self.written:
            (self.path / name).unlink(missing_ok=True)
            self.written.discard(name)

    def clear_half_written(self) -> None:
        """Delete what a killed run was writing in the folder itself."""
        delete_half_written(self.path, HALF_WRITTEN)
        for room in self.path.iterdir():
            if HALF_WRITTEN.fullmatch(room.name) and room.is_dir() and not room.is_symlink():
                with contextlib.suppress(OSError):  # it holds foreign folders
                    delete_room(room)

    def _delete(self, checkpoint: Path) -> None:
        """Delete the listed files of a checkpoint, and its folder if nothing else is in it."""
        files = {name for name in self.written if name.startswith(f"{checkpoint.name}/")}
        manifest = f"{checkpoint.name}/{MANIFEST}"
        for name in sorted(files, key=lambda name: name != manifest):  # first: the rest is no checkpoint
            with contextlib.suppress(OSError):
                (self.path / name).unlink(missing_ok=True)
                self.written.discard(name)
        folders = {parent for name in files for parent in (self.path / name).parents} - {*self.path.parents}
        for folder in sorted(folders - {self.path} | {checkpoint}, reverse=True):  # the inner ones first
            with contextlib.suppress(OSError):  # it holds foreign files
                folder.rmdir()
        if not checkpoint.exists():
            self.written.discard(checkpoint.name)

    def _write_list(self) -> None:
        text = json.dumps({"program": PROGRAM, "written": in_order(self.written)}, indent=1)
        write_whole(self.path / RUN_FILE, text + "\n")
        self.has_list = True


def delete_half_written(folder: Path, names: re.Pattern[str]) -> None:
    """Delete the files in a folder that have such names."""
    for path in folder.iterdir():
        if names.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.unlink()


def delete_room(room: Path) -> None:
    """Delete a folder in which a file was made, and what is left there."""
    for path in room.iterdir():
        path.unlink(missing_ok=True)
    room.rmdir()


def read_list(path: Path) -> tuple[bool, set[str]]:
    """Whether there is a list, and the names on it; a UserError if it is damaged."""
    if not os.path.lexists(path):
        return False, set()
    names = None
    with contextlib.suppress(Unreadable):
        said = None if path.is_symlink() else read_json(path, LARGEST_LIST)
        if isinstance(said, dict) and said.get("program") == PROGRAM:
            names = said.get("written")
    if not isinstance(names, list):
        raise UserError(
            f"{path} is no list of what a run wrote, or a damaged one, so nobody knows what of {path.parent} "
            "is whose. Nothing was touched. Pass another --out_dir."
        )
    return True, {name for name in names if isinstance(name, str) and is_ours(name)}


def is_ours(name: str) -> bool:
    """Whether a run could write this name: a file or folder of its own, or a file in a checkpoint."""
    first, *others = name.split("/")
    if others:
        return step_of(first) >= 0 and not {"", ".", ".."} & {*others} and "\\" not in name
    is_named = first in (CONFIG_FILE, LOG_FILE, TENSORBOARD_FOLDER) or BAD_BATCH.fullmatch(first)
    return bool(is_named) or step_of(first) >= 0


def in_order(names: Iterable[str]) -> list[str]:
    """Names sorted, with checkpoints last, by step."""
    return sorted(names, key=lambda name: (step_of(name.split("/")[0]), name))


def numbered(folder: Path, word: str) -> list[tuple[int, Path]]:
    """The paths called `word-N` in a folder, as (N, path), sorted."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [(re.fullmatch(rf"{word}-(\d+)", path.name, re.ASCII), path) for path in paths]
    return sorted((int(number[1]), path) for number, path in found if number)


def names_of(config: TrainConfig) -> tuple[str, ...]:
    """What a run writes besides its checkpoints."""
    return (CONFIG_FILE, LOG_FILE, *([TENSORBOARD_FOLDER] if config.tensorboard_log else []))


@contextlib.contextmanager
def opened(out_dir: Path, *, is_main: bool) -> Iterator[RunFolder | None]:
    """A run's folder, created if need be and locked while entered; None on ranks that write nothing."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir, prefix=IS_WRITABLE):
            os.listdir(out_dir)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"out_dir={out_dir} cannot be written to: {reason}. "
            "Pass --out_dir with a folder that you may write to."
        ) from None
    if not is_main:
        yield None
        return
    with held(out_dir):
        yield RunFolder(out_dir)


@contextlib.contextmanager
def held(out_dir: Path) -> Iterator[None]:
    """Lock the folder against other runs while entered; the lock ends with the process, however it ends.

    A file system without locks, as some network drives are, is passed over.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        with held_by_a_file(out_dir):
            yield
        return
    folder = os.open(out_dir, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise at_work(out_dir) from None
        yield
    finally:
        os.close(folder)


@contextlib.contextmanager
def held_by_a_file(out_dir: Path) -> Iterator[None]:
    """As `held`, for systems that cannot lock a folder: locks a file in it."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(out_dir / LOCK_FILE, timeout=0):
            yield
    except Timeout:
        raise at_work(out_dir) from None


def at_work(out_dir: Path) -> UserError:
    """The error for a folder in which another run is training."""
    return UserError(f"another run is at work in {out_dir}. Wait for its end, or pass another --out_dir.")


@contextlib.contextmanager
def writing_into(out_dir: Path) -> Iterator[None]:
    """Turn a full disk, or one that fails, into a UserError while entered."""
    try:
        yield
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        raise UserError(
            f"out_dir={out_dir} cannot be written to: {error.strerror}. The checkpoints there are whole; "
            "make room, and --resume goes on from the last one."
        ) from error


def has_ended(out_dir: Path, step: int) -> bool:
    """Whether a run has its evaluation after this step, and its analysis, which it writes last."""
    log, analysis = out_dir / LOG_FILE, out_dir / f"checkpoint-{step}" / ANALYSIS_FILE
    lines = lines_of(log) if log.is_file() and analysis.is_file() else []
    return any(is_evaluation(line, step) for line in lines)


def is_evaluation(line: str, step: int) -> bool:
    """Whether a line of the log is an evaluation after this step."""
    return step_in(line) == step and "val_loss" in parse_json(line)


def lines_of(log: Path) -> list[str]:
    """The lines of a log, with undecodable bytes replaced."""
    return log.read_text(encoding="utf-8", errors="replace").splitlines()


def step_in(line: str) -> int | None:
    """The step of a line of the log; None for a line that is truncated or not a row."""
    try:
        step = parse_json(line)["step"]
    except (Unreadable, TypeError, KeyError):
        return None
    return step if type(step) is int else None
