"""What the value of a key can be, and how what somebody wrote becomes one."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TOKEN_IDS = tuple[int, ...]
PAIR = tuple[float, float]
SHARES = float | tuple[float, ...] | None


@dataclass(frozen=True)
class KeyType:
    """One type of key.

    Attributes:
        said: what it is, for messages.
        read: a value of that type, of what was written; ValueError where it is none.
        example: for messages, where the key's default shows nothing.
    """

    said: str
    read: Callable[[Any], Any]
    example: Any = None


def _exactly(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError
        return value

    return read


def _whole(value: Any) -> int:
    """A whole number may be spelled 3.0 or 1e3."""
    return int(value) if isinstance(value, float) and value.is_integer() else _exactly(int)(value)


def _number(value: Any) -> float:
    if type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    return _exactly(float)(value)


def _several(read: Callable[[Any], Any], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError
    return tuple(read(item) for item in value)


def _token_ids(value: Any) -> tuple[int, ...]:
    return _several(_exactly(int), [value] if type(value) is int else value)


def _pair(value: Any) -> tuple[float, ...]:
    numbers = _several(_number, value)
    if len(numbers) != 2:
        raise ValueError
    return numbers


def _shares(value: Any) -> float | tuple[float, ...]:
    return _several(_number, value) if isinstance(value, list | tuple) else _number(value)


def _or_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


KEY_TYPES: dict[Any, KeyType] = {
    int: KeyType("a whole number", _whole),
    float: KeyType("a number", _number),
    bool: KeyType("True or False", _exactly(bool)),
    str: KeyType("text", _exactly(str)),
    int | None: KeyType("a whole number or None", _or_none(_whole), 2),
    TOKEN_IDS: KeyType("token ids", _token_ids, [0, 1, 2]),
    PAIR: KeyType("two numbers", _pair),
    SHARES: KeyType("a number, a list of numbers or None", _or_none(_shares), [0.5, 0.25, 0.25]),
}
