"""``say``: the only way to print to the terminal; it shows control sequences instead of sending them.

File names, flags, samples and error messages may contain escape sequences that rename the window or
overwrite a line, marks that change the direction of writing, and text that `rich` takes for markup.
"""

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.segment import Segment
from rich.text import Span, Text

# Control characters except newline and tab; marks of the direction of writing; other line separators;
# surrogates; invisible tags.
OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
    "\u2028\u2029"
    "\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    r"""The text with characters that a terminal would act on escaped, such as `\x1b`."""
    return OBEYED.sub(spelled_out, text)


def spelled_out(found: re.Match[str]) -> str:
    """A character as Python escapes it."""
    number = ord(found[0])
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def say(console: Console, what: RenderableType = "", style: str | None = None) -> None:
    """Print text, or anything that `rich` prints, literally; text is not wrapped if a pipe has no width."""
    if isinstance(what, str | Text):
        console.print(shown(what), style=style, soft_wrap=True)
    else:
        console.print(shown(what))


def say_error(console: Console, message: str) -> None:
    """Print an error on one line."""
    line = " ".join(visible(message).split("\n"))
    say(console, Text.assemble(("error:", "bold red"), f" {line}"))


@contextlib.contextmanager
def saying_warnings(console: Console) -> Iterator[None]:
    """Print each of Python's warnings once through `say` while entered."""
    said: set[str] = set()

    def show(message: Warning | str, *_: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            say(console, f"warning: {message}", "yellow")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def shown(what: RenderableType) -> RenderableType:
    """A renderable made safe to print."""
    if isinstance(what, str):
        return Text(visible(what))
    if isinstance(what, Text):
        return _shown_text(what)
    if isinstance(what, Panel):
        panel = copy.copy(what)
        panel.renderable = shown(what.renderable)
        return panel
    return _Shown(what)


def _shown_text(text: Text) -> Text:
    """Styled text, with each style on the text that it had."""
    pieces = [visible(character) for character in text.plain]
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    result = text.blank_copy("".join(pieces))
    result.spans = [Span(starts[span.start], starts[span.end], span.style) for span in text.spans]
    return result


@dataclass(frozen=True)
class _Shown:
    """Any other renderable, made visible segment by segment."""

    what: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.what, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
