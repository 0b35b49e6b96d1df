"""``Sweep``: which statistics of a batch of logits to compute, and how the logits are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.checks import check_ids
from lossmith.engine.statistics.raw import Needs, View, ignored_fill, raw_dtype, raw_names

Rows = slice | Tensor
Maybe = Sequence["Tensor | None"]

# What the backward reads of the statistics; the rest it can do without.
SAVED = ("reference", "wrong_log_sum", "wrong_entropy", "top_wrong_id", "rest_log_sum")


# Hashed by identity: torch.compile of PyTorch 2.11 hashes what it calls.
@dataclass(frozen=True, eq=False)
class Sweep:
    """Which statistics of logits [N, V] to compute.

    The logits are read as z <- softcap tanh(z / softcap), then over the temperature.

    The operators take its fields one by one, in this order, ``backend`` by name.

    Attributes:
        targets: [N] int64 ids. A row of ``ignore_index`` is not read: its statistics are those of a token
            that the model gets right with certainty (all 0, ``wrong_log_sum`` -inf), its gradient exactly 0.
        candidates: [N, K] int64 ids to read the logits of, -1 as padding; or None.
        class_weight: [V], or None.
        temperature: 0-dimensional, or None for 1.
        softcap: c, or None.
        ignore_index: see ``targets``.
        needs: groups of statistics (:class:`Needs`) of the logits over the temperature.
        needs_unscaled: those of the logits as they are; -1 for none.
        backend: the name of the arithmetic, which is no other; None for the first that takes the logits.
    """

    targets: Tensor
    candidates: Tensor | None = None
    class_weight: Tensor | None = None
    temperature: Tensor | None = None
    softcap: float | None = None
    ignore_index: int = -100
    needs: int = 0
    needs_unscaled: int = -1
    backend: str | None = None

    def asking(self, needs: Needs | None, needs_unscaled: Needs | None) -> Sweep:
        """The same for these groups of statistics; None for no more than has to be, and for none."""
        unscaled = -1 if needs_unscaled is None else int(needs_unscaled)
        read = self.targets, self.candidates, self.class_weight, self.temperature, self.softcap
        return Sweep(*read, self.ignore_index, int(needs or 0), unscaled, self.backend)

    def covers(self, needs: int, needs_unscaled: int | None) -> bool:
        """Whether these groups are among its own."""
        unscaled = max(self.needs_unscaled, 0)
        return not needs & ~self.needs and (
            needs_unscaled is None or (self.needs_unscaled >= 0 and not needs_unscaled & ~unscaled)
        )

    def of(self, rows: Rows) -> Sweep:
        """The same for these rows alone."""
        candidates = None if self.candidates is None else self.candidates[rows]
        return replace(self, targets=self.targets[rows], candidates=candidates)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the operators' order."""
        return tuple([getattr(self, name) for name in _FIELDS])

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """What is read besides the predictions, by name."""
        return {
            name: getattr(self, name) for name in ("targets", "candidates", "class_weight", "temperature")
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Of the raw statistics, in the operators' order: of one view, then of the other."""
        return raw_names(self.needs) + (raw_names(self.needs_unscaled) if self.needs_unscaled >= 0 else ())

    @property
    def is_saved(self) -> list[bool]:
        """Which of the raw statistics the backward reads."""
        return [name in SAVED for name in self.names]

    def by_view(self, values: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Values in the operators' order, by name for each of the two views."""
        names = self.names
        first = len(raw_names(self.needs))
        return dict(zip(names[:first], values[:first])), dict(zip(names[first:], values[first:]))  # noqa: B905

    def blank(self, dtype: torch.dtype, device: torch.device, *, is_filled: bool = True) -> list[Tensor]:
        """The raw statistics [N] of ignored rows, to be filled in; or, unless ``is_filled``, memory for
        them."""
        outputs = []
        for name in self.names:
            shape = [self.targets.numel()]
            if name == "candidate_logits":
                assert self.candidates is not None
                shape.append(self.candidates.shape[-1])
            output = torch.empty(shape, dtype=raw_dtype(name, dtype), device=device)
            outputs.append(output.fill_(ignored_fill(name)) if is_filled else output)
        return outputs

    def views(self, raw: Maybe, grads: Maybe | None = None) -> list[View]:
        """What raw statistics in the operators' order belong to; given their gradients, only the views that
        have any."""
        known, upstream = self.by_view(raw), self.by_view([None] * len(raw) if grads is None else grads)
        first = View(self.temperature, Needs(self.needs), _present(known[0]), _present(upstream[0]))
        second = View(None, Needs(max(self.needs_unscaled, 0)), _present(known[1]), _present(upstream[1]))
        views = [first] if self.needs_unscaled < 0 else [first, second]
        return views if grads is None else [view for view in views if view.grads]

    def check_ids(self, num_classes: int, shape: torch.Size, *, by_kernels: bool = False) -> None:
        """
        Args:
            num_classes: V.
            shape: [...] that of the predictions, in which a wrong id's position is given.
            by_kernels: the values are left to kernels, which look at them and stop.

        Raises:
            TypeError: ids of another dtype, which only a caller of the operators can have.
            ValueError: an id out of range, or candidates of other tokens.
        """
        for name, ids in (("targets", self.targets), ("candidates", self.candidates)):
            if ids is not None and ids.dtype != torch.int64:
                raise TypeError(f"the operators take {name} as torch.int64; got {ids.dtype}")
        ids = self.candidates
        if ids is not None and ids.shape[:-1].numel() != self.targets.numel():
            raise ValueError(f"candidates {list(ids.shape)} are not of targets {list(self.targets.shape)}")
        if by_kernels:
            return
        targets = self.targets.reshape(shape)
        check_ids("targets", targets, num_classes, exempt=self.ignore_index, exempt_name="ignore_index")
        if ids is not None:
            ids = ids.reshape(*shape, ids.shape[-1])
            check_ids("candidates", ids, num_classes, exempt=-1, exempt_name="-1")


_FIELDS = tuple(field.name for field in fields(Sweep))


def _present(values: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if value is not None}


def flat(values: Tensor) -> Tensor:
    """[N] of [...]."""
    return values if values.dim() == 1 else values.reshape(-1)


def saved(outputs: Sequence[Tensor], is_saved: Sequence[bool]) -> list[Tensor]:
    """The statistics that the backward reads, of those in the operators' order."""
    return [output for output, needs_saving in zip(outputs, is_saved, strict=True) if needs_saving]


def unsaved(saved: Sequence[Tensor], is_saved: Sequence[bool]) -> list[Tensor | None]:
    """Statistics in the operators' order, None for those that were not saved."""
    rest = iter(saved)
    return [next(rest) if was_saved else None for was_saved in is_saved]
