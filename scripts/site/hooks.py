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
    if page.file.src_uri in OUTSIDE:
        markdown = (ROOT / OUTSIDE[page.file.src_uri]).read_text(encoding="utf-8")
        markdown = markdown.replace("](docs/", "](")
    folder = (DOCS / page.file.src_uri).parent
    return LINK.sub(lambda found: _link(found, folder), markdown)


def _link(found: re.Match[str], folder: Path) -> str:
    there = (folder / found[2]).resolve()
    if DOCS in there.parents or not there.exists():
        return found[0]
    path = there.relative_to(ROOT).as_posix()
    page = next((page for page, source in OUTSIDE.items() if source == path), None)
    if page is not None:
        return f"[{found[1]}]({os.path.relpath(DOCS / page, folder)}{found[3] or ''})"
    return found[1] if path in found[1] else f"{found[1]} (`{path}`)"


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
