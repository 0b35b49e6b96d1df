"""Draws the results of benchmarks/head.py: a bar of time for each contender, its memory beside it.

    python benchmarks/plot_head.py benchmarks/results/head-cpu.csv docs/images/head-cpu.svg

Needs matplotlib, which nothing else here does.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict

import matplotlib.pyplot as plt

OURS, THEIRS = "#0b6e4f", "#8d99ae"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
WIDEST = 4.0  # longer bars are cut off, and their number says how long they are


def main(source: str, target: str) -> None:
    plt.rcParams["svg.fonttype"] = "none"  # letters, not outlines
    with open(source) as file:
        about, *lines = file.read().splitlines()
    panels: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in csv.DictReader(lines):
        if row["name"] != "three matrix products":
            panels[row["shape"], row["dtype"]].append(row)
    shapes = list(dict.fromkeys(shape for shape, _ in panels))
    figure, axes = plt.subplots(
        len(shapes), 2, figsize=(12, 2.9 * len(shapes)), squeeze=False, sharex=True, layout="constrained"
    )
    for (shape, dtype), rows in panels.items():
        axis = axes[shapes.index(shape), int(dtype == "bfloat16")]
        draw(axis, rows)
        num_tokens, size, num_classes = shape.split(",")
        axis.set_title(f"N={num_tokens}, D={size}, V={num_classes}, {dtype}", fontsize=10)
        if dtype == "bfloat16":
            axis.set_yticklabels([])
    figure.supxlabel(
        "time over that of the three matrix products; MiB besides inputs and gradients", fontsize=9
    )
    figure.suptitle(about.strip('# "'), fontsize=8, color="#555555")
    figure.savefig(target, metadata={"Date": None} if target.endswith("svg") else None)


def draw(axis: plt.Axes, rows: list[dict[str, str]]) -> None:
    """One panel: a bar a contender, the first on top."""
    times = [float(row["x_products"]) for row in rows]
    colors = [OURS if row["name"].startswith("lossmith") else THEIRS for row in rows]
    axis.barh(range(len(rows)), [min(time, WIDEST) for time in times], color=colors, height=0.7)
    for y, (row, time) in enumerate(zip(rows, times, strict=True)):
        text = f"{time:.2f}   {float(row['extra_mib']):.0f} MiB"
        axis.text(min(time, WIDEST) + 0.05, y, text, va="center", fontsize=7, bbox=PAPER)
    axis.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, WIDEST + 1)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main(*sys.argv[1:])
