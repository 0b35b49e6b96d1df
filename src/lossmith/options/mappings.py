"""``read_options``: turns a mapping, such as a configuration, into a dataclass of options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lossmith.options.forms import WrongForm
from lossmith.options.kinds import Kind
from lossmith.options.matching import unknown_option
from lossmith.options.signatures import options_of

D = TypeVar("D")


def read_options(
    kind: type[D],
    values: Mapping[str, Any],
    *,
    owner: str,
    aliases: Mapping[str, str] | None = None,
    key_of: Callable[[str], str] = str,
) -> D:
    """Turn a mapping into a dataclass of options, checked.

    Args:
        kind: the dataclass; its fields are annotated with :func:`lossmith.options.option`. If it has a method
            ``check``, it is called with ``key_of`` and raises for values that contradict each other.
        values: the options by name; missing ones take their defaults.
        owner: whose options they are, for messages.
        aliases: other names of options.
        key_of: gives the user's name for an option.

    Raises:
        ValueError: an unknown option, one given under two names, or a value out of range.
        TypeError: a value of the wrong type.
    """
    declared = options_of(kind)
    read: dict[str, Any] = {}
    for given, value in values.items():
        name = (aliases or {}).get(given, given)
        if name not in declared:
            raise ValueError(unknown_option(owner, key_of(given), [key_of(known) for known in declared]))
        if name in read:
            both = [key_of(other) for other in values if (aliases or {}).get(other, other) == name]
            raise ValueError(f"{' and '.join(both)} are names of one option; give one of them")
        read[name] = _read(declared[name].kind, value, key_of(given))
    options = kind(**read)
    check = getattr(options, "check", None)
    if check is not None:
        check(key_of)
    return options


def check_order(options: Any, low: str, high: str, key_of: Callable[[str], str] = str) -> None:
    """
    Raises:
        ValueError: the option named ``low`` is above the one named ``high``.
    """
    values = getattr(options, low), getattr(options, high)
    if values[0] > values[1]:
        names = key_of(low), key_of(high)
        raise ValueError(
            f"{names[0]}={values[0]:g} is above {names[1]}={values[1]:g}; expected {names[0]} <= {names[1]}"
        )


def _read(kind: Kind, value: Any, key: str) -> Any:
    try:
        taken = kind.take(value, as_written=True)
    except WrongForm as wrong:
        raise TypeError(
            f"{key} expects {kind.said}; got {wrong.came!r} ({type(wrong.came).__name__})"
        ) from None
    if not kind.holds(taken):
        raise ValueError(f"{key}={value!r} is out of range; expected {key} {kind.limits}")
    return taken
