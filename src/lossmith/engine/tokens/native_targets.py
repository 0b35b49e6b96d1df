"""Targets on a CPU, compiled: whether they are classes, which of them are supervised, and their shares; calls
``tokens_native.cpp``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lossmith.engine.native.build import library
from lossmith.engine.native.memory import Memory
from lossmith.engine.watched import is_eager


class _Ids(ctypes.Structure):
    _fields_ = [
        ("ids", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num", "num_classes", "exempt")),
    ]


class Targets(ctypes.Structure):
    """Targets, and what is made of them, as the library takes them."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("is_double", "num_rows", "num_positions", "num_classes")),
        *((name, ctypes.c_int64) for name in ("ignore_index", "reduction", "is_nan_if_empty")),
        *((name, ctypes.c_void_p) for name in ("targets", "valid", "scale", "count")),
    ]


# As the library has them.
REDUCTIONS = {"mean": 0, "token_mean": 0, "sequence_mean": 1, "sum": 2, "none": 2}


def takes(ids: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether ids like these are looked at here, and shares of them made in a dtype."""
    return (
        dtype in (torch.float32, torch.float64)
        and ids.is_cpu
        and ids.dtype == torch.int64
        and is_eager(ids)
        and library() is not None
    )


def is_outside(ids: Tensor, num_classes: int, exempt: int) -> bool:
    """Whether one of the ids [...] is no class and not the exempt one."""
    memory = Memory()
    given = _Ids(memory.of("ids", ids, torch.int64, ids.numel()), ids.numel(), num_classes, exempt)
    return bool(_library().lossmith_is_outside(ctypes.byref(given)))


def settle(
    targets: Tensor, num_classes: int, ignore_index: int, reduction: str, empty: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """What :func:`lossmith.equation.reduction.token_scale` makes of targets [..., T], without weights or a
    denominator.

    Returns:
        [..., T] bool, the supervised ones; [..., T] their shares; what the batch is divided by; and whether
        one is no class.
    """
    memory, num = Memory(), targets.numel()
    valid = targets.new_empty(targets.shape, dtype=torch.bool)
    scale, count = targets.new_empty(targets.shape, dtype=dtype), targets.new_empty((), dtype=dtype)
    given = Targets(
        dtype == torch.float64,
        num,
        targets.shape[-1] if targets.dim() else 1,
        num_classes,
        ignore_index,
        REDUCTIONS[reduction],
        empty == "nan",
        memory.of("targets", targets, torch.int64, num),
        valid.data_ptr(),
        scale.data_ptr(),
        count.data_ptr(),
    )
    is_outside = _library().lossmith_settle(ctypes.byref(given))
    return valid, scale, count, bool(is_outside)


def _library() -> ctypes.CDLL:
    compiled = library()
    assert compiled is not None
    return compiled
