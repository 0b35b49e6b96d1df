"""What is shown and written down while a run goes: the speed, the log, the parts of a loss."""

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")

from every_mode import make_task
from rich.console import Console
from running import go, rows

from lossmith.training.config.reading import load_config
from lossmith.training.run import progress
from lossmith.training.run.progress import Display, LogFile, Stopwatch, log_row


def state(step: int) -> Any:
    return SimpleNamespace(global_step=step, max_steps=400, is_world_process_zero=True)


def no_such_thing(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


# ── the speed ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pauses", [(), ("on_evaluate",), ("on_save",), ("on_evaluate", "on_save")])
def test_the_speed_is_that_of_the_steps_alone(pauses: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    """Two steps of a second each, with whatever stands between them, which takes a minute."""
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)
    watch = Stopwatch(tokens_per_step=100)
    watch.on_train_begin(None, state(10), None)
    for between in (pauses, ()):
        watch.on_step_begin(None, None, None)
        clock.now += 1
        watch.on_step_end(None, None, None)
        for pause in between:
            clock.now += 60
            getattr(watch, pause)(None, None, None)
    assert watch.lap(12) == pytest.approx(100)


def test_a_lap_begins_where_the_last_one_ended(monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)
    watch = Stopwatch(tokens_per_step=10)
    watch.on_train_begin(None, state(0), None)
    clock.now = 2.0
    assert watch.lap(4) == pytest.approx(20)
    clock.now = 3.0
    assert watch.lap(5) == pytest.approx(10)


# ── the log ───────────────────────────────────────────────────────────────────────────────────────


def test_what_is_no_finite_number_is_null(tmp_path: Path):
    logs = {"loss": math.nan, "perplexity": math.inf, "grad_norm": -math.inf, "loss/z_loss": 0.5, "epoch": 1}
    expected = {"step": 7, "loss": None, "perplexity": None, "grad_norm": None, "loss/z_loss": 0.5}
    assert log_row(7, logs) == expected
    log = LogFile(tmp_path / "log.jsonl")
    log.on_train_begin(None, state(0), None)
    log.on_log(None, state(7), None, logs)
    (line,) = log.path.read_text().splitlines()
    assert json.loads(line, parse_constant=no_such_thing) == expected


def test_a_correlation_that_is_no_number_is_null(tiny: list[str], tmp_path: Path):
    """It is none of scores that are all the same."""
    task = make_task(load_config([*tiny, "--mode=sequence_scorer"]))
    measures = {f"eval_{name}": value for name, value in task.measures([1.0] * 8).items()}
    assert math.isnan(measures["eval_correlation"])
    log = LogFile(tmp_path / "log.jsonl")
    log.on_log(None, state(1), None, measures)
    assert json.loads(log.path.read_text(), parse_constant=no_such_thing)["correlation"] is None


def test_the_trainers_closing_summary_is_no_row():
    assert log_row(3, {"train_runtime": 1.0, "train_loss": 2.0}) is None


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_part_has_one_name_wherever_it_shows(tiny: list[str], tmp_path: Path):
    """In the log, on the terminal and on the trackers; cross-entropy and the z-loss are two."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ["--loss=unified", "--use_mtp", "--z_loss=1e-3"]
    shown = go([*tiny, *flags, "--tensorboard_log"])[1]
    parts = {"loss/cross_entropy", "loss/z_loss", "loss/mtp_loss"}
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert {name for name in steps[0] if name.startswith("loss/")} == parts
    lines = [line for line in shown.splitlines() if line.startswith("step ") and "tokens/s" in line]
    assert len(lines) == len(steps) == 6
    for line, row in zip(lines, steps, strict=True):
        assert all(f"  {name} {row[name]:.3g}" in line for name in parts)
    events = accumulators.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert parts <= set(events.Tags()["scalars"])


def test_one_part_alone_is_the_loss(tiny: list[str]):
    assert "loss/" not in go([*tiny, "--max_iters=2"])[1]


def test_a_part_that_is_no_number_is_said_to_be_none(tiny: list[str]):
    console = Console(file=io.StringIO(), width=200)
    display = Display(console, make_task(load_config(tiny)))
    logs = {"loss": 1.0, "perplexity": 2.0, "tokens_per_second": 3.0, "loss/z_loss": math.nan}
    display.on_log(None, state(40), None, logs)
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert shown == "step  40/400  loss 1.000  perplexity 2.0  3 tokens/s  loss/z_loss nan\n"
