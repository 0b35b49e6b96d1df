"""Options: declared with their range, read from a mapping; a mistake is an error that names the option."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from os import PathLike
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

F = TypeVar("F", bound=Callable[..., Any])
D = TypeVar("D")


# What other libraries call the same thing.
SYNONYMS = {
    "input": "logits",
    "target": "targets",
    "labels": "targets",
    "weight": "class_weight",
    "weights": "token_weight",
    "attention_mask": "mask",
    "num_items_in_batch": "denominator",
    "z_loss_coefficient": "z_loss",
    "lse_square_scale": "z_loss",
    "gamma": "focal_gamma",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` was probably meant to be."""
    known = list(known)
    if SYNONYMS.get(name) in known:
        return SYNONYMS[name]
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return found[0] if found else None


def unknown_option(owner: str, name: str, known: Iterable[str]) -> str:
    """What to say of an option that ``owner`` does not have."""
    known = sorted(known)
    guess = nearest(name, known)
    hint = f"Did you mean {guess!r}?" if guess else f"It has {', '.join(known)}"
    return f"{owner} has no option {name!r}. {hint}"


def strict_options(function: F) -> F:
    """Let ``function`` answer an unknown keyword with the nearest name it knows.

    Raises:
        TypeError: from the wrapped function, when called with an unknown keyword.
    """
    owner = function.__qualname__.removesuffix(".__init__")
    keywords = [p.name for p in inspect.signature(function).parameters.values() if p.name != "self"]
    known = frozenset(keywords)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in known:
                raise TypeError(unknown_option(owner, name, known))
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


# ── options that a mapping gives: declared once, with their meaning and range ─────────────────────


def option(default: Any, meaning: str, **limits: Any) -> Any:
    """Declare one option as a dataclass field.

    Args:
        default: its value when nobody sets it.
        meaning: one line for documentation.
        limits: `low` and `high` (both allowed), `above` and `below` (not allowed themselves), or
            `choices`, a tuple of the allowed values.
    """
    return field(default=default, metadata={"meaning": meaning, **limits})


def range_problem(value: Any, limits: Mapping[str, Any]) -> str | None:
    """What was expected of a value that is outside the declared limits, or None."""
    choices = limits.get("choices")
    if choices:
        return None if value in choices else f"one of {', '.join(map(repr, choices))}"
    bounds = {
        "low": (">=", operator.ge),
        "above": (">", operator.gt),
        "high": ("<=", operator.le),
        "below": ("<", operator.lt),
    }
    stated = [(sign, holds, limits[name]) for name, (sign, holds) in bounds.items() if name in limits]
    if not stated or (math.isfinite(value) and all(holds(value, bound) for _, holds, bound in stated)):
        return None
    return " and ".join(f"{sign} {bound:g}" for sign, _, bound in stated)


def option_types(kind: type) -> dict[str, Any]:
    """The type of each option; one of a few texts is text."""
    hints = get_type_hints(kind)
    return {name: str if get_origin(hint) is Literal else hint for name, hint in hints.items()}


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


def read_options(
    kind: type[D],
    values: Mapping[str, Any],
    *,
    owner: str,
    aliases: Mapping[str, str] | None = None,
    key_of: Callable[[str], str] = str,
) -> D:
    """A mapping as a dataclass of options, checked.

    Args:
        kind: the dataclass; its fields are declared with :func:`option`. If it has a method ``check``, it
            is called with ``key_of`` and raises for values that do not go together.
        values: the options by name; what is not there has its default.
        owner: whose options they are, for messages.
        aliases: other names of options.
        key_of: what the user calls an option.

    Raises:
        ValueError: an unknown option, one given under two names, or a value out of range.
        TypeError: a value of another type.
    """
    hints = option_types(kind)
    specs = {spec.name: spec for spec in fields(kind)}  # type: ignore[arg-type]
    read: dict[str, Any] = {}
    for given, value in values.items():
        name = (aliases or {}).get(given, given)
        if name not in specs:
            raise ValueError(unknown_option(owner, key_of(given), [key_of(known) for known in specs]))
        if name in read:
            both = [key_of(other) for other in values if (aliases or {}).get(other, other) == name]
            raise ValueError(f"{' and '.join(both)} are names of one option; give one of them")
        read[name] = _typed(value, hints[name], key_of(given))
        problem = range_problem(read[name], specs[name].metadata)
        if problem:
            raise ValueError(f"{key_of(given)}={value!r} is out of range; expected {key_of(given)} {problem}")
    options = kind(**read)
    check = getattr(options, "check", None)
    if check is not None:
        check(key_of)
    return options


def _typed(value: Any, wanted: Any, key: str) -> Any:
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        value = value.item()  # a scalar of numpy is a number
    if wanted is bool and isinstance(value, bool):
        return value
    if wanted is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if wanted is str and isinstance(value, str | PathLike):
        return str(value)
    if wanted == tuple[int, ...]:
        return _ids(value, key)
    if wanted is Any:
        return value
    expected = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}[wanted]
    raise TypeError(f"{key} expects {expected}; got {value!r} ({type(value).__name__})")


def _ids(value: Any, key: str) -> tuple[int, ...]:
    """Ids as a list, or as text with commas between them."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.strip("[]() ").split(",") if part.strip()]
        value = [int(part) if part.lstrip("-").isdigit() else part for part in parts]
    items = list(value) if isinstance(value, Iterable) else [value]
    wrong = [item for item in items if isinstance(item, bool) or not isinstance(item, int)]
    if wrong:
        raise TypeError(f"{key} expects token ids, as a list or as text with commas; got {wrong[0]!r}")
    return tuple(items)
