"""``StepLine``: what a logged step shows, in columns that keep their places from line to line."""

import math
from collections.abc import Sequence
from typing import Any

from lossmith.training.run.findings import PARTS, is_number, shares_of
from lossmith.training.tasks.measures import Figure

GAP, INDENT = "  ", "    "
ROOM = len(" 1.23e-05 (12.3%)")  # after the name of a part


class StepLine:
    """Lays out the figures of a step, its parts and their shares.

    A column is as wide as the widest cell in it so far; that of a part has room for most values. What
    exceeds the width goes on in the next line, where the parts have columns of one width.
    """

    def __init__(self) -> None:
        self.widths: dict[str, int] = {}

    def text(self, step: str, figures: Sequence[str], row: dict[str, Any], width: int) -> str:
        """The line, or lines, of a row of the log.

        Args:
            step: how far the run is, of constant width.
            figures: the measures in words.
            row: the row of the log, whose parts are shown.
            width: columns of the terminal.
        """
        cells = [self._padded(str(k), figure) for k, figure in enumerate(figures)]
        cells += [self._padded("nll", nll) for nll in plain_loss(row)]
        head = GAP.join([step, *cells])
        parts = [self._padded(name, cell) for name, cell in parts_of(row).items()]
        first = GAP.join([head, *parts])
        if len(first.rstrip()) <= width or not parts:
            return first.rstrip()
        column = max(map(len, parts))
        num = max(1, (width - len(INDENT) + len(GAP)) // (column + len(GAP)))
        columns = [part.ljust(column) for part in parts]
        below = [INDENT + GAP.join(columns[k : k + num]) for k in range(0, len(columns), num)]
        return "\n".join(line.rstrip() for line in (head, *below))

    def _padded(self, name: str, cell: str) -> str:
        least = len(name) + ROOM if name.startswith(PARTS) else 0
        self.widths[name] = max(self.widths.get(name, least), len(cell))
        return cell.ljust(self.widths[name])


def plain_loss(row: dict[str, Any]) -> list[str]:
    """The negative log-likelihood in words, where parts are added to it."""
    is_shown = shares_of(row) and is_number(row.get("perplexity"))
    return [f"nll {math.log(row['perplexity']):.3f}"] if is_shown else []


def parts_of(row: dict[str, Any]) -> dict[str, str]:
    """Each part with its share, in words."""
    shares = shares_of(row)
    cells = {}
    for name in row:
        if name.startswith(PARTS):
            share = f" ({shares[name]:.1%})" if shares else ""
            cells[name] = Figure(name, f"{name} {{:.3g}}").of(row) + share
    return cells
