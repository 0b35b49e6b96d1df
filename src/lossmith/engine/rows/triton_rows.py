"""The arithmetic on rows on a GPU: launches the Triton kernels beside this file.

Two kernels do what PyTorch's operations do in dozens: the statistics read the logits once, the gradient reads
them and writes itself. Triton is imported with the first launch. With ``TRITON_INTERPRET=1`` in the
environment the kernels run on CPU tensors, slowly, where ``backend="triton"`` asks for them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.checks import check_ids_again
from lossmith.engine.statistics.raw import GROUP_OF, View
from lossmith.engine.sweep import SAVED, Sweep

TAKES = "fp16, bf16 and fp32 logits on a GPU, where triton is installed (pip install 'lossmith[kernels]')"
WRITES_EVERY_ROW = True
HAS_TRITON = importlib.util.find_spec("triton") is not None

# The oldest NVIDIA processors that Triton compiles for.
OLDEST = (8, 0)
VECTOR_BYTES = 16

# A product and a sum are never one operation, so that both directions round alike; and of what ``debug``
# turns on, only the kernels' own assertions, about ids.
OPTIONS = {"enable_fp_fusion": False, "debug": True, "sanitize_overflow": False}

GRADS = {
    "g_target": "target_logit",
    "g_log_sum": "wrong_log_sum",
    "g_entropy": "wrong_entropy",
    "g_centered": "centered_sum",
    "g_top": "top_wrong_logit",
    "g_rest": "rest_log_sum",
}


@dataclass(frozen=True)
class Sizes:
    """How much of a row a program has at a time.

    Attributes:
        lanes: that keep sums of their own; each loads a vector of 16 bytes from a tile.
        tile: elements of the gradient.
        candidates: ids.
        warps: threads, in 32 or 64.
    """

    lanes: int
    tile: int
    candidates: int
    warps: int


# By how the kernels run, and by the bytes of an element. Enough loads in flight to hide the memory behind
# them; as many registers as leave room for two programs beside each other.
SIZES = {
    ("cuda", 2): Sizes(512, 4096, 32, 8),
    ("cuda", 4): Sizes(512, 2048, 32, 8),
    ("hip", 2): Sizes(512, 4096, 32, 4),
    ("hip", 4): Sizes(512, 2048, 32, 4),
    ("interpreter", 2): Sizes(64, 512, 8, 1),
    ("interpreter", 4): Sizes(64, 512, 8, 1),
}


def takes(logits: Tensor, softcap: float | None, is_asked_for: bool = False) -> bool:
    """Whether the rows of these logits [..., V] are computed here; on a CPU, interpreted, only if asked
    for."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        return False
    return runs_on(logits.device, logits.dtype, is_asked_for)


def runs_on(device: torch.device, dtype: torch.dtype, is_asked_for: bool = False) -> bool:
    """Whether the kernels run there; on a CPU, interpreted, only if asked for."""
    if not HAS_TRITON or dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    if device.type == "cpu":
        return is_asked_for and is_interpreted()
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def fill_stats(logits: Tensor, sweep: Sweep, views: Sequence[View]) -> None:
    """Write the raw statistics of every view, those of ignored rows too."""
    from lossmith.engine.rows.triton_statistics import statistics_of_row

    rows = Rows.of(logits)
    arguments: dict[str, Any] = {**rows.arguments(sweep), **candidates_of(sweep)}
    arguments["temperature"] = _number(views[0].temperature, logits)
    for view, suffix in zip([*views, None][:2], ("", "_2"), strict=True):
        for name in GROUP_OF:
            arguments[name + suffix] = None if view is None else view.raw.get(name)
    sizes = sizes_for(logits)
    constants = {
        "LANES": sizes.lanes,
        "WIDTH": VECTOR_BYTES // logits.itemsize,
        "CANDIDATES": sizes.candidates,
    }
    launch(statistics_of_row, rows.num, logits, {**arguments, **constants})


