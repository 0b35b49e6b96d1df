"""``settle``: options that a mapping gives under any of their names, each once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lossmith.core.former_names import Former, say_former


def settle(
    values: Mapping[str, Any],
    *,
    owner: str,
    formers: Mapping[str, Former],
    aliases: Mapping[str, str],
    defaults: Mapping[str, Any],
    key_of: Callable[[str], str] = str,
) -> tuple[dict[str, Any], Callable[[str], str]]:
    """The options of a mapping, each once, former names translated; and what the user calls each.

    A configuration may hold both names of an option, where a file of defaults has the one and the user wrote
    the other: then the value that is just the default gives way.

    Args:
        values: the options by any of their names, and whatever else; that is left alone.
        owner: what stands before a former name in messages.
        formers: what stands in place of former names.
        aliases: other names of options.
        defaults: the options' defaults.
        key_of: what the user calls an option.

    Raises:
        ValueError: an option that is gone, or two names of one with different values.
    """
    found: dict[str, tuple[str, Any]] = {}  # option -> the name that the user gave it, and the value
    for given, value in values.items():
        name, former = aliases.get(given, given), formers.get(given)
        if former is not None and former.new is None:
            if type(value) is not type(former.always) or value != former.always:
                raise ValueError(f"{owner}{given}={value!r} is gone; write {former.write}")
            continue
        if former is not None and former.new is not None:
            say_former(f"{owner}{given}", former.write)
            name = former.new
            value = value if former.convert is None else former.convert(value)
        if name in found and name in defaults:
            found[name] = _preferred(found[name], (given, value), defaults[name], key_of)
        else:
            found[name] = given, value
    # converted values are not what the user gave, so that mistakes in them go by the name here
    spelled = {n: given for n, (given, _) in found.items() if given in formers and not formers[given].convert}
    kept = {name if given in formers else given: value for name, (given, value) in found.items()}
    return kept, lambda name: key_of(spelled.get(name, name))


def _preferred(
    first: tuple[str, Any], second: tuple[str, Any], default: Any, key_of: Callable[[str], str]
) -> tuple[str, Any]:
    """Of two names of an option with their values, the one that is not just the default."""
    (one, value), (other, another) = first, second
    if _agree(value, another) or _agree(another, default):
        return first
    if _agree(value, default):
        return second
    raise ValueError(
        f"{key_of(one)} and {key_of(other)} are names of one option; got {value!r} and {another!r}; "
        "give one of them"
    )


def _agree(one: Any, other: Any) -> bool:
    """Whether two values are the same; a bool is no number."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return tuple(one) == tuple(other)
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
