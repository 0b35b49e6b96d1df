"""``write_page``: runs as one HTML file that fetches nothing.

What comes from a run (names, values, tokens, text) is escaped wherever it is put: in markup by
``html.escape``, in the page's data by escaping ``<``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from errno import EEXIST
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from lossmith.report import figures
from lossmith.report.comparison import Table, differing, results
from lossmith.report.figures import Figure
from lossmith.report.reading import Run

# Training rows drawn, of all runs together and of one. plotly.js itself is 4.8 MB of the page.
ALL_ROWS, ROWS, FEWEST_ROWS = 3000, 1000, 100
NUM_HARDEST = 12
GENERATOR = '<meta name="generator" content="lossmith report">'


def write_page(runs: Sequence[Run], path: Path) -> list[str]:
    """Write the page.

    Args:
        runs: at least one.
        path: the file.

    Returns:
        What a reader should know, such as that curves were thinned.

    Raises:
        FileExistsError: there is another file, which is no such page.
        OSError: the file cannot be written.
    """
    if path.exists() and not is_page(path):
        raise FileExistsError(EEXIST, "there is a file that is no page of lossmith's", str(path))
    limit = max(FEWEST_ROWS, min(ROWS, ALL_ROWS // len(runs)))
    thin = [run.thinned(limit) for run in runs]
    notes = [
        f"{run.name}: {run.num_logged:,} logged steps are drawn as {len(run.steps):,}: in every stretch "
        "those with the lowest loss, the highest loss and the largest gradient."
        for run in thin
        if len(run.steps) < run.num_logged
    ]
    names = ", ".join(run.name for run in runs)
    drawn = Drawn()
    body = "\n".join(sections(runs, thin, drawn))
    data = {
        "figures": drawn.figures,
        "steps": [[row["step"] for row in run.steps] for run in thin],
        "evaluations": [[row["step"] for row in run.evaluations] for run in thin],
    }
    holes = {
        "title": escape(f"Training of {names}"),
        "notes": "".join(f'<p class="note">{escape(note)}</p>' for note in notes),
        "filters": filters(thin),
        "body": body,
        "plotly": get_plotlyjs(),
        "data": as_data(data),
    }
    template = resources.files("lossmith.report").joinpath("page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda hole: holes[hole[1]], template)
    path.write_text(page, encoding="utf-8", errors="replace")
    return notes


def is_page(path: Path) -> bool:
    """Whether a file is a page that was written here, and may be overwritten."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return GENERATOR in file.read(2000)