def gradient(logits: Tensor, sweep: Sweep, views: Sequence[View], *, in_place: bool) -> Tensor:
    """The gradient of the logits [N, V], from those of every view's raw statistics; ``in_place`` in the
    memory of the logits."""
    from lossmith.engine.rows import triton_gradient as kernels

    num_classes = logits.shape[-1]
    check_ids_again("targets", sweep.targets, num_classes, exempt=sweep.ignore_index)
    if sweep.candidates is not None:
        check_ids_again("candidates", sweep.candidates, num_classes, exempt=-1)
    rows = Rows.of(logits)
    shape = (rows.num, num_classes)
    out = logits if in_place else torch.empty(shape, dtype=logits.dtype, device=logits.device)
    sizes = sizes_for(logits)
    arguments = rows.arguments(sweep) | {"temperature": _number(views[0].temperature, logits)}
    of_candidates: dict[str, Any] = {}
    for view, suffix in zip([*views, None][:2], ("", "_2"), strict=True):
        arguments |= _read_back(view, suffix)
        found = None if view is None else view.grads.get("candidate_logits")
        of_candidates["g_candidates" + suffix] = in_a_row(found)
    has_candidates = any(given is not None and given.numel() for given in of_candidates.values())

    ids, values, blocks = candidates_of(sweep), None, 0
    if has_candidates:
        num_candidates = ids["num_candidates"]
        blocks = rows.num * -(-num_candidates // sizes.candidates)
        values = torch.empty((rows.num, num_candidates), dtype=torch.float32, device=logits.device)
        given = {**arguments, **ids, **of_candidates, "values": values, "SIZE": sizes.candidates}
        launch(kernels.gradient_of_candidates, blocks, logits, given)

    tiles = -(-(num_classes + VECTOR_BYTES // logits.itemsize - 1) // sizes.tile)
    into = {"out": out, "out_stride": out.stride(0)}
    constants = {"ALIGNED": rows.is_aligned_with(out), "SIZE": sizes.tile}
    launch(kernels.gradient_of_tile, rows.num * tiles, logits, {**arguments, **into, **constants})

    if has_candidates:
        names = ("num_classes", "targets", "ignore_index")
        given = {name: arguments[name] for name in names} | into | ids
        launch(kernels.put_candidates, blocks, logits, {**given, "values": values, "SIZE": sizes.candidates})
    return out


def sample(logits: Tensor, seeds: Tensor, softcap: float | None) -> Tensor:
    """[N] an id of each row of logits [..., V], drawn with its seed."""
    from lossmith.engine.rows.triton_sampling import sample_of_row

    rows, sizes = Rows.of(logits), sizes_for(logits)
    ids = torch.empty(rows.num, dtype=torch.int64, device=logits.device)
    arguments = {
        **rows.place,
        "seeds": seeds.contiguous(),
        "softcap": 1.0 if softcap is None else float(softcap),
        "ids": ids,
        "CAPPED": softcap is not None,
        "LANES": sizes.lanes,
        "WIDTH": VECTOR_BYTES // logits.itemsize,
    }
    launch(sample_of_row, rows.num, logits, arguments)
    return ids


@dataclass(frozen=True)
class Rows:
    """Where the rows of logits [..., V] lie: row i at (i // inner) outer_stride + (i % inner)
    inner_stride."""

    logits: Tensor
    num: int
    inner: int
    outer_stride: int
    inner_stride: int

    @classmethod
    def of(cls, logits: Tensor) -> Rows:
        """Of logits [..., V]; as they lie in memory, where their leading dimensions are two strides or
        fewer."""
        logits = logits.resolve_neg()
        lead = _collapsed(logits)
        if len(lead) > 2:
            logits = logits.contiguous()
            lead = _collapsed(logits)
        (outer, outer_stride), (inner, inner_stride) = [(1, 0), (1, 0), *lead][-2:]
        return cls(logits, outer * inner, inner, outer_stride, inner_stride)

    def is_aligned_with(self, out: Tensor) -> bool:
        """Whether each row of ``out`` [N, V] begins as far past a boundary of 16 bytes as the row here."""
        stride, outer = out.stride(0), self.num > self.inner
        apart = [self.logits.data_ptr() - out.data_ptr()]
        apart.append((self.inner_stride - stride) * out.itemsize if self.inner > 1 else 0)
        apart.append((self.outer_stride - self.inner * stride) * out.itemsize if outer else 0)
        return all(distance % VECTOR_BYTES == 0 for distance in apart)

    @property
    def place(self) -> dict[str, Any]:
        """Where they are, as kernels take it."""
        return {
            "logits": self.logits,
            "inner": self.inner,
            "outer_stride": self.outer_stride,
            "inner_stride": self.inner_stride,
            "num_classes": self.logits.shape[-1],
        }

    def arguments(self, sweep: Sweep) -> dict[str, Any]:
        """What all kernels of a sweep take."""
        weight = sweep.class_weight
        if weight is not None:
            weight = weight.to(self.logits.device, torch.float32).contiguous()
        return {
            **self.place,
            "targets": sweep.targets.contiguous(),
            "ignore_index": sweep.ignore_index,
            "class_weight": weight,
            "softcap": 1.0 if sweep.softcap is None else float(sweep.softcap),
            "CAPPED": sweep.softcap is not None,
        }


def _collapsed(logits: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of the leading dimensions, of as few as say where the rows are."""
    lead: list[tuple[int, int]] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if lead and lead[-1][1] == size * stride:
            lead[-1] = (lead[-1][0] * size, stride)
        else:
            lead.append((size, stride))
    return lead


def candidates_of(sweep: Sweep) -> dict[str, Any]:
    ids = None if sweep.candidates is None else sweep.candidates.contiguous()
    return {"candidates": ids, "num_candidates": 0 if ids is None else ids.shape[-1]}


def _read_back(view: View | None, suffix: str) -> dict[str, Tensor | None]:
    """What the gradient is computed from; None where nothing asks for it."""
    found: dict[str, Tensor | None] = {}
    for name in SAVED:
        found[name + suffix] = None if view is None else in_a_row(view.raw.get(name))
    for name, of in GRADS.items():
        found[name + suffix] = None if view is None else in_a_row(view.grads.get(of))
    return found


def in_a_row(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.resolve_neg().contiguous()


def _number(value: Tensor | None, like: Tensor) -> Tensor | None:
    """A number where the kernels read it, which no host waits for."""
    return None if value is None else value.to(like.device, torch.float32)


def sizes_for(logits: Tensor) -> Sizes:
    kind = "interpreter" if logits.device.type == "cpu" else "cuda" if torch.version.hip is None else "hip"
    return SIZES[kind, logits.itemsize]


def launch(
    kernel: Any, num_programs: int, like: Tensor, arguments: Mapping[str, Any], warps: int | None = None
) -> None:
    """Start a kernel on a tensor's device, whichever is current, in its current stream."""
    if not num_programs:
        return
    warps = warps or sizes_for(like).warps
    guard = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
    with guard:
        try:
            kernel[(num_programs,)](**arguments, num_warps=warps, **OPTIONS)
        except Exception as error:
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a kernel could not be made while a CUDA graph is captured; before the capture call "
                    "lossmith.warm_up(loss, ...) with the inputs of a step"
                ) from error
            raise
