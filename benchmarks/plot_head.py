"""Draws the results of benchmarks/head.py: time against memory, a panel for each shape and dtype.

    python benchmarks/plot_head.py benchmarks/results/head-cpu.csv docs/images/head-cpu.svg

Needs matplotlib, which nothing else here does.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

LEAST_MIB = 1.0  # what is drawn for nothing: the axis is logarithmic
OURS, THEIRS = "#0b6e4f", "#8d99ae"


def main(source: str, target: str) -> None:
    with open(source) as file:
        about, *lines = file.read().splitlines()
    panels: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in csv.DictReader(lines):
        panels[row["shape"], row["dtype"]].append(row)
    shapes = list(dict.fromkeys(shape for shape, _ in panels))
    figure, axes = plt.subplots(
        len(shapes), 2, figsize=(11, 3.6 * len(shapes)), squeeze=False, layout="constrained"
    )
    for (shape, dtype), rows in panels.items():
        axis = axes[shapes.index(shape)][dtype == "bfloat16"]
        draw(axis, rows)
        num_tokens, size, num_classes = shape.split(",")
        axis.set_title(f"N={num_tokens}, D={size}, V={num_classes}, {dtype}", fontsize=10)
    figure.supxlabel("time over that of the three matrix products", fontsize=10)
    figure.supylabel("MiB besides inputs and gradients", fontsize=10)
    figure.suptitle(about.removeprefix("# "), fontsize=8, color="#555555")
    figure.savefig(target, metadata={"Date": None})


def draw(axis: plt.Axes, rows: list[dict[str, str]]) -> None:
    """One panel: a dot a contender."""
    for row in rows:
        if row["name"] == "three matrix products":
            continue
        is_ours = row["name"].startswith("lossmith")
        x, y = float(row["x_products"]), max(float(row["extra_mib"]), LEAST_MIB)
        axis.scatter(x, y, color=OURS if is_ours else THEIRS, s=28, zorder=2)
        axis.annotate(
            row["name"].removeprefix("lossmith, "),
            (x, y),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=7,
            color=OURS if is_ours else "#333333",
        )
    axis.axvline(1, color="#cccccc", linewidth=1, zorder=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    axis.minorticks_off()
    axis.grid(color="#eeeeee", zorder=0)
    axis.margins(x=0.2, y=0.15)


if __name__ == "__main__":
    main(*sys.argv[1:])
