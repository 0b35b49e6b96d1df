"""Logits to raw statistics and back: one pass over memory each way, block by block.

Two custom operators, so that autograd, autocast and ``torch.compile(fullgraph=True)``
see one opaque step: ``lossmith::row_stats`` and its backward ``lossmith::row_grad``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.rows_torch import Needs, Scratch, raw_names, row_grad, row_stats
from lossmith.engine.stats import RawStats, TokenStats

# Elements in a block: on a CPU two fp32 buffers of it stay in the last-level cache; elsewhere
# launches are what a small block would cost, and this bounds the extra memory.
BLOCK_ELEMENTS = {"cpu": 2**19}
BLOCK_ELEMENTS_ELSEWHERE = 2**26

# What the backward reads; the rest it can do without.
SAVED = ("reference", "wrong_log_sum", "wrong_entropy", "top_wrong_id", "rest_log_sum")


def logits_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    candidates: Tensor | None = None,
    class_weight: Tensor | None = None,
    temperature: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    default_needs: Needs = Needs.CORE,
) -> TokenStats:
    """Lazy statistics of ``logits`` [..., V] at ``targets`` [...], with ``candidates`` [..., K].

    Rows whose target is ``ignore_index`` are not read: their statistics are those of a
    token that the model gets right with certainty (all 0, ``wrong_log_sum`` -inf), and
    their gradient is exactly 0.
    """

    def fetch(needs: Needs, needs_unscaled: Needs | None) -> tuple[dict, dict | None]:
        groups = (int(needs), -1 if needs_unscaled is None else int(needs_unscaled))
        flat = row_stats_op(
            logits, targets, candidates, class_weight, temperature, softcap, ignore_index, *groups
        )  # fmt: skip
        scaled, unscaled = _by_view(flat, *groups)
        return scaled, None if needs_unscaled is None else unscaled

    raw = RawStats(
        targets,
        fetch,
        ignore_index=ignore_index,
        candidates=candidates,
        has_temperature=temperature is not None,
        default_needs=default_needs,
    )
    return TokenStats(raw)


def _by_view(values: Sequence[Any], needs: int, needs_unscaled: int) -> tuple[dict, dict]:
    """Values listed in the operators' order, as {name: value} for each view that is asked for."""
    names = raw_names(Needs(needs))
    unscaled_names = raw_names(Needs(needs_unscaled)) if needs_unscaled >= 0 else ()
    scaled = dict(zip(names, values[: len(names)], strict=True))
    return scaled, dict(zip(unscaled_names, values[len(names) :], strict=True))


@torch.library.custom_op("lossmith::row_stats", mutates_args=())
def row_stats_op(
    logits: Tensor,
    targets: Tensor,
    candidates: Tensor | None,
    class_weight: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    needs: int,
    needs_unscaled: int,
) -> list[Tensor]:
    rows = _Rows(logits, targets, ignore_index)
    rows.check_targets()
    outputs = _allocate(logits, targets, candidates, needs, needs_unscaled)
    scaled_outputs, unscaled_outputs = _by_view(outputs, needs, needs_unscaled)
    views = [(temperature, Needs(needs), scaled_outputs)]
    if unscaled_outputs:
        views.append((None, Needs(needs_unscaled), unscaled_outputs))
    scratch = rows.scratch()
    loaded = rows.buffer() if softcap is not None else None
    scaled = rows.buffer() if temperature is not None else None
    for block in rows.blocks():
        z = _load(rows.take(block), rows.compute_dtype, softcap, loaded)
        target = rows.targets[block].unsqueeze(1)
        ids = None if candidates is None else candidates.reshape(-1, candidates.shape[-1])[block]
        for divisor, groups, outs in views:
            view = _divided(z, divisor, scaled)
            raw = row_stats(view, target, ids, class_weight, groups, scratch.first(len(view)))
            for name, out in outs.items():
                out[block] = raw[name] if out.dim() == 2 else raw[name].squeeze(1)
    if rows.ignored is not None:
        for _, _, outs in views:
            for name, out in outs.items():
                ignored = rows.ignored.unsqueeze(1) if out.dim() == 2 else rows.ignored
                out.masked_fill_(ignored, _fill(name))
    return outputs


