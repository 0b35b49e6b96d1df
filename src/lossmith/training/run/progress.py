"""What a run shows and logs while it trains."""

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback

from lossmith.training.config.saved_run import write_whole
from lossmith.training.run.folder import is_evaluation, lines_of, step_in
from lossmith.training.run.step_line import StepLine, parts_of, plain_loss
from lossmith.training.run.terminal import say
from lossmith.training.tasks.task import Task


class Stopwatch(TrainerCallback):
    """Tokens per second of training, without evaluations and checkpoints."""

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.lap_step = 0
        self.lap_start = 0.0
        self.step_end = 0.0
        self.paused = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.lap_step, self.lap_start = state.global_step, time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.paused:
            self.lap_start += time.perf_counter() - self.step_end
            self.paused = False

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_end = time.perf_counter()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.paused = True

    def on_save(self, *_: Any, **__: Any) -> None:
        self.paused = True

    def lap(self, step: int) -> float:
        """Tokens per second since the last lap; starts the next one."""
        now = time.perf_counter()
        rate = (step - self.lap_step) * self.tokens_per_step / max(now - self.lap_start, 1e-9)
        self.lap_step, self.lap_start = step, now
        return rate


class LogFile(TrainerCallback):
    """Writes `log.jsonl`; a resumed run drops the rows of the steps that it repeats, and one that is only to
    be finished its closing evaluation and what came after it."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        lines = lines_of(self.path) if self.path.is_file() else []
        steps = [step_in(line) for line in lines]
        pairs = zip(lines, steps, strict=True)
        kept = [line for line, step in pairs if step is not None and step <= state.global_step]
        if state.global_step >= state.max_steps:
            closing = (k for k, line in enumerate(kept) if is_evaluation(line, state.global_step))
            kept = kept[: next(closing, None)]
        write_whole(self.path, "".join(f"{line}\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        row = log_row(state.global_step, logs or {})
        if row and state.is_world_process_zero:
            self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The rows so far, after a resumed run has dropped those that it repeats."""
        return [json.loads(line) for line in lines_of(self.path)] if self.path.is_file() else []


# Renamed, so that a reader's tables keep them apart from those of training.
OF_EVALUATION = {f"eval_{name}": f"val_{name}" for name in ("loss", "tokens", "sequences")}


def log_row(step: int, logs: dict[str, Any]) -> dict[str, Any] | None:
    """A row of `log.jsonl`; None for the Trainer's closing summary."""
    if "loss" not in logs and "eval_loss" not in logs:
        return None
    row: dict[str, Any] = {"step": step}
    for name, value in logs.items():
        if name == "epoch":
            continue  # random blocks have no epochs
        name = OF_EVALUATION.get(name, name.removeprefix("eval_"))
        # JSON has neither NaN nor infinity.
        row[name] = None if isinstance(value, float) and not math.isfinite(value) else value
    return row


class Bar(Progress):
    """A progress bar with the parts of the loss below it."""

    parts = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.parts:
            yield Text(self.parts, "dim")


class Display(TrainerCallback):
    """A progress bar on a terminal, plain lines otherwise."""

    def __init__(self, console: Console, task: Task):
        self.console = console
        self.task = task
        self.line = StepLine()
        self.bar: Bar | None = None
        self.task_id: Any = None
        self.done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.console.is_terminal:
            return
        bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[measures]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            expand=True,
        )
        self.task_id = bar.add_task("", total=state.max_steps, completed=state.global_step, measures="")
        bar.start()
        self.bar = bar

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task_id, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        row = log_row(state.global_step, logs or {})
        if row is None or ("val_loss" in row and self.done):
            return  # `show_results` prints the closing evaluation
        # of constant width: `step  40/400`
        step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "val_loss" in row:
            say(self.console, f"{step}  {self.task.describe(row)}", "bold")
        elif self.bar is not None:
            self.bar.parts = "  ".join([*plain_loss(row), *parts_of(row).values()])
            self.bar.update(self.task_id, measures=self.task.describe(row))
        else:
            say(self.console, self.line.text(step, self.task.figures(row), row, self.console.width))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.done = True
        self.close()

    def close(self) -> None:
        """Remove the bar from the terminal, if there is one."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
