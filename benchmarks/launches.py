"""How many kernels a training step launches, and what it moves, counted without a device.

    python benchmarks/launches.py

Steps run on meta tensors, which have a shape and no memory: every operator that writes something counts as
one launch, views as none. The passes over the vocabulary are the operators ``lossmith::row_stats`` and
``lossmith::row_grad``, or what stands for them over a linear head, counted as one launch each. What operators
read and write of the logits is what their arguments and results hold. The first steps, which look for
mistakes in the wiring, are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lossmith
from lossmith.engine.rows import backends
from lossmith.engine.statistics.raw import View
from lossmith.engine.sweep import Sweep

ROWS, LENGTH, NUM_CLASSES, SIZE = 8, 128, 50304, 64
NUM_TOKENS, CHUNK = ROWS * LENGTH, 128
FOUR = {"label_smoothing": 0.1, "z_loss": 1e-4, "focal_gamma": 2.0, "confidence_penalty": 0.1}
# Memory without a kernel that fills it.
ALLOCATE = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
}
# Their first argument is written and not read.
FILL = {"aten::copy_", "aten::fill_", "aten::zero_"}


class Launches(TorchDispatchMode):
    """Counts what runs inside it.

    Args:
        large: elements of the logits; or whether a tensor is of logits.

    Attributes:
        counts: launches by operator.
        moved: bytes of logits that were read or written.
    """

    def __init__(self, large: int | Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.is_large = large if callable(large) else lambda tensor: tensor.numel() >= large
        self.counts: Counter[str] = Counter()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
        is_view = any(not alias.is_write for alias in aliases) or name == "aten::detach"
        if not is_view and name not in ALLOCATE:
            self.counts[name] += 1
            moved = tree_leaves(self._moved(func, args, kwargs or {}, result))
            tensors = [t for t in moved if isinstance(t, Tensor) and self.is_large(t)]
            self.moved += sum(t.numel() * t.itemsize for t in tensors)
        return result

    @staticmethod
    def _moved(func: Any, args: Any, kwargs: Any, result: Any) -> list[Any]:
        """What an operator reads, and what it writes."""
        read, written = [], []
        for place, argument in enumerate(func._schema.arguments):
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes:
                written.append(given)
            is_filled = argument.is_out or (place == 0 and func.name().split(".")[0] in FILL)
            if not (writes and is_filled):
                read.append(given)
        return [read, written or result]


@torch.library.custom_op("launches::row_stats", mutates_args=("statistics",))
def row_stats(logits: Tensor, statistics: Sequence[Tensor]) -> None:
    """A kernel that reads logits and writes statistics."""


@torch.library.custom_op("launches::row_grad", mutates_args=("gradient",))
def row_grad(gradient: Tensor) -> None:
    """A kernel that reads logits and writes their gradient over them."""


class Kernels:
    """The arithmetic on rows as a GPU has it: a kernel for the statistics, one for the gradient."""

    TAKES = "meta tensors"
    WRITES_EVERY_ROW = True

    @staticmethod
    def takes(logits: Tensor, softcap: float | None, is_asked_for: bool = False) -> bool:
        return logits.device.type == "meta"

    @staticmethod
    def fill_stats(logits: Tensor, sweep: Sweep, views: Sequence[View]) -> None:
        row_stats(logits, [value for view in views for value in view.raw.values()])

    @staticmethod
    def gradient(logits: Tensor, sweep: Sweep, views: Sequence[View], *, in_place: bool) -> Tensor:
        gradient = logits if in_place else torch.empty(logits.shape, dtype=logits.dtype, device="meta")
        row_grad(gradient)
        return gradient


@contextmanager
def kernels() -> Iterator[None]:
    """Rows of meta tensors are computed by :class:`Kernels`, for a linear head too."""
    with mock.patch.dict(backends.BACKENDS, {"meta": Kernels, **backends.BACKENDS}, clear=True):
        yield


@dataclass
class Step:
    """Launches of one step, and bytes per logit."""

    forward: int
    backward: int
    bytes_per_element: float

    @property
    def total(self) -> int:
        return self.forward + self.backward


def count(loss: Callable[..., Tensor], **inputs: Any) -> Step:
    """The launches of a step of ``loss(logits, targets, **inputs)`` on bf16 logits, the third of three."""
    logits = torch.empty(ROWS, LENGTH, NUM_CLASSES, device="meta", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(ROWS, LENGTH, device="meta", dtype=torch.long)
    for _ in range(3):
        logits.grad = None
        forward, backward = Launches(logits.numel()), Launches(logits.numel())
        with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):
            with forward:
                value = loss(logits, targets, **inputs)
            with backward:
                value.backward()
    moved = (forward.moved + backward.moved) / logits.numel()
    return Step(sum(forward.counts.values()), sum(backward.counts.values()), moved)


def unified(**options: Any) -> lossmith.UnifiedLoss:
    """The loss with most of its parts."""
    return lossmith.UnifiedLoss(
        NUM_CLASSES,
        SIZE,
        label_smoothing=0.1,
        z_loss=1e-4,
        use_ngram_penalty=True,
        use_immediate_repetition_penalty=True,
        use_focal_loss=True,
        use_auxiliary_loss=True,
        eos_token_id=0,
        **options,
    ).to("meta")


def pipeline() -> lossmith.LossModifierPipeline:
    """Entropy weights and smoothed targets."""
    modifiers = [lossmith.EntropyModifier({}), lossmith.TargetSmoothingModifier({})]
    return lossmith.LossModifierPipeline(modifiers).to("meta")


def given() -> dict[str, Tensor]:
    """What UnifiedLoss takes besides."""
    return {"input_ids": torch.zeros(ROWS, LENGTH, device="meta", dtype=torch.long)}


def f_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


PATHS: dict[str, Callable[[], Step]] = {
    "F.cross_entropy": lambda: count(f_cross_entropy),
    "cross-entropy": lambda: count(lossmith.CrossEntropyLoss()),
    "cross-entropy, all four": lambda: count(lossmith.CrossEntropyLoss(**FOUR)),
    "cross-entropy at a temperature, with a mask and class weights": lambda: count(
        lossmith.CrossEntropyLoss(temperature=0.7, class_weight=torch.ones(NUM_CLASSES)).to("meta"),
        mask=torch.ones(ROWS, LENGTH, device="meta", dtype=torch.bool),
    ),
    "NVAMP": lambda: count(lossmith.NVAMPLoss()),
    "pipeline: entropy, smoothing": lambda: count(pipeline()),
    "UnifiedLoss, most parts": lambda: count(unified(), **given()),
    "UnifiedLoss, adaptive temperature": lambda: count(unified(adaptive_temperature=True), **given()),
}


def of_logits(tensor: Tensor) -> bool:
    """Whether a tensor is a chunk's logits, or their gradient."""
    return tensor.dim() == 2 and NUM_CLASSES in tensor.shape and SIZE not in tensor.shape


