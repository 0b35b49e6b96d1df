"""``read_run``: what a run's folder says of it.

The files may be anybody's: they are data, and what is not as expected is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CONFIG_FILE, LOG_FILE, ANALYSIS_FILE = "config.yaml", "log.jsonl", "analysis.json"
# Prefixes of keys of the log.
PARTS, PULLS, COSINES, MODIFIERS = "loss/", "pull/", "pull_cosine/", "loss_modifiers/"
CHECKPOINT = re.compile(r"checkpoint-(\d+)", re.ASCII)

_BANDS = {"labels": [str], "loss": [float], "num_tokens": [int]}
# What `analysis.json` may hold, each optional.
ANALYSIS: dict[str, Any] = {
    "step": int,
    "num_tokens": int,
    "loss": float,
    "perplexity": float,
    "bits_per_byte": float,
    "entropy": float,
    "accuracy": float,
    "uniform_loss": float,
    "by_position": _BANDS,
    "by_frequency": _BANDS,
    "calibration": {"ece": float, "confidence": [float], "accuracy": [float], "num_tokens": [int]},
    "repetition": {"seq_rep_4": float, "rep_128": float, "text_seq_rep_4": float, "text_rep_128": float},
    "expert_usage": [[float]],
    "hardest": [{"before": str, "token": str, "after": str, "predicted": str, "nll": float}],
    "sample": str,
}


class NoRun(ValueError):
    """A path that is neither a run's folder nor a checkpoint of one."""


@dataclass
class Run:
    """A run, as its folder tells it.

    Attributes:
        name: what it is called among others.
        path: its folder.
        config: its resolved configuration.
        steps: the rows of the log about training steps.
        evaluations: those about evaluations.
        findings: what was found of it, in words.
        analysis: the content of `analysis.json`, as far as it is as expected.
        num_logged: how many training rows the log has, if ``steps`` are fewer.
    """

    name: str
    path: Path
    config: dict[str, str]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    findings: list[str] = field(default_factory=list)
    analysis: dict[str, Any] = field(default_factory=dict)
    num_logged: int = 0

    @property
    def parts(self) -> list[str]:
        """The parts of its loss."""
        return [key.removeprefix(PARTS) for key in self.logged if key.startswith(PARTS)]

    @property
    def logged(self) -> list[str]:
        """The keys of its training rows, in the order in which they first appear."""
        return list(dict.fromkeys(key for row in self.steps for key in row))

    def thinned(self, limit: int) -> Run:
        """The same with at most ``limit`` training rows, those with the extremes among them."""
        return Run(**{**vars(self), "steps": thinned(self.steps, limit)})


def read_run(path: Path) -> Run:
    """Read a run's folder, or that of one of its checkpoints.

    Raises:
        NoRun: there is no log.
    """
    is_checkpoint = CHECKPOINT.fullmatch(path.absolute().name) and not (path / LOG_FILE).is_file()
    folder = path.absolute().parent if is_checkpoint else path
    if not (folder / LOG_FILE).is_file():
        raise NoRun(f"{path} is no run: expected a folder with {LOG_FILE}, or a checkpoint in one.")
    steps, evaluations, findings = [], [], []
    for row in read_log(folder / LOG_FILE):
        if isinstance(row.get("finding"), str):
            findings.append(row["finding"])
        elif type(row.get("step")) is int:
            numbers = {key: number(value) for key, value in row.items()}
            (evaluations if "val_loss" in row else steps).append(numbers)
    analysis = read_analysis([path / ANALYSIS_FILE] if is_checkpoint else analyses_of(folder))
    config = read_config(folder / CONFIG_FILE)
    name = folder.absolute().name
    return Run(name, folder, config, steps, evaluations, findings, analysis, len(steps))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several, with names that tell them apart."""
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    for run, path in zip(runs, paths, strict=True):
        run.name = str(path) if names.count(run.name) > 1 else run.name
    return runs


def analyses_of(folder: Path) -> list[Path]:
    """Where a run's analysis may be: in its folder, or in its checkpoints, the newest first."""
    numbered = [(CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir()]
    found = sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True)
    return [folder / ANALYSIS_FILE, *(path / ANALYSIS_FILE for _, path in found)]


def read_log(path: Path) -> Iterable[dict[str, Any]]:
    """The rows of a log; lines that are none are skipped."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            row = parsed(line)
            if isinstance(row, dict):
                yield row


def read_config(path: Path) -> dict[str, str]:
    """A configuration's keys and values as text; empty if it cannot be read."""
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(saved, dict):
        return {}
    return {str(key): as_text(value) for key, value in saved.items()}


def as_text(value: Any) -> str:
    """A plain value, or a list of them, as text."""
    if isinstance(value, list):
        return ", ".join("..." if isinstance(each, list | dict) else str(each) for each in value)
    return "..." if isinstance(value, dict) else str(value)


def read_analysis(paths: Iterable[Path]) -> dict[str, Any]:
    """The first analysis there is, as far as it is as expected."""
    for path in paths:
        try:
            found = parsed(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return {key: found[key] for key, shape in ANALYSIS.items() if fits(found.get(key), shape)}
    return {}


def fits(value: Any, shape: Any) -> bool:
    """Whether a value of a JSON file has the shape that ``ANALYSIS`` declares."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(each, shape[0]) for each in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(fits(value.get(key), each) for key, each in shape.items())
    return isinstance(value, int | float if shape is float else shape) and not isinstance(value, bool)


def parsed(text: str) -> Any:
    """A JSON text's value, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def number(value: Any) -> float | int | None:
    """The value if it is a finite number, rounded as far as a picture needs; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.5g}")


def thinned(rows: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most ``limit`` rows: of every stretch those with the lowest and the highest loss and the largest
    gradient, so that no spike is lost, and one with pulls where few have them. All series keep the same rows,
    so parts still sum to the loss."""
    if len(rows) <= limit:
        return rows
    kept = {0, len(rows) - 1}
    with_pulls = {i for i, row in enumerate(rows) if any(key.startswith(PULLS) for key in row)}
    are_few = 0 < len(with_pulls) < len(rows)
    num = max(1, (limit - 2) // (4 if are_few else 3))
    for k in range(num):
        stretch = range(k * len(rows) // num, (k + 1) * len(rows) // num)
        kept |= {*[i for i in stretch if are_few and i in with_pulls][:1]}
        for key, sign in (("loss", 1), ("loss", -1), ("grad_norm", 1)):
            kept.add(max(stretch, key=lambda i: -math.inf if (y := rows[i].get(key)) is None else sign * y))
    return [rows[i] for i in sorted(kept)]
