"""Whole runs in this process, and what they leave behind."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lossmith.training import cli
from lossmith.training.config.reading import load_config
from lossmith.training.run.manifest import seal, times_of, unseal
from lossmith.training.run.runner import run


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `lossmith ...`, line breaks as spaces."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(arg) for arg in args])
    shown = capsys.readouterr()
    return int(caught.value.code or 0), " ".join(shown.out.split()), " ".join(shown.err.split())


def go(flags: list[str]) -> tuple[int, str]:
    """Run in this process; the exit code and what was shown."""
    console = Console(file=io.StringIO(), width=200)
    code = run(load_config(flags), console, "python train.py")
    return code, console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def rows(out_dir: Path) -> list[dict]:
    """The rows of a run's log, without its findings."""
    return [row for row in all_rows(out_dir) if "finding" not in row]


def findings_of(out_dir: Path) -> list[dict]:
    """The findings of a run's log."""
    return [row for row in all_rows(out_dir) if "finding" in row]


def all_rows(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The parameters in a checkpoint."""
    return load_file(checkpoint / "model.safetensors")


def reseal(checkpoint: Path) -> None:
    """Let a checkpoint pass for one that was saved as it is now."""
    unseal(checkpoint)
    seal(checkpoint, times_of(checkpoint), 1)
