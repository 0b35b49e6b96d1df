"""``RawStats``: the raw statistics of a batch, fetched when they are first read, and together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.statistics.raw import GROUP_OF, Needs, ignored_fill, raw_names
from lossmith.engine.sweep import Sweep

# The raw statistics by name: of the logits over the temperature, and of the logits as they are.
ByView = tuple[dict[str, Tensor], dict[str, Tensor]]
# Computes groups of each of the two.
Fetch = Callable[[Needs, "Needs | None"], ByView]
# Groups of each of the two; None where not even the core is wanted.
AskedFor = tuple["Needs | None", "Needs | None"]


class RawStats:
    """The raw statistics [N] of a batch of tokens, fetched when they are first read.

    Two views of the same logits: 0, over the temperature, and 1, as they are. They are one
    where there is no temperature. What is fetched together shares one pass.

    Args:
        sweep: the tokens, and how their logits are read.
        fetch: computes what is not here yet.
        default_needs: groups that come along with the first that was not announced.
    """

    def __init__(self, sweep: Sweep, fetch: Fetch, default_needs: Needs = Needs.CORE) -> None:
        self.sweep = sweep
        self._fetch = fetch
        self._default_needs = default_needs
        self._values: ByView = ({}, {})
        # Names of statistics that are going to be read, of each of the two.
        self.announced: tuple[set[str], set[str]] = (set(), set())

    @property
    def has_temperature(self) -> bool:
        return self.sweep.temperature is not None

    def add(self, needs: Needs | None, needs_unscaled: Needs | None = None) -> None:
        """Fetch what of these groups is not here yet, in one pass."""
        missing, missing_unscaled = self._missing(0, needs), self._missing(1, needs_unscaled)
        if missing is None and missing_unscaled is None:
            return
        fetched = self._fetch(missing or Needs.CORE, missing_unscaled)
        for values, new in zip(self._values, fetched, strict=True):
            values.update({name: v for name, v in new.items() if name not in values})

    def hold(self, known: ByView) -> None:
        """Take what is known already."""
        for values, new in zip(self._values, known, strict=True):
            values.update(new)

    def __getstate__(self) -> dict[str, Any]:
        """The values that are here, without a graph: for pickle and ``copy.deepcopy``."""
        values = tuple({name: value.detach() for name, value in view.items()} for view in self._values)
        return {**self.__dict__, "_values": values, "_fetch": _gone}

    def holds(self, view: int, names: Sequence[str]) -> bool:
        """Whether these raw statistics of a view have been fetched."""
        return all(name in self._values[view] for name in names)

    def has(self, view: int, needs: Needs) -> bool:
        """Whether these groups of a view have been fetched."""
        return self._missing(view, needs) is None

    def _missing(self, view: int, needs: Needs | None) -> Needs | None:
        names = () if needs is None else raw_names(needs)
        groups = [GROUP_OF[name] for name in names if name not in self._values[view]]
        return reduce(or_, groups) if groups else None

    def read(self, view: int, name: str) -> Tensor:
        """A raw statistic, flat; read unannounced, it brings the default groups along."""
        if name not in self._values[view]:
            needs = GROUP_OF[name] if self._values[0] else GROUP_OF[name] | self._default_needs
            self.add(*((needs, None) if view == 0 else (Needs.CORE, needs)))
        return self._values[view][name]

    def restrict(self, targets: Tensor, ignore_index: int, keeps_candidates: bool) -> RawStats:
        """The same, as if only these ``targets`` [N] had been given: elsewhere those of an ignored row."""
        valid = targets != ignore_index

        def fetch(needs: Needs, needs_unscaled: Needs | None) -> ByView:
            self.add(needs, needs_unscaled)
            names = (raw_names(needs), () if needs_unscaled is None else raw_names(needs_unscaled))
            scaled, unscaled = (
                {name: _where(valid, self.read(view, name), name) for name in names[view]} for view in (0, 1)
            )
            return scaled, unscaled

        candidates = self.sweep.candidates if keeps_candidates else None
        sweep = replace(self.sweep, targets=targets, ignore_index=ignore_index, candidates=candidates)
        restricted = RawStats(sweep, fetch)
        restricted.announced = self.announced
        return restricted


def _gone(needs: Needs, needs_unscaled: Needs | None) -> Any:
    raise RuntimeError(
        "a copy of statistics has those that were computed before it was made, and not the logits; name what "
        "you need with stats.compute(...) before"
    )


def _where(valid: Tensor, value: Tensor, name: str) -> Tensor:
    """A raw statistic at the valid positions, and that of an ignored one elsewhere."""
    valid = valid if value.dim() == 1 else valid.unsqueeze(-1)
    return torch.where(valid, value, ignored_fill(name))