@torch.library.custom_op("lossmith::row_grad", mutates_args=())
def row_grad_op(
    logits: Tensor,
    targets: Tensor,
    candidates: Tensor | None,
    class_weight: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    needs: int,
    needs_unscaled: int,
    raw: list[Tensor | None],
    grads: list[Tensor | None],
) -> Tensor:
    """Gradient of the logits from those of the raw statistics, listed as ``row_stats`` returns them."""
    rows = _Rows(logits, targets, ignore_index)
    result = rows.empty_gradient()
    saved = _by_view(raw, needs, needs_unscaled)
    upstream = _by_view(grads, needs, needs_unscaled)
    views = []
    for divisor, values, given in zip((temperature, None), saved, upstream, strict=True):
        given = {name: g for name, g in given.items() if g is not None}
        if given:
            views.append((divisor, {name: v for name, v in values.items() if v is not None}, given))
    in_place = rows.writes_in_place and softcap is None
    scratch = rows.scratch()
    gradient = None if in_place else rows.buffer()
    loaded = rows.buffer() if softcap is not None else None
    scaled = rows.buffer() if temperature is not None else None
    second = rows.buffer() if len(views) > 1 else None
    for block in rows.blocks():
        z = _load(rows.take(block), rows.compute_dtype, softcap, loaded)
        n = len(z)
        target = rows.targets[block].unsqueeze(1)
        ids = None if candidates is None else candidates.reshape(-1, candidates.shape[-1])[block]
        out = result[block] if gradient is None else gradient[:n]
        for k, (divisor, values, given) in enumerate(views):
            into = out if k == 0 else second[:n]  # type: ignore[index]
            at_block = {name: _column(value[block]) for name, value in values.items()}
            grads_at_block = {name: _column(g[block]) for name, g in given.items()}
            if divisor is not None:
                grads_at_block = {name: g / divisor for name, g in grads_at_block.items()}
            view = _divided(z, divisor, scaled)
            row_grad(view, into, scratch.a[:n], target, ids, class_weight, at_block, grads_at_block)
            if k > 0:
                out.add_(into)
        if softcap is not None:  # d softcap(z) / dz = 1 - (softcap(z) / c)^2
            out.mul_(torch.mul(z, 1 / softcap, out=scratch.a[:n]).square_().neg_().add_(1.0))
        if gradient is not None:
            rows.put(result, block, out)
    if rows.ignored is not None:
        result.masked_fill_(rows.ignored.unsqueeze(1), 0.0)
    return result.view(logits.shape)


def _save_for_backward(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    *tensors, softcap, ignore_index, needs, needs_unscaled = inputs
    ctx.options = (softcap, ignore_index, needs, needs_unscaled)
    ctx.is_saved = [
        name in SAVED for view in _by_view(output, needs, needs_unscaled) for name in view
    ]  # fmt: skip
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *(out for out, saved in zip(output, ctx.is_saved, strict=True) if saved))


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    logits, targets, candidates, class_weight, temperature, *saved = ctx.saved_tensors
    gradient = None
    if ctx.needs_input_grad[0] and any(g is not None for g in grads):
        rest = iter(saved)
        raw = [next(rest) if is_saved else None for is_saved in ctx.is_saved]
        gradient = row_grad_op(
            logits, targets, candidates, class_weight, temperature, *ctx.options, raw, grads
        )  # fmt: skip
    return gradient, None, None, None, None, None, None, None, None


row_stats_op.register_autograd(_backward, setup_context=_save_for_backward)


@row_stats_op.register_fake
def _(logits, targets, candidates, class_weight, temperature, softcap, ignore_index, needs, needs_unscaled):
    return _allocate(logits, targets, candidates, needs, needs_unscaled)


@row_grad_op.register_fake
def _(logits, *_unused):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


