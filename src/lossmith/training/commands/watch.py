"""``watch``: a run's log in the terminal while it grows."""

import contextlib
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lossmith.report.reading import PARTS, Run, read_run
from lossmith.training.run.terminal import say, shown

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 40
# Keys of the log and how they are written.
FIGURES = {
    "loss": "{:.4f}",
    "perplexity": "{:,.1f}",
    "accuracy": "{:.1%}",
    "mean_absolute_error": "{:.4f}",
    "learning_rate": "{:.3g}",
    "grad_norm": "{:.3f}",
    "tokens_per_second": "{:,.0f}",
}


def watch_run(console: Console, path: Path, *, seconds: float) -> None:
    """Show a run every `seconds` until its last step; once if that is 0."""
    run = read_run(path)
    if not seconds:
        say(console, frame(run))
        return
    live = Live(shown(frame(run)), console=console, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), live:  # which stops the watching, not the run
        while not is_over(run):
            time.sleep(seconds)
            run = read_run(path)
            live.update(shown(frame(run)), refresh=True)


def last_step(run: Run) -> int:
    """The last step in the log."""
    return max((row["step"] for row in (*run.steps[-1:], *run.evaluations[-1:])), default=0)


def planned(run: Run) -> int:
    """How many steps the configuration asks for; 0 if it cannot be read."""
    said = run.config.get("max_iters", "")
    return int(said) if said.isdecimal() else 0


def is_over(run: Run) -> bool:
    """Whether the evaluation after the last step is there."""
    return bool(run.evaluations) and run.evaluations[-1]["step"] >= planned(run) > 0


def frame(run: Run) -> RenderableType:
    """A run as it is now."""
    step, num = last_step(run), planned(run)
    head = Text.assemble((run.name, "bold"), f"  step {step:,}" + (f" of {num:,}" if num else ""))
    table = Table.grid(padding=(0, 2))
    row = run.steps[-1] if run.steps else {}
    for key, form in FIGURES.items():
        if row.get(key) is not None:
            table.add_row(Text(key, "cyan"), form.format(row[key]), sparkline(values(run.steps, key)))
    for name in run.parts:
        if row.get(PARTS + name) is not None:
            y = values(run.steps, PARTS + name)
            table.add_row(Text(PARTS + name, "cyan"), f"{row[PARTS + name]:.4g}", sparkline(y))
    if run.evaluations:
        last = run.evaluations[-1]
        said = f"{last['val_loss']:.4f}" if last["val_loss"] is not None else "-"
        table.add_row(Text("val_loss", "bold"), said, sparkline(values(run.evaluations, "val_loss")))
    done = round(WIDTH * min(step / num, 1)) if num else 0
    bar = Text.assemble(("━" * done, "green"), ("━" * (WIDTH - done), "dim"))
    return Group(head, bar, table, *(Text(finding, "yellow") for finding in run.findings))


def values(rows: list[dict[str, Any]], key: str) -> list[float]:
    """A key's numbers."""
    return [row[key] for row in rows if row.get(key) is not None]


def sparkline(y: list[float]) -> str:
    """A curve of at most `WIDTH` characters, each the mean of a stretch."""
    width = min(WIDTH, len(y))
    stretches = [y[k * len(y) // width : (k + 1) * len(y) // width] for k in range(width)]
    means = [sum(stretch) / len(stretch) for stretch in stretches]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
