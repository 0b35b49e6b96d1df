"""``@statistic``: a property of ``TokenStats`` that is computed once, and what a term declared of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.statistics.raw import Needs
from lossmith.engine.statistics.raw_stats import AskedFor

# Before the name of a statistic at temperature 1.
UNSCALED = "unscaled."

# From, and up to but without. No slice: torch.compile of PyTorch 2.11 cannot keep one in a frozen dataclass.
Columns = tuple[int, "int | None"]


class Statistic:
    """A property of ``TokenStats`` that is computed once; and once more where it was first read under
    ``no_grad``, and then for a gradient.

    ``functools.cached_property`` takes a lock in Python 3.11, which ``torch.compile`` cannot trace.
    """

    def __init__(self, function: Callable[[Any], Tensor], needs: Needs = Needs.CORE) -> None:
        self.function = function
        self.name = function.__name__
        self.needs = needs

    def __get__(self, owner: Any, kind: type) -> Tensor:
        if owner is None:
            return self  # type: ignore[return-value]
        known = owner.__dict__ if torch.is_grad_enabled() else owner._without_gradient
        if self.name not in known:
            together = None
            if owner._attached is None and owner._declared is None:
                together = owner._derive_with(self.name, known)
            if together is None:
                together = {self.name: self._of(owner)}
            for name, value in together.items():  # torch.compile before PyTorch 2.13 knows no update here
                known[name] = value
        return known[self.name]

    def _of(self, owner: Any) -> Tensor:
        if owner._attached is not None:
            return getattr(owner._attached, self.name).detach()
        view = owner._declared
        if view is None:
            return self.function(owner)
        view.check(self.name, owner._view)
        value = getattr(view.whole, self.name)  # computed there, once for every term
        return value[..., slice(*view.columns)] if self.needs & Needs.CANDIDATES else value


def derived(function: Callable[[Any], Tensor]) -> Statistic:
    """A private statistic, from which the public ones are computed."""
    return Statistic(function)


def statistic(needs: Needs) -> Callable[[Callable[[Any], Tensor]], Statistic]:
    """A public statistic, made of these groups of raw ones."""
    return lambda function: Statistic(function, needs)


def read_at(name: str, has_temperature: bool, view: int = 0) -> tuple[int, str]:
    """At which of the two temperatures a name, ``unscaled.`` or not, is read if others are at ``view``; and
    the name there."""
    own = name.removeprefix(UNSCALED)
    return int(has_temperature and (own != name or view == 1)), own


def groups_of(
    names: Iterable[str], statistics: Mapping[str, Statistic], has_temperature: bool, view: int = 0
) -> AskedFor:
    """The groups, of each temperature, that the named statistics are made of."""
    found: list[Needs | None] = [None, None]
    for name in names:
        at, own = read_at(name, has_temperature, view)
        found[at] = (found[at] or Needs.CORE) | statistics[own].needs
    return found[0], found[1]


@dataclass(frozen=True)
class Declared:
    """What a term that has declared its reads sees of all statistics.

    Attributes:
        whole: where they are computed.
        names: what was declared, ``unscaled.`` before what is of temperature 1; None for everything.
        columns: the term's own of the candidates.
    """

    whole: Any
    names: frozenset[str] | None
    columns: Columns

    def check(self, name: str, view: int) -> None:
        """
        Raises:
            UndeclaredRead: it was not declared.
        """
        if self.names is None or (name in self.names and view == 0) or UNSCALED + name in self.names:
            return
        raise UndeclaredRead(UNSCALED + name if view == 1 else name)


class UndeclaredRead(Exception):
    """A term reads a statistic that it did not declare.

    Args:
        name: of the statistic.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"{name!r} is read but not declared")
        self.name = name
