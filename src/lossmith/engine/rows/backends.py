"""Rows of logits to raw statistics and back, by the arithmetic that was asked for, or by the first of a list
that takes them.

To add one: a module with what ``Backend`` says, its name in ``BackendName`` and a line in ``BACKENDS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor

from lossmith.engine.rows import blocks, native_rows, triton_rows
from lossmith.engine.rows.blocks import accumulation_dtype
from lossmith.engine.statistics.raw import Needs, View
from lossmith.engine.sweep import Maybe, Sweep
from lossmith.options import option


class Backend(Protocol):
    """The arithmetic on rows; of logits [..., V] and a sweep [N]."""

    @property
    def TAKES(self) -> str:
        """What it takes, in the words of a message."""
        ...

    @property
    def WRITES_EVERY_ROW(self) -> bool:
        """Whether it writes the statistics of ignored rows too."""
        ...

    def takes(self, logits: Tensor, softcap: float | None, is_asked_for: bool = False, /) -> bool:
        """Whether these rows are computed here; or can be, if somebody asks for it by name."""
        ...

    def fill_stats(self, logits: Tensor, sweep: Sweep, views: Sequence[View], /) -> None:
        """Fill in the raw statistics [N] of every view."""
        ...

    def gradient(self, logits: Tensor, sweep: Sweep, views: Sequence[View], /, *, in_place: bool) -> Tensor:
        """The gradient [N, V] of the logits from those of every view's statistics; exactly 0 in rows that are
        ignored or have no gradient, also where their logits are no numbers."""
        ...


BackendName = Annotated[
    Literal["native", "triton", "torch"] | None,
    option("which arithmetic computes the rows of logits; None for the first that takes them"),
]
# Rows on a CPU, compiled; rows on a GPU, by kernels; and everything, in blocks of PyTorch operations.
BACKENDS: dict[str, Backend] = {"native": native_rows, "triton": triton_rows, "torch": blocks}


def stats_of_rows(logits: Tensor, sweep: Sweep) -> list[Tensor]:
    """The raw statistics [N] of ``logits`` [..., V], in the operators' order.

    Raises:
        ValueError: the arithmetic that was asked for does not take these logits.
    """
    backend = backend_for(logits, sweep)
    is_filled = not backend.WRITES_EVERY_ROW
    outputs = sweep.blank(accumulation_dtype(logits.dtype), logits.device, is_filled=is_filled)
    backend.fill_stats(logits, sweep, sweep.views(outputs))
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
    backend = backend_for(logits, sweep)
    views = sweep.views(raw, grads)
    return backend.gradient(logits, sweep, views, in_place=in_place)


def looks_at_ids(backend: Backend, device: torch.device, sweep: Sweep) -> bool:
    """Whether an arithmetic stops at an id out of range by itself, so that nobody else has to look for one;
    candidates are looked at where they are asked for."""
    asked = sweep.needs | max(sweep.needs_unscaled, 0)
    if sweep.candidates is not None and not asked & Needs.CANDIDATES:
        return False
    return backend is native_rows or (backend is triton_rows and device.type == "cuda")


def backend_for(logits: Tensor, sweep: Sweep) -> Backend:
    """
    Raises:
        ValueError: the one that was asked for does not take these logits, or is none.
    """
    name, softcap = sweep.backend, sweep.softcap
    if name is None:
        return next(backend for backend in BACKENDS.values() if backend.takes(logits, softcap))
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None; got {name!r}")
    backend = BACKENDS[name]
    if not backend.takes(logits, softcap, True):
        came = f"{str(logits.dtype).removeprefix('torch.')} on {logits.device.type}"
        if logits.stride(-1) != 1 and logits.shape[-1] > 1:
            came += " whose classes do not lie side by side"
        if softcap is not None:
            came += " with a softcap"
        raise ValueError(f"backend={name!r} takes {backend.TAKES}; got {came}; pass backend=None")
    return backend
