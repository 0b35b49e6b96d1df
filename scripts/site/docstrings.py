"""Docstrings of the source as the reference shows them: as Markdown.

The source writes references as ``:class:`lossmith.Term` ``, code in double backticks, several arguments in
one line, and one ``Example:`` of doctest lines. Formulas come from formulas.md, in the place of those that
the docstring spells out in characters.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

HERE = Path(__file__).parent
ROLE = re.compile(r":\w+:`~?(?:lossmith\.)?([\w.]+)`")
CODE = re.compile(r"``([^`]+)``")
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Example):\n((?:    .*\n|\n)*)", re.MULTILINE)
SPELT_OUT = re.compile(r"\n\n((?:    .*\n?)+)")
REFERENCE = HERE.parents[1] / "docs" / "reference"
SHOWN = set(re.findall(r"^::: ([\w.]+)", "\n".join(p.read_text() for p in REFERENCE.glob("*.md")), re.M))
FORMULAS = dict(
    re.findall(r"^## (\w+)\n\n(.*?)(?=\n## |\Z)", (HERE / "formulas.md").read_text(), re.M | re.S)
)


def as_markdown(text: str, formula: str | None = None) -> str:
    """A docstring as Markdown, with a formula after its first paragraph."""
    text = CODE.sub(r"`\1`", ROLE.sub(_name, inspect.cleandoc(text))) + "\n"
    at = next((found.start() for found in SECTION.finditer(text)), len(text))
    head, sections = text[:at], text[at:]
    if formula is not None:
        first, _, rest = SPELT_OUT.sub("\n", head).strip().partition("\n\n")
        head = f"{first}\n\n{formula}\n\n{rest}\n\n"
    return head + SECTION.sub(_section, sections)


def _name(found: re.Match[str]) -> str:
    """A name, as a link if the reference shows it."""
    name = found[1]
    return f"[`{name}`][lossmith.{name}]" if f"lossmith.{name}" in SHOWN else f"`{name}`"


def _section(found: re.Match[str]) -> str:
    title, body = found[1], textwrap.dedent(found[2]).strip("\n")
    if title == "Example":
        return f"**Example**\n\n```pycon\n{body}\n```\n\n"
    if title in ("Returns", "Yields"):
        return f"**{title}**\n\n{body}\n\n"
    # An entry begins at the left edge and goes on indented.
    entries = [re.sub(r"\s+", " ", entry) for entry in re.split(r"\n(?=\S)", body)]
    return f"**{title}**\n\n" + "\n".join(map(_entry, entries)) + "\n\n"


def _entry(entry: str) -> str:
    names, colon, meaning = entry.partition(": ")
    if not colon or re.search(r"[^\w,. *]", names):
        return f"- {entry}"
    return f"- {', '.join(f'`{name}`' for name in names.split(', '))}: {meaning}"


class Docstrings(griffe.Extension):
    """Rewrites every docstring that is shown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            formula = FORMULAS.get(obj.name) if obj.is_class or obj.is_function else None
            obj.docstring.value = as_markdown(obj.docstring.value, formula)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Functions that take the options of an objective show them one by one; and every option its type."""
        options = [
            parameter
            for parameter in pkg["objectives.cross_entropy.CrossEntropyLoss"].parameters
            if parameter.name not in ("self", "options")
        ]
        for name in ("cross_entropy", "linear_cross_entropy"):
            function = pkg[f"functional.{name}"]
            own = [parameter for parameter in function.parameters if parameter.name != "options"]
            names = {parameter.name for parameter in own}
            function.parameters = griffe.Parameters(
                *own, *(parameter for parameter in options if parameter.name not in names)
            )
        for function in functions(pkg):
            for parameter in function.parameters:
                parameter.annotation = plain(parameter.annotation, pkg)


def functions(scope: griffe.Module | griffe.Class) -> Iterator[griffe.Function]:
    """Every function and method below a module."""
    for member in scope.members.values():
        if isinstance(member, griffe.Function):
            yield member
        elif isinstance(member, griffe.Module | griffe.Class):
            yield from functions(member)


def plain(hint: Any, pkg: griffe.Module) -> Any:
    """A type in place of its alias: options are ``Annotated[float, option(...)]``, and have a name."""
    if isinstance(hint, griffe.ExprBinOp):
        return dataclasses.replace(hint, left=plain(hint.left, pkg), right=plain(hint.right, pkg))
    if isinstance(hint, griffe.ExprName) and hint.canonical_path.startswith("lossmith."):
        path = hint.canonical_path.removeprefix("lossmith.")
        declared = pkg[path].value if _has(pkg, path) else None
        return plain(declared, pkg) if isinstance(declared, griffe.ExprSubscript) else hint
    if isinstance(hint, griffe.ExprSubscript) and hint.canonical_name == "Annotated":
        inside = hint.slice
        return plain(inside.elements[0] if isinstance(inside, griffe.ExprTuple) else inside, pkg)
    return hint


def _has(pkg: griffe.Module, path: str) -> bool:
    """Whether a path is that of an attribute of a module."""
    try:
        return isinstance(pkg[path], griffe.Attribute)
    except KeyError:
        return False
