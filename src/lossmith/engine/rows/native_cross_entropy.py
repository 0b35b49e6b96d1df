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
        *FAMILY_FIELDS,
    ]


_NO_RESULTS, _NO_GRADIENTS = (None,) * (2 + _MOST_TERMS), (None,) * (1 + _MOST_TERMS)


def forward(of: CrossEntropy, logits: Tensor) -> list[Tensor]:
    """Fill in its statistics and shares; returns the loss and, where there are several, its terms.

    Raises:
        ValueError: an id is out of range, or a tensor is not what the library takes it for.
    """
    num_terms = len(of.family.names)
    parts = [of.scale.new_empty(()) for _ in range(num_terms)]
    total = of.scale.new_empty(()) if num_terms > 1 else parts[0]
    none = _NO_GRADIENTS[1 + num_terms :]
    results = of.shares.data_ptr(), total.data_ptr(), *(part.data_ptr() for part in parts), *none
    _run(of, logits, results, _NO_GRADIENTS, None)
    return [total, *parts] if num_terms > 1 else parts


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
        results: where shares, the loss and its terms are to be, on the way there.
        given: where the gradients of the loss and of its terms are.
        gradient: [..., V] to be filled in, on the way back.
    """
    memory, sweep, weight = Memory(), of.sweep, of.target_weight
    num_rows, temperature = sweep.targets.numel(), sweep.temperature
    if temperature is not None:
        temperature = memory.of("temperature", temperature.float(), torch.float32, 1)
    of_family = _Family(
        sweep.needs,
        sweep.needs_unscaled,
        temperature,
        memory.of("statistics", of.raw, torch.float32, len(sweep.names) * num_rows, is_output=True),
        memory.of("scale", of.scale, torch.float32, num_rows),
        None if weight is None else memory.of("target_weight", weight, torch.float32, num_rows),
        *results,
        *given,
        *family_values(of.family),
    )
    batch = native_rows.batch_of(memory, logits, sweep, gradient)
    compiled = library()
    assert compiled is not None
    problem = compiled.lossmith_cross_entropy(ctypes.byref(batch), ctypes.byref(of_family))
    native_rows.explain(problem, batch, logits, sweep)
