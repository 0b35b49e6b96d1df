"""``compare`` and ``losses``: tables in the terminal."""

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lossmith.report.comparison import differing, results
from lossmith.report.reading import read_runs
from lossmith.training.errors import UserError
from lossmith.training.run.terminal import say


def show_comparison(console: Console, paths: Sequence[Path]) -> None:
    """Print what runs came to, and where their configurations differ."""
    runs = read_runs(paths)
    names = [run.name for run in runs]
    say(console, table_of("What they came to", ["", *names], [[key, *row] for key, row in results(runs)]))
    if len(runs) > 1:
        say(console)
        rows = [[key, *values] for key, values in differing(runs)]
        if rows:
            say(console, table_of("What differs between the configurations", ["", *names], rows))
        else:
            say(console, "Their configurations are the same.")
    for run in runs:
        for finding in run.findings:
            say(console, f"{run.name}: {finding}")


def show_losses(console: Console, name: str | None) -> None:
    """Print the names of all losses, components and modifiers, or the options of one."""
    known = declared()
    if name is None:
        for title, classes in known.items():
            rows = [[each, first_line(value)] for each, value in classes.items()]
            say(console, table_of(title, None, rows))
            say(console)
        say(console, "lossmith losses NAME lists the options of one of them.")
        return
    everything = {each: value for classes in known.values() for each, value in classes.items()}
    by_lower = {each.lower(): each for each in everything}
    if name.lower() not in by_lower:
        from lossmith.options import nearest

        guess = nearest(name, by_lower)
        hint = f"Did you mean {by_lower[guess]}?" if guess else "`lossmith losses` lists them."
        raise UserError(f"there is no loss, component or modifier {name!r}. {hint}")
    found = everything[by_lower[name.lower()]]
    say(console, inspect.getdoc(found) or "")
    rows = options_in(found)
    if rows:
        say(console)
        say(console, table_of("Options", ["option", "default", "takes", "meaning"], rows))


def declared() -> dict[str, dict[str, type]]:
    """The public losses, components and modifiers, by their kind."""
    import lossmith

    kinds = {
        "Losses": lossmith.Objective,
        "Components": lossmith.Component,
        "Loss modifiers": lossmith.BaseLossModifier,
    }
    found: dict[str, dict[str, type]] = {title: {} for title in kinds}
    for name in dir(lossmith):
        value = getattr(lossmith, name)
        for title, base in kinds.items():
            if isinstance(value, type) and issubclass(value, base) and value is not base:
                found[title][name] = value
    return found


def options_in(found: Any) -> list[list[str]]:
    """A class's options as its signature, or its settings, declare them."""
    from lossmith.options import options_of

    try:
        options = options_of(getattr(found, "Settings", found))
    except TypeError:  # it declares none
        return []
    return [
        [
            spec.name,
            "required" if spec.default is dataclasses.MISSING else repr(spec.default),
            spec.kind.expected,
            spec.meaning,
        ]
        for spec in options.values()
    ]


def first_line(value: Any) -> str:
    """The first sentence of a docstring."""
    return (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ").replace("``", "")


def table_of(title: str, heads: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> Table:
    """A plain table whose cells are text, not markup."""
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.show_header = heads is not None
    for k in range(len(heads if heads is not None else rows[0])):
        table.add_column(Text(heads[k]) if heads else "", style="" if k else "cyan", no_wrap=not k)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
