"""Predictions of some positions of sequences that are split across ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lossmith.engine.head.plan import Plan
from lossmith.engine.predictions import LossOf, Predictions
from lossmith.engine.shards.part import Part
from lossmith.engine.shards.sequence import SequenceShards
from lossmith.engine.sweep import Sweep

if TYPE_CHECKING:
    from lossmith.engine.head.one_sweep import SweptOnce


class SequencePart(Part):
    """Predictions of this rank's positions of sequences that are split across ranks: their statistics are
    those of all positions, and their gradients this rank's.

    Args:
        own: the predictions of this rank's positions.
        shards: which those are.
    """

    has_all_tokens = False

    def __init__(self, own: Predictions, shards: SequenceShards) -> None:
        self.own, self.shards = own, shards

    def check(self, targets: Tensor) -> None:
        self.own.check(self.shards.part(targets))

    def fetch(self, sweep: Sweep) -> Sequence[Tensor]:
        return self._whole(self.own.fetch(self._own(sweep)))

    def sweep_once(
        self, sweep: Sweep, loss_of: LossOf, unless: str | None, scale: Tensor
    ) -> SweptOnce | None:
        """This rank's part, once. A rank whose part has no target sweeps in the other way, which gathers the
        same."""
        if torch.compiler.is_compiling():
            unless = unless or "torch.compile, where sequences are split across ranks"
        own = self._own(sweep)
        rows = self.shards.own_rows(torch.arange(len(sweep.targets), device=self.device))
        of_own = replace(loss_of, of=lambda some, at: loss_of(some, rows[at]))
        swept = self.own.sweep_once(own, of_own, unless, scale[rows])
        if swept is None:
            return None
        known, of_parts = (
            [*views[0].values(), *views[1].values()] for views in (swept.known, swept.of_parts)
        )
        whole = self._whole(known)
        again = [self._put(part, of_all) for part, of_all in zip(of_parts, whole, strict=True)]
        return replace(swept, known=sweep.by_view(whole), of_parts=sweep.by_view(again), sweep=sweep)

    def _own(self, sweep: Sweep) -> Sweep:
        """What is asked of this rank's positions."""
        ids, num_tokens = sweep.candidates, len(sweep.targets)
        candidates = None if ids is None else self.shards.own_rows(ids.reshape(num_tokens, -1))
        return replace(sweep, targets=self.shards.own_rows(sweep.targets), candidates=candidates)

    def _whole(self, raw: Sequence[Tensor]) -> list[Tensor]:
        """The raw statistics [N_r] and [N_r, K] of this rank's positions, as those of all: one collective."""
        columns = [column for value in raw for column in self._columns(value)]
        whole = iter(self.shards.gather_together(columns))
        return [self._joined([next(whole) for _ in self._columns(value)], value.dim()) for value in raw]

    def _put(self, own: Tensor, whole: Tensor) -> Tensor:
        """Raw statistics of all positions with this rank's, and their gradients, in their place."""
        of_all = whole.detach().reshape(-1, self.shards.length, *whole.shape[1:])
        rows = own.reshape(-1, self.shards.size, *own.shape[1:])
        return self.shards.put(rows, of_all, 1).flatten(0, 1)

    def _columns(self, value: Tensor) -> list[Tensor]:
        """[B, T_r] each."""
        columns = [value] if value.dim() == 1 else value.unbind(-1)
        return [column.reshape(-1, self.shards.size) for column in columns]

    def _joined(self, columns: Sequence[Tensor], dim: int) -> Tensor:
        """[N], or [N, K] again."""
        flat = [column.reshape(-1) for column in columns]
        return flat[0] if dim == 1 else torch.stack(flat, -1)

    def sample(self, softcap: float | None) -> Tensor:
        return self.shards.gather(self.own.sample(softcap))

    def plan(self, targets: Tensor, ignore_index: int, unless: str | None) -> Plan:
        """How this rank's part is going to be swept; see :meth:`Predictions.plan`."""
        return self.own.plan(self.shards.part(targets), ignore_index, unless)

    def logits(self) -> Tensor:
        raise ValueError("sequences are split across ranks; nothing here needs the logits of all positions")