def count_head(criterion: lossmith.Objective, rows: int = NUM_TOKENS, **options: Any) -> Step:
    """The launches of a step over a linear head in bf16, ``rows`` tokens at a time; the third of three."""
    hidden, weight = (
        torch.empty(*shape, SIZE, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for shape in ((ROWS, LENGTH), (NUM_CLASSES,))
    )
    targets = torch.zeros(ROWS, LENGTH, device="meta", dtype=torch.long)
    head = {"hidden_states": hidden, "lm_head_weight": weight, **options}
    itemsize = 2 if options.get("logits_dtype") == "input" else 4
    for _ in range(3):
        hidden.grad = weight.grad = None
        forward, backward = Launches(of_logits), Launches(of_logits)
        with kernels():
            with forward:
                loss = criterion(targets=targets, memory_budget=rows * NUM_CLASSES * itemsize, **head)
            with backward:
                loss.backward()
    moved = (forward.moved + backward.moved) / (NUM_TOKENS * NUM_CLASSES)
    return Step(sum(forward.counts.values()), sum(backward.counts.values()), moved)


CE = lossmith.CrossEntropyLoss
HEAD_PATHS: dict[str, Callable[[], Step]] = {
    "cross-entropy, 1 chunk": lambda: count_head(CE()),
    "cross-entropy, 8 chunks": lambda: count_head(CE(), CHUNK),
    'the same, `logits_dtype="input"`': lambda: count_head(CE(), CHUNK, logits_dtype="input"),
    "all four, 1 chunk": lambda: count_head(CE(**FOUR)),
    "all four, 8 chunks": lambda: count_head(CE(**FOUR), CHUNK),
    "all four, 8 chunks, two sweeps": lambda: count_head(CE(**FOUR), CHUNK, strategy="two_sweep"),
    "NVAMP, 8 chunks": lambda: count_head(lossmith.NVAMPLoss(), CHUNK),
}


def row(name: str, step: Step) -> str:
    """A line of the table."""
    return f"| {name} | {step.forward} | {step.backward} | {step.bytes_per_element:.3g} |"


def main() -> None:
    print("| step | launches forward | backward | bytes per bf16 logit |")
    print("| --- | --- | --- | --- |")
    for name, counted in PATHS.items():
        print(row(name, counted()))
    print("| step over a head | launches forward | backward | bytes per logit |")
    print("| --- | --- | --- | --- |")
    for name, counted in HEAD_PATHS.items():
        print(row(name, counted()))


if __name__ == "__main__":
    main()
