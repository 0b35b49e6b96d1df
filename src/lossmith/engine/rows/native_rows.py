"""The arithmetic on rows, compiled: calls ``rows_native.cpp``.

Where PyTorch makes a dozen parallel passes over a block of rows, this makes one over the
batch. It takes fp32 and bf16 rows on a CPU; ``torch_rows`` takes everything, and takes over
where nothing can be compiled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lossmith.engine.checks import written_over
from lossmith.engine.memory import fresh
from lossmith.engine.native.build import library
from lossmith.engine.native.memory import Memory
from lossmith.engine.statistics.raw import View, closed, raw_dtype, raw_names
from lossmith.engine.sweep import Sweep

TAKES = "fp32 and bf16 logits on a CPU, without a softcap, where a C++ compiler is found"
WRITES_EVERY_ROW = True

_OUTPUTS = (
    "reference", "target_logit", "wrong_log_sum", "wrong_entropy", "centered_sum", "sum_weight",
    "target_weight", "num_finite", "top_wrong_logit", "top_wrong_id", "num_wrong", "candidate_logits",
    "rest_log_sum",
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


class Batch(ctypes.Structure):
    """A batch of rows, as the library takes it."""

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
        ("bad_id", ctypes.c_int64),
    ]


# What the library answers where not all went well; the last of them is that a row found no memory.
_BAD_IDS = {1: "targets", 2: "candidates", 3: "ids of the top wrong answers"}
_NO_MEMORY = 4

# What the gradient is computed from: always, and where one of these has a gradient.
_READ_BACK = ("reference", "wrong_log_sum")
_READ_BACK_FOR = {
    "wrong_entropy": ("wrong_entropy",),
    "top_wrong_logit": ("top_wrong_id",),
    "rest_log_sum": ("rest_log_sum", "top_wrong_id"),
}


def takes(logits: Tensor, softcap: float | None, is_asked_for: bool = False) -> bool:
    """Whether the rows of these logits [..., V] are computed here."""
    return (
        logits.device.type == "cpu"
        and logits.dtype in (torch.float32, torch.bfloat16)
        and softcap is None
        and (logits.stride(-1) == 1 or logits.shape[-1] == 1)
        and library() is not None
    )


def fill_stats(logits: Tensor, sweep: Sweep, views: Sequence[View]) -> None:
    """Fill in the raw statistics of every view."""
    run(logits, sweep, views)


def gradient(logits: Tensor, sweep: Sweep, views: Sequence[View], *, in_place: bool) -> Tensor:
    """The gradient of the logits [N, V], from those of every view's raw statistics; ``in_place`` in the
    memory of the logits."""
    shape = (sweep.targets.numel(), logits.shape[-1])
    into = logits if in_place else fresh(shape, dtype=logits.dtype, device=logits.device, zero=False)
    run(logits, sweep, views, into)
    return into


def run(logits: Tensor, sweep: Sweep, views: Sequence[View], gradient: Tensor | None = None) -> None:
    """Fill in the raw statistics of each view or, with ``gradient`` [N, V], the gradient of the logits.

    Whatever is given, nothing outside these tensors is read or written.

    Args:
        logits: [..., V], fp32 or bf16; each row contiguous, the rows anywhere.
        sweep: which statistics to compute; class weights fp32. Rows without a target are not read: their
            statistics are those of ignored ones, and their gradient 0.
        views: the statistics of each temperature; all fp32, ids int64.

    Raises:
        ValueError: a tensor of another dtype or size, or one that is missing.
        RuntimeError: an id is out of range. All were checked before, so this one has been written over since.
    """
    compiled = library()
    assert compiled is not None
    num_rows = sweep.targets.numel()
    num_candidates = 0 if sweep.candidates is None else sweep.candidates.shape[-1]
    memory = Memory()
    structs = (_View * len(views))()
    for struct, view in zip(structs, views, strict=True):
        struct.needs = int(closed(view.needs))
        if view.temperature is not None:
            struct.temperature = memory.of("temperature", view.temperature.float(), torch.float32, 1)
        missing = [name for name in _wanted(view, gradient is not None) if name not in view.raw]
        if missing or ("candidate_logits" in view.raw and sweep.candidates is None):
            raise ValueError(f"the compiled rows need {', '.join(missing) or 'candidates'}")
        for prefix, values in (("", view.raw), ("g_", view.grads)):
            for name, value in values.items():
                numel = num_rows * (num_candidates if name == "candidate_logits" else 1)
                is_output = gradient is None
                place = memory.of(name, value, raw_dtype(name, torch.float32), numel, is_output=is_output)
                setattr(struct, prefix + name, place)
    batch = batch_of(memory, logits, sweep, gradient)
    batch.views, batch.num_views = structs, len(views)
    explain(compiled.lossmith_sweep(ctypes.byref(batch)), batch, logits, sweep)


def batch_of(memory: Memory, logits: Tensor, sweep: Sweep, gradient: Tensor | None) -> Batch:
    """What the library is told of a batch, but for its views.

    Raises:
        ValueError: a tensor of another dtype or size.
    """
    num_rows, num_classes = sweep.targets.numel(), logits.shape[-1]
    logits, ids, weight = logits.resolve_neg(), sweep.candidates, sweep.class_weight
    rows = offsets = places = weights = into = None
    num_ids = 0 if ids is None else ids.shape[-1]
    if logits.is_contiguous():
        rows = memory.of("logits", logits, logits.dtype, num_rows * num_classes)
    else:
        rows = memory.keep(logits)
        offsets = memory.of("row offsets", _row_offsets(logits), torch.int64, num_rows)
    if ids is not None:
        places = memory.of("candidates", ids, torch.int64, num_rows * num_ids)
    if weight is not None:
        weights = memory.of("class_weight", weight, torch.float32, num_classes)
    if gradient is not None:
        into = memory.of("gradient", gradient, logits.dtype, num_rows * num_classes, is_output=True)
    targets = memory.of("targets", sweep.targets, torch.int64, num_rows)
    return Batch(
        *(rows, offsets, logits.dtype == torch.bfloat16, num_rows, num_classes),
        *(targets, sweep.ignore_index, places, num_ids, weights),
        *(None, 0, torch.get_num_threads(), into),
    )


def explain(problem: int, batch: Batch, logits: Tensor, sweep: Sweep) -> None:
    """
    Raises:
        MemoryError, ValueError, RuntimeError: what the library found wrong, if anything.
    """
    if not problem:
        return
    if problem == _NO_MEMORY:
        raise MemoryError(f"no memory for a row of {logits.shape[-1]} logits")
    if not batch.gradient:
        sweep.check_ids(logits.shape[-1], logits.shape[:-1])  # says which one, and where
    raise written_over(_BAD_IDS[problem], batch.bad_id)


def _wanted(view: View, goes_back: bool) -> Iterable[str]:
    """The raw statistics that are written, or read on the way back."""
    if not goes_back:
        return raw_names(view.needs)
    return (*_READ_BACK, *(name for given in view.grads for name in _READ_BACK_FOR.get(given, ())))


def _row_offsets(logits: Tensor) -> Tensor:
    """[N] where each row begins, in elements from the first."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return offsets.reshape(-1)
