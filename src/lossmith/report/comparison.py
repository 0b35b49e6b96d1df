"""What several runs came to, and what differs between their configurations."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from lossmith.report.reading import Run

# Keys that say where a run is, not what it is.
OF_THE_PLACE = ("out_dir", "resume", "eval_only")
Table = list[tuple[str, list[str]]]


def differing(runs: Sequence[Run]) -> Table:
    """The keys whose values are not the same in all runs, with the value in each."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [(key, [run.config.get(key, "-") for run in runs]) for key in keys if key not in OF_THE_PLACE]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def results(runs: Sequence[Run]) -> Table:
    """What each run came to; measures that no run has are left out."""
    rows = [(name, [measure(run) for run in runs]) for name, measure in MEASURES.items()]
    return [(name, values) for name, values in rows if set(values) != {"-"}]


def gaps(run: Run) -> list[tuple[int, float | None]]:
    """At every evaluation the validation loss less the plain training loss since the evaluation before:
    what the model knows of the training text alone. None where no perplexity was logged."""
    found: list[tuple[int, float | None]] = []
    steps = [row["step"] for row in run.steps]
    first = 0
    for row in run.evaluations:
        end = bisect_right(steps, row["step"])
        logged = [value for each in run.steps[first:end] if (value := each.get("perplexity") or 0) > 0]
        plain = sum(map(math.log, logged)) / len(logged) if logged else None
        val = row["val_loss"]
        found.append((row["step"], None if plain is None or val is None else val - plain))
        first = end
    return found


def _last(key: str, form: str) -> Callable[[Run], str]:
    """The value in the last evaluation."""
    return lambda run: _shown(run.evaluations[-1].get(key) if run.evaluations else None, form)


def _analysed(*path: str) -> Callable[[Run], str]:
    def measure(run: Run) -> str:
        value: Any = run.analysis
        for key in path:
            value = value.get(key, {})
        return _shown(value if isinstance(value, int | float) else None, "{:.3f}")

    return measure


def _best(run: Run) -> str:
    found = [(row["val_loss"], row["step"]) for row in run.evaluations if row["val_loss"] is not None]
    return "{:.4f} at step {:,}".format(*min(found)) if found else "-"


def _gap(run: Run) -> str:
    return _shown(next((gap for _, gap in reversed(gaps(run)) if gap is not None), None), "{:+.3f}")


def _first(run: Run) -> str:
    """The plain loss of the first step against a uniform guess's."""
    plain = run.steps[0].get("perplexity") if run.steps else None
    uniform = run.analysis.get("uniform_loss")
    if not plain or uniform is None:
        return "-"
    return f"{math.log(plain):.3f} (a guess: {uniform:.3f})"


def _speed(run: Run) -> str:
    speeds = [row["tokens_per_second"] for row in run.steps if row.get("tokens_per_second")]
    return f"{median(speeds):,.0f}" if speeds else "-"


def _repeats(run: Run) -> str:
    """How much the sample repeats itself, and how much the text does."""
    found = run.analysis.get("repetition")
    return "{seq_rep_4:.3f} (the text: {text_seq_rep_4:.3f})".format(**found) if found else "-"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


MEASURES: dict[str, Callable[[Run], str]] = {
    "last step": lambda run: f"{run.steps[-1]['step']:,}" if run.steps else "-",
    "loss at the first step": _first,
    "validation loss": _last("val_loss", "{:.4f}"),
    "best validation loss": _best,
    "perplexity": _last("perplexity", "{:,.2f}"),
    "bits per byte": _last("bits_per_byte", "{:.4f}"),
    "accuracy": _last("accuracy", "{:.1%}"),
    "F1": _last("f1", "{:.3f}"),
    "correlation": _last("correlation", "{:.3f}"),
    "mean absolute error": _last("mean_absolute_error", "{:.4f}"),
    "validation less training loss": _gap,
    "calibration error (ECE)": _analysed("calibration", "ece"),
    "entropy of the predictions": _analysed("entropy"),
    "seq-rep-4 of the sample": _repeats,
    "tokens per second (median)": _speed,
}
