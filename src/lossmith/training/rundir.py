"""The folder of a run: what is in it, and that it can be written to before any work is done."""

import re
import shutil
import tempfile
from pathlib import Path

from lossmith.training.errors import UserError

CONFIG_FILE = "config.yaml"
LOG_FILE = "log.jsonl"
PREVIOUS = "previous"
# The Trainer writes this file last, so a checkpoint that has it was not cut short.
LAST_FILE_OF_A_CHECKPOINT = "trainer_state.json"


def require_writable(out_dir: Path) -> None:
    """Make the folder and try it with a file.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass
    except OSError as error:
        raise UserError(
            f"out_dir={out_dir} cannot be written to: {error.strerror}. "
            "Pass --out_dir with a folder that you may write to."
        ) from None


def checkpoints(out_dir: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a folder, (step, path), oldest first."""
    found = []
    for path in out_dir.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and (path / LAST_FILE_OF_A_CHECKPOINT).is_file():
            found.append((int(number[1]), path))
    return sorted(found)


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


def set_aside_previous_run(out_dir: Path) -> Path | None:
    """Move an earlier run out of the way, to `previous/`, in place of what was set aside before.

    A second `python train.py` should just work, as with nanoGPT, but not at the price of the checkpoints
    of a long run that somebody forgot to resume.

    Returns:
        Where the earlier run went, or None when there was none.
    """
    mine = [path for name in (CONFIG_FILE, LOG_FILE) if (path := out_dir / name).exists()]
    mine += [path for path in out_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    if not mine:
        return None
    aside = out_dir / PREVIOUS
    # Without a checkpoint there is nothing worth keeping in place of what was kept before.
    if not any(path.is_dir() for path in mine) and aside.exists():
        for path in mine:
            path.unlink()
        return None
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for path in mine:
        shutil.move(path, aside / path.name)
    return aside
