"""The cross-entropy family, compiled: calls ``cross_entropy_native.cpp``, once each way."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lossmith.engine.memory import fresh
from lossmith.engine.native.build import library
from lossmith.engine.native.memory import Memory
from lossmith.engine.rows import native_rows
from lossmith.engine.tokens.native_targets import REDUCTIONS
from lossmith.engine.tokens.native_tokens import FAMILY_FIELDS, family_values

if TYPE_CHECKING:
    from lossmith.engine.cross_entropy import CrossEntropy
    from lossmith.engine.sweep import Maybe

_MOST_TERMS = 3
_PARTS, _OF_PARTS = ([f"{prefix}part_{k}" for k in range(_MOST_TERMS)] for prefix in ("", "g_"))


class _Family(ctypes.Structure):
    _fields_ = [
        ("needs", ctypes.c_int64),
        ("needs_unscaled", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("temperature", "raw", "scale", "target_weight")),
        *((name, ctypes.c_void_p) for name in ("shares", "total", *_PARTS, "g_total", *_OF_PARTS)),
        *((name, ctypes.c_int64) for name in ("reduction", "num_positions", "is_nan_if_empty")),
        *FAMILY_FIELDS,
    ]


_NO_RESULTS, _NO_GRADIENTS = (None,) * (1 + _MOST_TERMS), (None,) * (1 + _MOST_TERMS)
_SETTLED = (-1, 1, False)


def forward(of: CrossEntropy, logits: Tensor) -> list[Tensor]:
    """Fill in its statistics and shares; returns the loss and its terms, if there are several and they are
    wanted.

    Raises:
        ValueError: an id is out of range, or a tensor is not what the library takes it for.
    """
    num_terms = len(of.family.names)
    is_alone = of.scale is None or num_terms == 1
    numbers = [of.room.new_empty(()) for _ in range(1 if is_alone else 1 + num_terms)]
    places = [number.data_ptr() for number in numbers]
    _run(of, logits, (*places, *_NO_RESULTS[len(places) :]), _NO_GRADIENTS, None)
    return numbers


def backward(of: CrossEntropy, logits: Tensor, upstream: Maybe) -> Tensor:
    """The gradient of the logits, from those of the loss and of its terms."""
    memory = Memory()
    gradient = fresh(tuple(logits.shape), dtype=logits.dtype, device=logits.device, zero=False)
    given = [memory.of("upstream gradient", one, torch.float32, 1) for one in upstream]
    _run(of, logits, _NO_RESULTS, (*given, *_NO_GRADIENTS[len(given) :]), gradient)
    return gradient


def _run(
    of: CrossEntropy,
    logits: Tensor,
    results: Sequence[int | None],
    given: Sequence[int | None],
    gradient: Tensor | None,
) -> None:
    """
    Args:
        results: where the loss and its terms are to be, on the way there.
        given: where the gradients of the loss and of its terms are.
        gradient: [..., V] to be filled in, on the way back.
    """
    memory, sweep, weight = Memory(), of.sweep, of.target_weight
    num_rows, temperature = sweep.targets.numel(), sweep.temperature
    if temperature is not None:
        temperature = memory.of("temperature", temperature.float(), torch.float32, 1)
    raw = of.room.data_ptr()
    shares = raw + 4 * num_rows * of.num_raw
    if of.scale is None:
        scale = shares + 4 * num_rows * len(of.family.names)
    else:
        scale = memory.of("scale", of.scale, torch.float32, num_rows)
    of_family = _Family(
        sweep.needs,
        sweep.needs_unscaled,
        temperature,
        raw,
        scale,
        None if weight is None else memory.of("target_weight", weight, torch.float32, num_rows),
        shares,
        *results,
        *given,
        *_settling(of),
        *family_values(of.family),
    )
    batch = native_rows.batch_of(memory, logits, sweep, gradient)
    compiled = library()
    assert compiled is not None
    problem = compiled.lossmith_cross_entropy(ctypes.byref(batch), ctypes.byref(of_family))
    native_rows.explain(problem, batch, logits, sweep)


def _settling(of: CrossEntropy) -> tuple[int, int, bool]:
    """How the library is to make the shares; -1 where they are there."""
    if of.settling is None:
        return _SETTLED
    reduction, num_positions, is_nan_if_empty = of.settling
    return REDUCTIONS[reduction], num_positions, is_nan_if_empty
