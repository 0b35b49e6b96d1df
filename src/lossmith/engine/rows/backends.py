"""Rows of logits to raw statistics and back, by the first arithmetic of a list that takes them.

To add one: a module with ``takes``, ``fill_stats`` and ``gradient``, and a line in ``BACKENDS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lossmith.engine.rows import blocks, native_rows
from lossmith.engine.rows.blocks import accumulation_dtype
from lossmith.engine.statistics.raw import View
from lossmith.engine.sweep import Maybe, Sweep


class Backend(Protocol):
    """The arithmetic on rows; of logits [..., V] and a sweep [N]."""

    def takes(self, logits: Tensor, softcap: float | None, /) -> bool:
        """Whether these rows are computed here."""
        ...

    def fill_stats(self, logits: Tensor, sweep: Sweep, views: Sequence[View], /) -> None:
        """Fill in the raw statistics [N] of every view."""
        ...

    def gradient(self, logits: Tensor, sweep: Sweep, views: Sequence[View], /, *, in_place: bool) -> Tensor:
        """The gradient [N, V] of the logits from those of every view's statistics; exactly 0 in rows that are
        ignored or have no gradient, also where their logits are no numbers."""
        ...


# fp32 and bf16 rows on a CPU, compiled; and everything, in blocks of PyTorch operations.
BACKENDS: dict[str, Backend] = {"native": native_rows, "torch": blocks}


def stats_of_rows(logits: Tensor, sweep: Sweep) -> list[Tensor]:
    """The raw statistics [N] of ``logits`` [..., V], in the operators' order."""
    outputs = sweep.blank(accumulation_dtype(logits.dtype), logits.device)
    _backend(logits, sweep).fill_stats(logits, sweep, sweep.views(outputs))
    return outputs


def gradient_of_rows(
    logits: Tensor, sweep: Sweep, raw: Maybe, grads: Maybe, *, in_place: bool = False
) -> Tensor:
    """The gradient [N, V] of ``logits`` [..., V]; exactly 0 in rows that are ignored or have no
    gradient.

    Args:
        raw, grads: the raw statistics, and their gradients, in the operators' order.
        in_place: ``logits`` [N, V] belong to the caller alone, and become the gradient.
    """
    views = sweep.views(raw, grads)
    return _backend(logits, sweep).gradient(logits, sweep, views, in_place=in_place)


def _backend(logits: Tensor, sweep: Sweep) -> Backend:
    return next(backend for backend in BACKENDS.values() if backend.takes(logits, sweep.softcap))
