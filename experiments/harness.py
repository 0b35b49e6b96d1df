"""What every experiment shares: comparing arms over seeds, and training a small model.

An experiment is a file with `ARMS` (a name for every setting that is compared), `trial(seed, options)`, which
trains and measures one of them, and a last line `compare(__file__, ARMS, trial)`. All arms of a seed have the
same start and see the same data, and they take turns within a seed.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def compare(
    file: str, arms: Mapping[str, Any], trial: Callable[[int, Any], Mapping[str, float]], seeds: int = 3
) -> None:
    """Run every arm on every seed, print a table and write it to `results/NAME.csv`."""
    parser = argparse.ArgumentParser(description=f"Runs the arms {', '.join(arms)} on every seed.")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--csv", type=Path, default=RESULTS / f"{Path(file).stem}.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for seed in range(options.seeds):
        for arm, settings in arms.items():
            start = time.perf_counter()
            found = trial(seed, settings)
            rows.append({"arm": arm, "seed": seed, **found})
            shown = "  ".join(f"{metric} {value:.4g}" for metric, value in found.items())
            print(f"  seed {seed}  {arm:24} {shown}  ({time.perf_counter() - start:.1f} s)", flush=True)
    write(options.csv, rows)
    print("\n" + table(rows))


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in rows)


def read(path: Path) -> list[Row]:
    with open(path, newline="") as file:
        header, *lines = csv.reader(file)
    return [{"arm": line[0], **dict(zip(header[1:], map(float, line[1:]), strict=True))} for line in lines]


def values(rows: Iterable[Row], arm: str, metric: str) -> list[float]:
    """What the seeds of an arm gave."""
    return [row[metric] for row in rows if row["arm"] == arm]


def shown(number: float) -> str:
    """Three digits, or as many as a number above 1000 has: 0.0312, 4.71, 1204."""
    if not math.isfinite(number):
        return str(number)
    digits = 0 if number == 0 else math.floor(math.log10(abs(number)))
    return f"{number:.{min(max(2 - digits, 0), 6)}f}"


def table(rows: list[Row]) -> str:
    """Means of the seeds in Markdown, with the lowest and the highest."""
    metrics = [name for name in rows[0] if name not in ("arm", "seed")]
    heads = [metric.replace("|", r"\|") for metric in metrics]
    lines = [f"| | {' | '.join(heads)} |", "| --- |" + " --- |" * len(metrics)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = []
        for metric in metrics:
            found = values(rows, arm, metric)
            cells.append(f"{shown(fmean(found))} ({shown(min(found))} to {shown(max(found))})")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fit(
    parameters: Iterable[torch.nn.Parameter], loss_of: Callable[[int], Tensor], steps: int, lr: float = 3e-3
) -> None:
    """Adam with a short warm-up and a cosine to 0, on the loss of every step."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for step in range(steps):
        loss_of(step).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
