"""The arithmetic on rows, compiled: calls ``rows_native.cpp``.

Where PyTorch makes a dozen parallel passes over a block of rows, this makes one over the
batch. It takes fp32 and bf16 rows on a CPU; ``rows_torch`` takes everything, and takes over
where nothing can be compiled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lossmith.engine.native import library
from lossmith.engine.raw import View, closed

_OUTPUTS = (
    "reference", "target_logit", "wrong_log_sum", "wrong_entropy", "centered_sum", "sum_weight", "num_finite",
    "top_wrong_logit", "top_wrong_id", "num_wrong", "candidate_logits", "rest_log_sum",
)  # fmt: skip
_GRADS = (
    "target_logit", "wrong_log_sum", "wrong_entropy", "centered_sum", "top_wrong_logit", "candidate_logits",
    "rest_log_sum",
)  # fmt: skip


class _View(ctypes.Structure):
    _fields_ = [
        ("temperature", ctypes.c_void_p),
        ("needs", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _OUTPUTS),
        *(("g_" + name, ctypes.c_void_p) for name in _GRADS),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("row_offsets", ctypes.c_void_p),
        ("is_bf16", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("num_classes", ctypes.c_int64),
        ("targets", ctypes.c_void_p),
        ("ignore_index", ctypes.c_int64),
        ("candidates", ctypes.c_void_p),
        ("num_candidates", ctypes.c_int64),
        ("class_weight", ctypes.c_void_p),
        ("views", ctypes.POINTER(_View)),
        ("num_views", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
        ("gradient", ctypes.c_void_p),
    ]


def takes(logits: Tensor, softcap: float | None) -> bool:
    """Whether the rows of these logits [..., V] are computed here."""
    return (
        logits.device.type == "cpu"
        and logits.dtype in (torch.float32, torch.bfloat16)
        and softcap is None
        and (logits.stride(-1) == 1 or logits.shape[-1] == 1)
        and library() is not None
    )


def sweep(
    logits: Tensor,
    targets: Tensor,
    candidates: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    views: Sequence[View],
    gradient: Tensor | None = None,
) -> None:
    """Fill in the raw statistics of each view or, with ``gradient`` [N, V], the gradient of the logits.

    Args:
        logits: [..., V], fp32 or bf16; each row contiguous, the rows anywhere.
        targets: [N] int64 ids in range, or ``ignore_index``: those rows are not read, their
            statistics not touched and their gradient 0.
        candidates: [N, K] int64 ids, -1 where there is none.
        class_weight: [V] fp32.
        views: what is asked of the rows; all fp32, ids int64.
    """
    compiled = library()
    assert compiled is not None
    structs = (_View * len(views))()
    alive: list[Tensor] = []  # what the pointers below point to
    for struct, view in zip(structs, views, strict=True):
        struct.needs = int(closed(view.needs))
        upstream = {"g_" + name: g for name, g in view.grads.items()}
        temperature = None if view.temperature is None else view.temperature.float()
        named = {"temperature": temperature, **view.raw, **upstream}
        for name, value in named.items():
            if value is not None:
                setattr(struct, name, _pointer(value, alive))
    batch = _Batch(
        logits=logits.data_ptr(),
        is_bf16=logits.dtype == torch.bfloat16,
        row_offsets=_pointer(_row_offsets(logits), alive),
        num_rows=targets.numel(),
        num_classes=logits.shape[-1],
        targets=_pointer(targets, alive),
        ignore_index=ignore_index,
        candidates=_pointer(candidates, alive),
        num_candidates=0 if candidates is None else candidates.shape[-1],
        class_weight=_pointer(class_weight, alive),
        views=structs,
        num_views=len(views),
        num_threads=torch.get_num_threads(),
        gradient=_pointer(gradient, alive),
    )
    compiled.lossmith_sweep(ctypes.byref(batch))


def _row_offsets(logits: Tensor) -> Tensor:
    """[N] where each row begins, in elements from the first."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return offsets.reshape(-1)


def _pointer(tensor: Tensor | None, alive: list[Tensor]) -> int | None:
    """Where the tensor's elements lie in a row; what has to be copied for that is kept in ``alive``."""
    if tensor is None:
        return None
    alive.append(tensor.contiguous())
    return alive[-1].data_ptr()
