"""``torch_rows`` over a batch: which rows are visited, how many at a time, how they are read and written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lossmith.engine.checks import check_ids_again
from lossmith.engine.memory import fresh
from lossmith.engine.rows.torch_rows import Scratch, row_grad, row_stats
from lossmith.engine.statistics.raw import View, ignored_fill
from lossmith.engine.sweep import Sweep

TAKES = "any logits"
WRITES_EVERY_ROW = False

Block = slice | Tensor

# Elements in a block: on a CPU two fp32 buffers of it stay in the last-level cache; elsewhere
# launches are what a small block would cost, and this bounds the extra memory.
BLOCK_ELEMENTS = {"cpu": 2**20}
BLOCK_ELEMENTS_ELSEWHERE = 2**26

# Picking rows by index costs a copy of them; this share of ignored rows pays for it.
WORTH_LEAVING_OUT = 1 / 8


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics are computed and returned in: at least fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Blocks:
    """The rows of ``logits`` [..., V] that a sweep visits, and how it reads and writes them."""

    def __init__(self, logits: Tensor, targets: Tensor, ignore_index: int) -> None:
        self.num_classes = logits.shape[-1]
        self.num_rows = targets.numel()
        self.logits = logits
        self.lead = logits.shape[:-1]
        self.is_flat = True
        try:
            self.logits = logits.view(-1, self.num_classes)
        except RuntimeError:  # a view that cannot be flattened: rows are picked, not copied whole
            self.is_flat = False
        self.device, self.dtype = logits.device, logits.dtype
        self.compute_dtype = accumulation_dtype(logits.dtype)
        self.is_ignored = is_ignored = targets == ignore_index
        self.targets = targets.masked_fill(is_ignored, 0)
        elements = BLOCK_ELEMENTS.get(logits.device.type, BLOCK_ELEMENTS_ELSEWHERE)
        self.block_rows = max(1, min(self.num_rows, elements // self.num_classes))
        # Few ignored rows are computed and then cleared; many are left out, on a CPU: an
        # accelerator would have to tell the host how many there are.
        self.visited: Tensor | None = None
        self.ignored: Tensor | None = None
        if self.device.type != "cpu":
            self.visited = None if self.is_flat else torch.arange(self.num_rows, device=self.device)
            self.ignored = is_ignored
            return
        visited = (~is_ignored).nonzero().squeeze(1)
        num_ignored = self.num_rows - visited.numel()
        if not self.is_flat or num_ignored > self.num_rows * WORTH_LEAVING_OUT:
            self.visited = visited
        elif num_ignored:
            self.ignored = is_ignored.nonzero().squeeze(1)

    @property
    def is_exact(self) -> bool:
        """Whether the logits have the dtype computed in."""
        return self.dtype == self.compute_dtype

    @property
    def writes_in_place(self) -> bool:
        """Whether a block of the gradient is contiguous memory of the dtype computed in."""
        return self.visited is None and self.is_exact

    def all(self) -> Iterator[Block]:
        if self.visited is not None:
            if self.visited.numel():
                yield from self.visited.split(self.block_rows)
            return
        for start in range(0, self.num_rows, self.block_rows):
            yield slice(start, min(start + self.block_rows, self.num_rows))

    def take(self, block: Block) -> Tensor:
        if isinstance(block, slice) or self.is_flat:
            return self.logits[block]
        return self.logits[torch.unravel_index(block, self.lead)]

    def put(self, result: Tensor, block: Block, values: Tensor) -> None:
        if isinstance(block, slice):
            result[block] = values
        else:
            result.index_copy_(0, block, values.to(result.dtype))

    def clear(self, values: Tensor, fill: float | int) -> None:
        """Overwrite ignored rows that were computed with the others: NaN in them must not stay."""
        if self.ignored is not None:
            values[self.ignored] = fill

    def empty_gradient(self) -> Tensor:
        """Memory for the gradient; rows that are not visited have theirs, 0, already."""
        shape = (self.num_rows, self.num_classes)
        return fresh(shape, dtype=self.dtype, device=self.device, zero=self.visited is not None)

    def buffer(self) -> Tensor:
        return torch.empty((self.block_rows, self.num_classes), dtype=self.compute_dtype, device=self.device)


def takes(logits: Tensor, softcap: float | None, is_asked_for: bool = False) -> bool:
    """Everything."""
    return True


def fill_stats(logits: Tensor, sweep: Sweep, views: Sequence[View]) -> None:
    """Fill in the raw statistics of every view."""
    blocks = Blocks(logits, sweep.targets, sweep.ignore_index)
    scratch = Scratch(blocks.buffer(), blocks.buffer())
    reader = _Reader(blocks, sweep.softcap, views)
    for block in blocks.all():
        z = reader.load(block)
        target = blocks.targets[block].unsqueeze(1)
        ids = None if sweep.candidates is None else sweep.candidates[block]
        for view in views:
            scaled = reader.over(view.temperature, z)
            raw = row_stats(scaled, target, ids, sweep.class_weight, view.needs, scratch.first(len(z)))
            for name, out in view.raw.items():
                out[block] = raw[name] if out.dim() == 2 else raw[name].squeeze(1)
    for view in views:
        for name, out in view.raw.items():
            blocks.clear(out, ignored_fill(name))


def gradient(logits: Tensor, sweep: Sweep, views: Sequence[View], *, in_place: bool) -> Tensor:
    """The gradient of the logits [N, V], from those of every view's raw statistics; ``in_place`` in the
    memory of the logits.

    Raises:
        RuntimeError: the ids have been written over.
    """
    sweep = _with_a_gradient(sweep, views)
    num_classes, softcap = logits.shape[-1], sweep.softcap
    check_ids_again("targets", sweep.targets, num_classes, exempt=sweep.ignore_index)
    if sweep.candidates is not None:
        check_ids_again("candidates", sweep.candidates, num_classes, exempt=-1)
    blocks = Blocks(logits, sweep.targets, sweep.ignore_index)
    result = blocks.logits if in_place else blocks.empty_gradient()
    scratch = blocks.buffer()
    is_direct = blocks.writes_in_place and softcap is None and not in_place
    buffer = None if is_direct else blocks.buffer()
    second = blocks.buffer() if len(views) > 1 else scratch
    reader = _Reader(blocks, softcap, views)
    for block in blocks.all():
        z = reader.load(block)
        n = len(z)
        target = blocks.targets[block].unsqueeze(1)
        ids = None if sweep.candidates is None else sweep.candidates[block]
        out = result[block] if buffer is None else buffer[:n]
        for k, view in enumerate(views):
            into = out if k == 0 else second[:n]
            raw = {name: _column(value[block]) for name, value in view.raw.items()}
            grads = {name: _column(g[block]) for name, g in view.grads.items()}
            if view.temperature is not None:
                grads = {name: g / view.temperature for name, g in grads.items()}
            scaled = reader.over(view.temperature, z)
            row_grad(scaled, into, scratch[:n], target, ids, sweep.class_weight, raw, grads)
            if k > 0:
                out.add_(into)
        if softcap is not None:  # its derivative, sech^2(z / c); 1 - (softcap(z) / c)^2 would cancel
            out.div_(reader.uncapped(block, scratch[:n]).mul_(1 / softcap).cosh_().square_())
        if buffer is not None:
            blocks.put(result, block, out)
    if in_place:
        result.masked_fill_(blocks.is_ignored.unsqueeze(1), 0.0)
    blocks.clear(result, 0.0)
    return result


def _with_a_gradient(sweep: Sweep, views: Sequence[View]) -> Sweep:
    """The sweep without the rows whose statistics have no gradient."""
    given = [value != 0 for view in views for value in view.grads.values()]
    wanted = [rows if rows.dim() == 1 else rows.any(-1) for rows in given]
    targets = sweep.targets.masked_fill(~torch.stack(wanted).any(0), sweep.ignore_index)
    return replace(sweep, targets=targets)


class _Reader:
    """Blocks as they are computed on: in the accumulation dtype, capped, over a temperature."""

    def __init__(self, blocks: Blocks, softcap: float | None, views: Sequence[View]) -> None:
        self.blocks, self.softcap = blocks, softcap
        changes = softcap is not None or not blocks.is_exact
        self._loaded = blocks.buffer() if changes else None
        self._scaled = blocks.buffer() if any(v.temperature is not None for v in views) else None

    def load(self, block: Block) -> Tensor:
        """The logits themselves where nothing has to change."""
        z = self.blocks.take(block)
        if self._loaded is None:
            return z
        loaded = self._loaded[: len(z)].copy_(z)
        return loaded if self.softcap is None else loaded.mul_(1 / self.softcap).tanh_().mul_(self.softcap)

    def uncapped(self, block: Block, into: Tensor) -> Tensor:
        """The logits before the cap."""
        return into.copy_(self.blocks.take(block))

    def over(self, temperature: Tensor | None, z: Tensor) -> Tensor:
        if temperature is None:
            return z
        assert self._scaled is not None
        return torch.div(z, temperature, out=self._scaled[: len(z)])


def _column(value: Tensor) -> Tensor:
    return value if value.dim() == 2 else value.unsqueeze(1)
