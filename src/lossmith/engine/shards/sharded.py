"""Predictions whose classes are split across ranks: logits, or a linear head's weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lossmith.engine.head.linear_head import LinearHead
from lossmith.engine.head.plan import Plan
from lossmith.engine.predictions import Logits
from lossmith.engine.rows.torch_rows import MASKED, WRONG_EPS
from lossmith.engine.shards.layout import VocabShards, stacked, sum_of_gradients
from lossmith.engine.shards.merging import merged
from lossmith.engine.shards.part import Part
from lossmith.engine.statistics.raw import CONSTANTS, Needs, ignored_fill, raw_names
from lossmith.engine.sweep import Sweep

# Without gradients, also where a shard's own arithmetic would give them one.
# Logits that are looked at together.
BLOCK_ELEMENTS = 2**22


class _Sharded(Part):
    """What both kinds share.

    Attributes:
        shards: which classes this rank has.
    """

    shards: VocabShards

    @property
    def num_classes(self) -> int:
        return self.shards.num_classes

    def sweep_once(self, sweep: Sweep, loss_of: Any, unless: str | None, scale: Tensor) -> None:
        """Never: a chunk's gradient needs the statistics of all ranks."""
        return

    def fetch(self, sweep: Sweep) -> Sequence[Tensor]:
        sweep.check_ids(self.num_classes, self._shape)
        valid = sweep.targets != sweep.ignore_index
        is_here = torch.stack([self.shards.has(sweep.targets, r) for r in range(len(self.shards.sizes))])
        raw = self._gathered(self._local(sweep, is_here[self.shards.rank], valid))
        starts = torch.tensor(self.shards.starts, device=self.device).unsqueeze(1)
        has_candidate = None
        if sweep.candidates is not None:
            has_candidate = torch.stack(
                [self.shards.has(sweep.candidates, r) for r in range(len(self.shards.sizes))]
            )
        found = [merged(view, is_here, starts, valid, has_candidate) for view in raw]
        for view, needs in enumerate((sweep.needs, sweep.needs_unscaled)):
            if needs >= 0 and Needs(needs) & Needs.COUNT:
                temperature = sweep.temperature if view == 0 else None
                found[view]["num_wrong"] = self._count(sweep, found[view], temperature, valid)
        names = [raw_names(needs) for needs in (sweep.needs, sweep.needs_unscaled) if needs >= 0]
        return [found[view][name] for view, of in enumerate(names) for name in of]

    # ── this rank's part ──────────────────────────────────────────────────────────────────────────

    @property
    def _start(self) -> int:
        return self.shards.starts[self.shards.rank]

    def _own_class_weight(self, sweep: Sweep) -> Tensor | None:
        weight = sweep.class_weight
        return None if weight is None else weight[self._start : self._start + self.shards.size]

    def _own_ids(self, ids: Tensor, instead: int) -> Tensor:
        """Ids as this shard numbers them, ``instead`` for those of others."""
        is_here = self.shards.has(ids, self.shards.rank)
        return torch.where(is_here, ids - self._start, instead)

    def _local(self, sweep: Sweep, is_here: Tensor, valid: Tensor) -> list[dict[str, Tensor]]:
        """The raw statistics of this rank's classes, of each view; where the target is another's, at the
        first."""
        ids = None if sweep.candidates is None else self._own_ids(sweep.candidates, -1)
        wanted = [
            needs & ~int(Needs.COUNT) if needs >= 0 else -1 for needs in (sweep.needs, sweep.needs_unscaled)
        ]
        own = replace(
            sweep,
            targets=self._own_ids(sweep.targets, 0).masked_fill(~valid, sweep.ignore_index),
            candidates=ids,
            class_weight=self._own_class_weight(sweep),
            needs=wanted[0],
            needs_unscaled=wanted[1],
        )
        views = own.by_view(self.own.fetch(own))
        for view in views:
            for name in CONSTANTS & view.keys():
                view[name] = view[name].detach()
        return [view for view in views if view]

    def _gathered(self, views: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The statistics [R, N] of all shards, this one's with their gradients: one collective."""
        columns = [
            value.unsqueeze(-1) if value.dim() == 1 else value for view in views for value in view.values()
        ]
        # ids and fp32 are exact in double precision
        packed = self.shards.gather(torch.cat([column.detach().double() for column in columns], -1))
        widths = [column.shape[-1] for column in columns]
        parts = list(zip(*(given.split(widths, -1) for given in packed), strict=True))
        found, at = [], 0
        for view in views:
            of_view = {}
            for name, value in view.items():
                given = [part.to(value.dtype).reshape(value.shape) for part in parts[at]]
                of_view[name], at = stacked(given, value, self.shards.rank), at + 1
            found.append(of_view)
        return found

    def _count(
        self, sweep: Sweep, found: dict[str, Tensor], temperature: Tensor | None, valid: Tensor
    ) -> Tensor:
        """[N] how many wrong answers of all shards have a share of the wrong mass above WRONG_EPS: a second
        collective, since no shard knows that mass alone."""
        with torch.no_grad():
            targets = self._own_ids(sweep.targets, -1)
            counts = torch.zeros_like(found["reference"])
            for rows, z in self._blocks(sweep.softcap):
                z = z if temperature is None else z / temperature
                d = z.clamp(min=MASKED) - found["reference"][rows].unsqueeze(1)
                is_counted = d.exp() > WRONG_EPS * found["wrong_log_sum"][rows].exp().unsqueeze(1)
                classes = torch.arange(z.shape[1], device=z.device)
                counts[rows] = (is_counted & (classes != targets[rows].unsqueeze(1))).sum(-1).to(counts.dtype)
            total = torch.stack(self.shards.gather(counts)).sum(0)
        return torch.where(valid, total, ignored_fill("num_wrong"))

    @abstractmethod
    def _blocks(self, softcap: float | None) -> Iterator[tuple[slice, Tensor]]:
        """This rank's logits [R, V_r], some rows at a time, as the sweep reads them."""

    def sample(self, softcap: float | None) -> Tensor:
        """A shard by its share of the mass, then an id of it; every rank draws the same."""
        targets = torch.zeros(self._shape.numel(), dtype=torch.long, device=self.device)
        reference, first, wrong = self.own.fetch(Sweep(targets, softcap=self.capped(softcap)))
        log_sum = torch.logaddexp(reference + wrong, first).detach()
        ids = self.own.sample(softcap).reshape(-1) + self._start
        noise = torch.rand(len(targets), dtype=torch.float64, device=self.device)
        gathered = torch.stack(self.shards.gather(torch.stack([log_sum.double(), ids.double(), noise])))
        shares = gathered[:, 0].softmax(0).cumsum(0)
        shard = (shares <= gathered[0, 2] * shares[-1]).sum(0).clamp(max=len(shares) - 1)
        return gathered[:, 1].gather(0, shard.unsqueeze(0)).squeeze(0).long().reshape(self._shape)

    @property
    def _shape(self) -> torch.Size:
        """[...], that of the targets."""
        return next(t for t in self.tensors.values() if t is not None).shape[:-1]


class ShardedLogits(_Sharded):
    """Logits of which every rank has some classes.

    Args:
        values: [..., V_r], this rank's.
        shards: which classes those are.

    Raises:
        ValueError: not as many classes as the rank has.
    """

    def __init__(self, values: Tensor, shards: VocabShards) -> None:
        given_shards(shards).check_part("logits", values, -1)
        self.own, self.shards = Logits(values), shards

    def _blocks(self, softcap: float | None) -> Iterator[tuple[slice, Tensor]]:
        flat = self.own.values.detach().reshape(-1, self.shards.size)
        step = max(1, BLOCK_ELEMENTS // self.shards.size)
        for start in range(0, len(flat), step):
            rows = slice(start, start + step)
            z = flat[rows].to(self.dtype)
            yield rows, z if softcap is None else softcap * torch.tanh(z / softcap)

    def logits(self) -> Tensor:
        raise ValueError("the logits are split across ranks; nothing here needs them as a whole")


class ShardedHead(_Sharded):
    """A linear head of whose weight every rank has some rows; the hidden states are those of all.

    Args:
        hidden: [..., D], the same on every rank; its gradient is summed over the group.
        weight: [V_r, D], this rank's.
        shards: which classes those are.
        bias: [V_r], or None.
        options: those of :class:`LinearHead`.

    Raises:
        TypeError, ValueError: they do not belong together; the message says which.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, shards: VocabShards, bias: Tensor | None = None, **options: Any
    ) -> None:
        given_shards(shards).check_part("weight", weight, 0)
        if options.get("strategy") == "one_sweep":
            raise ValueError(
                "strategy='one_sweep' is not possible: a chunk's gradient needs the statistics of all ranks. "
                "Pass strategy='two_sweep', or 'auto'"
            )
        self.shards = shards
        self.own = LinearHead(sum_of_gradients(hidden, shards.group), weight, bias, **options)

    def _blocks(self, softcap: float | None) -> Iterator[tuple[slice, Tensor]]:
        head = self.own
        hidden = head.hidden.detach().reshape(-1, head.hidden.shape[-1]).to(head.compute_dtype)
        weight = head.weight.detach().to(head.compute_dtype)
        bias = None if head.bias is None else head.bias.detach().to(head.compute_dtype)
        step = max(1, BLOCK_ELEMENTS // self.shards.size)
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            z = F.linear(hidden[rows], weight, bias).to(self.dtype)
            yield rows, z if softcap is None else softcap * torch.tanh(z / softcap)

    def plan(self, targets: Tensor, ignore_index: int, unless: str | None) -> Plan:
        """What sweeping this rank's part will be; see :meth:`LinearHead.plan`."""
        own = targets.masked_fill(targets != ignore_index, 0)
        return self.own.plan(own, ignore_index, unless or "its classes are split across ranks")

    def logits(self) -> Tensor:
        raise ValueError("the head is split across ranks; nothing here needs its logits as a whole")


def given_shards(shards: Any) -> VocabShards:
    """
    Raises:
        TypeError: they are none.
    """
    if not isinstance(shards, VocabShards):
        raise TypeError(
            "shards must say which classes each rank has, as in lossmith.VocabShards.even(V, group); got "
            f"{type(shards).__name__}"
        )
    return shards
