"""What the site does beyond mkdocs: formulas as MathML, drawings in the colours of the page, the changelog.

The pages need no script and no network for any of it. mkdocs.yml names this file.
"""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OUTSIDE = {"changes.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
LINK = re.compile(r"(?<!!)\[([^]\[]+)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
DRAWING = re.compile(r'<img alt="([^"]*)" src="[^"]*?images/([\w-]+\.svg)"\s*/?>')
OWN_COLOURS = re.compile(r'<style id="alone">.*?</style>\s*', re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Some files outside docs/ are pages of the site. A link to another becomes its path."""
    here = DOCS / page.file.src_uri
    source = ROOT / OUTSIDE[page.file.src_uri] if page.file.src_uri in OUTSIDE else here
    if source != here:
        markdown = source.read_text(encoding="utf-8")
    return LINK.sub(lambda found: _link(found, source.parent, here.parent), markdown)


def _link(found: re.Match[str], written_in: Path, shown_in: Path) -> str:
    """A link as it was written in one folder, for a page that is shown in another."""
    text, target, anchor = found[1], found[2], found[3] or ""
    there = (written_in / target).resolve()
    if not there.exists() or ROOT not in there.parents:
        return found[0]
    path = there.relative_to(ROOT).as_posix()
    there = next((DOCS / page for page, source in OUTSIDE.items() if source == path), there)
    if DOCS in there.parents:
        return f"[{text}]({Path(os.path.relpath(there, shown_in)).as_posix()}{anchor})"
    return text if path in text else f"{text} (`{path}`)"


def on_page_content(content: str, **_: Any) -> str:
    """Formulas become MathML, which browsers draw themselves; drawings become part of the page."""
    return DRAWING.sub(_drawing, FORMULA.sub(_formula, content))


def _formula(found: re.Match[str]) -> str:
    is_block = found[1] == "div"
    drawn = convert(html.unescape(found[2]).strip(), display="block" if is_block else "inline")
    return f'<div class="formula">{drawn}</div>' if is_block else drawn


def _drawing(found: re.Match[str]) -> str:
    """An <img> cannot see which theme the reader chose; an inline drawing takes the colour of the text."""
    file = ROOT / "docs" / "images" / found[2]
    source = file.read_text(encoding="utf-8")
    if 'id="alone"' not in source:
        return found[0]
    drawing = OWN_COLOURS.sub("", source[source.index("<svg") :])
    return f'<span class="drawing">{drawing}</span>'
