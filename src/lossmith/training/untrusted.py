"""Files that anybody may have written: read up to a limit, as UTF-8 text, and as plain values.

Nothing in them is executed. Every text, JSON and YAML file of a run is read here.
"""

import json
import stat
from pathlib import Path
from typing import Any

KIB, MIB, GIB = 2**10, 2**20, 2**30
LARGEST_CONFIG = 128 * KIB
LONGEST_SHOWN = 80  # characters of a value in a message
LARGEST_NUMBER = 10**4000  # Python shows no longer ones
DEEPEST = 8  # lists in lists


class Unreadable(ValueError):
    """What is wrong with a file, in words that follow its name and a colon."""


class NotText(Unreadable):
    """The file is not UTF-8 text."""

    def __init__(self, position: int):
        super().__init__(f"byte {position} is not UTF-8 text")
        self.position = position


def read_bytes(path: Path, largest: int) -> bytes:
    """The content of a regular file of at most `largest` bytes; Unreadable if there is none."""
    try:
        found = path.stat()
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise Unreadable("it is not a regular file")  # a pipe would block, and /dev/zero never ends
        with path.open("rb") as file:
            content = file.read(min(largest, found.st_size) + 1)
    except OSError as error:
        raise Unreadable(error.strerror or type(error).__name__) from None
    except ValueError as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"{error}") from None  # a NUL in its name
    if len(content) > largest:
        raise Unreadable(f"it has {found.st_size:,} bytes, and at most {largest:,} are read")
    return content


def read_text(path: Path, largest: int) -> str:
    """The UTF-8 text, with lines that end in newlines, of a regular file of at most `largest` bytes.

    Raises:
        Unreadable: there is none.
    """
    try:
        text = read_bytes(path, largest).decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotText(error.start) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, largest: int) -> Any:
    """The value in a JSON file; Unreadable if there is none."""
    return parse_json(read_text(path, largest))


def parse_json(text: str) -> Any:
    """The value of a JSON text; Unreadable if it is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise Unreadable("it is nested too deeply") from None
    except ValueError as error:  # also numbers of thousands of digits
        raise Unreadable(shortened(str(error))) from None


def is_moderate(value: Any, depth: int = 0) -> bool:
    """Whether a value has no huge number in it and is not deeply nested."""
    if isinstance(value, list | tuple | set | dict):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return depth < DEEPEST and all(is_moderate(item, depth + 1) for item in items)
    return not isinstance(value, int) or abs(value) <= LARGEST_NUMBER


def shown(value: Any) -> str:
    """A value for a message, shortened."""
    try:
        text = repr(value)
    except (ValueError, RecursionError, MemoryError):  # a number of thousands of digits; deep lists
        return f"a {type(value).__name__} that is too large to show"
    return cut(text)


def shortened(text: str) -> str:
    """A text on one line of a message."""
    return cut(" ".join(text.split()))


def cut(text: str) -> str:
    """The beginning of a text."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 4]} ..."