class _Rows:
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
        targets = targets.reshape(-1)
        is_ignored = targets == ignore_index
        self.targets = targets.masked_fill(is_ignored, 0)
        limit = BLOCK_ELEMENTS.get(self.device.type, BLOCK_ELEMENTS_ELSEWHERE)
        self.block_rows = max(1, min(self.num_rows, limit // self.num_classes))
        # On a CPU ignored rows are left out; on an accelerator their number is not known to
        # the host without waiting for it, so they are computed and then masked.
        self.ignored: Tensor | None = None
        self.visited: Tensor | None = None
        if self.device.type == "cpu":
            visited = (~is_ignored).nonzero().squeeze(1)
            if visited.numel() < self.num_rows or not self.is_flat:
                self.visited = visited
        else:
            self.ignored = is_ignored
            if not self.is_flat:
                self.visited = torch.arange(self.num_rows, device=self.device)

    @property
    def writes_in_place(self) -> bool:
        """Whether a block of the gradient is contiguous memory of the dtype computed in."""
        return self.visited is None and self.dtype == self.compute_dtype

    def blocks(self) -> Iterator[Any]:
        if self.visited is not None:
            if self.visited.numel():
                yield from self.visited.split(self.block_rows)
            return
        for start in range(0, self.num_rows, self.block_rows):
            yield slice(start, min(start + self.block_rows, self.num_rows))

    def take(self, block: slice | Tensor) -> Tensor:
        if isinstance(block, slice) or self.is_flat:
            return self.logits[block]
        return self.logits[torch.unravel_index(block, self.lead)]

    def put(self, result: Tensor, block: slice | Tensor, values: Tensor) -> None:
        if isinstance(block, slice):
            result[block] = values
        else:
            result.index_copy_(0, block, values.to(result.dtype))

    def empty_gradient(self) -> Tensor:
        make = torch.empty if self.visited is None else torch.zeros
        return make((self.num_rows, self.num_classes), dtype=self.dtype, device=self.device)

    def buffer(self) -> Tensor:
        return torch.empty((self.block_rows, self.num_classes), dtype=self.compute_dtype, device=self.device)

    def scratch(self) -> Scratch:
        return Scratch(self.buffer(), self.buffer())

    def check_targets(self) -> None:
        outside = (self.targets < 0) | (self.targets >= self.num_classes)
        if self.device.type != "cpu":  # the host must not wait for the answer
            torch._assert_async(~outside.any(), f"a target is outside [0, {self.num_classes})")
            return
        where = outside.nonzero()
        if where.shape[0]:
            raise ValueError(_outside_message(self.targets, int(where[0, 0]), self.lead, self.num_classes))


def _outside_message(targets: Tensor, row: int, lead: torch.Size, num_classes: int) -> str:
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(row), lead)) if lead else ()
    return (
        f"targets must be class ids in [0, {num_classes}) or ignore_index; got {int(targets[row])} at "
        f"position {position}. Set positions without a target to ignore_index, and check that the logits' "
        "last dimension is the vocabulary"
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics are computed and returned in: at least fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _allocate(
    logits: Tensor, targets: Tensor, candidates: Tensor | None, needs: int, needs_unscaled: int
) -> list[Tensor]:
    outputs = []
    for group in (needs, needs_unscaled):
        for name in raw_names(Needs(group)) if group >= 0 else ():
            shape = [targets.numel()]
            if name == "candidate_logits":
                assert candidates is not None
                shape.append(candidates.shape[-1])
            dtype = torch.int64 if name == "top_wrong_id" else accumulation_dtype(logits.dtype)
            outputs.append(torch.full(shape, _fill(name), dtype=dtype, device=logits.device))
    return outputs


def _fill(name: str) -> float | int:
    """What an ignored row has: a token that the model gets right with certainty."""
    if name == "top_wrong_id":
        return -1
    return float("-inf") if name in ("wrong_log_sum", "rest_log_sum", "candidate_logits") else 0.0


def _load(z: Tensor, dtype: torch.dtype, softcap: float | None, buffer: Tensor | None) -> Tensor:
    """A block in the dtype computed in; the logits themselves where nothing has to change."""
    if softcap is None:
        return z if z.dtype == dtype else z.to(dtype)
    assert buffer is not None
    return torch.mul(z.to(dtype), 1 / softcap, out=buffer[: len(z)]).tanh_().mul_(softcap)


def _divided(z: Tensor, divisor: Tensor | None, buffer: Tensor | None) -> Tensor:
    if divisor is None:
        return z
    assert buffer is not None
    return torch.div(z, divisor, out=buffer[: len(z)])


def _column(value: Tensor) -> Tensor:
    return value if value.dim() == 2 else value.unsqueeze(1)
