"""What a run came to: first, best and last of each number that it logged, and its best checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lossmith.training.run.findings import PARTS, History, is_number

HIGH = {"accuracy", "f1", "correlation", "tokens_per_second"}  # the best is the highest
LOW = {"loss", "val_loss", "perplexity", "bits_per_byte", "mean_absolute_error"}  # the lowest
NOT_SHOWN = {"step", "val_tokens", "val_sequences"}
LEFT_TO_THE_REPORT = ("loss_modifiers/", "pull/", "pull_cosine/")


def closing_table(history: History) -> Table:
    """First, best and last of each number, without the metrics of modifiers and the pulls."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("", style="cyan", no_wrap=True)
    for head in ("first", "best", "at step", "last"):
        table.add_column(head, justify="right", no_wrap=True)
    for title, rows in (("", history.steps), ("held out: ", history.evaluations)):
        for name, values in series(rows).items():
            best = best_of(name, values)
            shown = ("", "") if best is None else (f"{best[1]:.4g}", f"{best[0]:,}")
            first, last = f"{values[0][1]:.4g}", f"{values[-1][1]:.4g}"
            table.add_row(Text(title + name), first, *shown, last)
    return table


def series(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The values of each number in rows of the log as (step, value)."""
    names = dict.fromkeys(name for row in rows for name in row)
    shown = [name for name in names if name not in NOT_SHOWN and not name.startswith(LEFT_TO_THE_REPORT)]
    found = {name: [(row["step"], row[name]) for row in rows if is_number(row.get(name))] for name in shown}
    return {name: values for name, values in found.items() if values}


def best_of(name: str, values: list[tuple[int, float]]) -> tuple[int, float] | None:
    """The first step with the best value, and the value; None for a number that is neither good nor bad."""
    if name in HIGH:
        return max(values, key=lambda pair: pair[1])
    if name in LOW or name.startswith(PARTS):
        return min(values, key=lambda pair: pair[1])
    return None


def best_checkpoint(kept: Sequence[tuple[int, Path]], history: History) -> str | None:
    """A sentence about the evaluation with the lowest loss and its checkpoint; None without evaluations.

    The closing evaluation counts only if it covers the same data as those during training.
    """
    if not history.evaluations:
        return None
    best = min(history.evaluations, key=lambda row: row["val_loss"])
    said = f"Lowest validation loss {best['val_loss']:.4f}, after step {best['step']}: "
    folder = dict(kept).get(best["step"])
    if folder is not None:
        return f"{said}{folder}"
    return f"{said}its checkpoint was not kept; the last two are."