class Drawn:
    """The figures of a page, which its data holds, and cards in their places."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []

    def cards(self, figures: Sequence[Figure], index: int | None = None, name: str = "") -> str:
        """Cards for figures; those of one run can be hidden with it."""
        return "".join(self._card(figure, index, name) for figure in figures)

    def _card(self, figure: Figure, index: int | None, name: str) -> str:
        self.figures.append({"data": figure["data"], "layout": figure["layout"]})
        plot = f'<div class="plot" data-figure="{len(self.figures) - 1}"></div>'
        return card(figure["title"], f'<p class="note">{escape(figure["note"])}</p>{plot}', index, name)


def sections(runs: Sequence[Run], thin: Sequence[Run], drawn: Drawn) -> list[str]:
    """The sections of a page in their order; those that would be empty are left out."""
    known = list(dict.fromkeys(part for run in runs for part in run.parts)) or ["loss"]
    several = len(runs) > 1
    numbered = [(i, run, run.name if several else "") for i, run in enumerate(thin)]
    tables = [compared("What they came to" if several else "What it came to", runs, results(runs))]
    tables += [compared("What differs between the configurations", runs, differing(runs))] if several else []
    # The gap is one of all rows: rows that were thinned are no sample of them.
    of_all = [(runs if figure is figures.gap else thin) for figure in figures.OF_ALL]
    overview = [drawn.cards(figure(of)) for figure, of in zip(figures.OF_ALL, of_all, strict=True)]
    of_parts = [
        drawn.cards([*figures.parts(i, run, known), *figures.pulls(i, run, known)], i, name)
        for i, run, name in numbered
    ]
    of_each = [
        drawn.cards(
            [*figures.modifier_weights(i, run), *figures.measured(i, run), *figures.expert_usage(i, run)],
            i,
            name,
        )
        for i, run, name in numbered
    ]
    analysed = [drawn.cards(figure(thin)) for figure in figures.OF_ALL_ANALYSED]
    return [
        section("Findings", [findings(i, run, name) for i, run, name in numbered]),
        section("Results", tables),
        section("Over time", overview),
        section("Parts of the loss", of_parts, "grid pairs"),
        section("Weights and experts", of_each),
        section("Tokens", analysed),
        section("Hardest tokens", [hardest(i, run, name) for i, run, name in numbered]),
        section("Samples", [sample(i, run, name) for i, run, name in numbered]),
        section("Configuration", [configuration(i, run) for i, run, _ in numbered], ""),
    ]


def section(title: str, cards: Sequence[str], layout: str = "grid") -> str:
    """A title and its cards; nothing if there are none."""
    inside = "".join(cards)
    return f'<h2>{escape(title)}</h2><div class="{layout}">{inside}</div>' if inside else ""


def card(title: str, inside: str, index: int | None = None, name: str = "") -> str:
    """A box with a title, inside of which is markup."""
    of = f' <span class="of">{escape(name)}</span>' if name else ""
    run = "" if index is None else f' data-run="{index}"'
    return f'<section class="card"{run}><h3>{escape(title)}{of}</h3>{inside}</section>'


def filters(runs: Sequence[Run]) -> str:
    """Boxes that choose runs and parts; nothing where there is no choice."""
    parts = list(dict.fromkeys(part for run in runs for part in run.parts))
    of_runs = [(str(i), run.name) for i, run in enumerate(runs)]
    groups = [("run", "Runs", of_runs), ("part", "Parts", [(part, part) for part in parts])]
    shown = []
    for kind, title, boxes in groups:
        if len(boxes) < 2:
            continue
        shown.append(f"<b>{title}</b>")
        for k, (value, name) in enumerate(boxes):
            box = f'<input type="checkbox" name="{kind}" value="{escape(value)}" checked>'
            dot = f'<span class="dot" style="background:{figures.colour(k)}"></span>'
            shown.append(f"<label>{box}{dot}{escape(name)}</label>")
    return f'<nav class="filters"><div>{"".join(shown)}</div></nav>' if shown else ""


def compared(title: str, runs: Sequence[Run], table: Table) -> str:
    """A table with a column a run."""
    if not table:
        return card(title, '<p class="note">Nothing.</p>')
    heads = "".join(f'<th data-run="{i}">{escape(run.name)}</th>' for i, run in enumerate(runs))
    rows = []
    for key, values in table:
        cells = "".join(f'<td data-run="{i}" class="number">{text(v)}</td>' for i, v in enumerate(values))
        rows.append(f"<tr><th>{escape(key)}</th>{cells}</tr>")
    return card(title, f'<div class="scroll"><table><tr><th></th>{heads}</tr>{"".join(rows)}</table></div>')


def findings(index: int, run: Run, name: str) -> str:
    """What was found of a run, in words."""
    items = "".join(f"<li>{escape(finding)}</li>" for finding in run.findings)
    return card("Found", f"<ul>{items}</ul>", index, name) if items else ""


def hardest(index: int, run: Run, name: str) -> str:
    """The hardest tokens in their context."""
    rows = []
    for token in run.analysis.get("hardest", [])[:NUM_HARDEST]:
        context = f"{text(token['before'])}<mark>{text(token['token'])}</mark>{text(token['after'])}"
        predicted = f'<td><span class="token">{text(token["predicted"])}</span></td>'
        nll = f'<td class="number">{token["nll"]:.2f}</td>'
        rows.append(f'<tr>{nll}<td><span class="token">{context}</span></td>{predicted}</tr>')
    if not rows:
        return ""
    head = "<tr><th>nats</th><th>token in context</th><th>most probable</th></tr>"
    num = run.analysis.get("num_tokens")
    note = f'<p class="note">Of {num:,} held-out tokens.</p>' if num else ""
    return card(
        "Hardest tokens",
        f'{note}<div class="scroll"><table class="wide">{head}{"".join(rows)}</table></div>',
        index,
        name,
    )


def sample(index: int, run: Run, name: str) -> str:
    """What the model wrote at the end, or did with a held-out text."""
    written = run.analysis.get("sample", "")
    return card("Sample", f"<pre>{escape(written)}</pre>", index, name) if written else ""


def configuration(index: int, run: Run) -> str:
    """The resolved configuration, folded."""
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{text(value)}</td></tr>" for key, value in run.config.items()
    )
    if not rows:
        return ""
    table = f'<div class="scroll"><table>{rows}</table></div>'
    folded = f"<details><summary>{escape(run.name)}</summary>{table}</details>"
    return f'<div class="card" data-run="{index}">{folded}</div>'


def text(value: str) -> str:
    """Text as markup, with line breaks made visible."""
    return escape(value).replace("\n", "↵")


def as_data(value: Any) -> str:
    """JSON for a script element, which no ``</script>`` in it can end; numbers that are none are null."""
    return json.dumps(_finite(value), separators=(",", ":")).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
