"""Unknown options are errors that name the nearest known one."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


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
