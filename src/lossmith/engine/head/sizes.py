"""``Sizes``: how many tokens' logits a sweep of a linear head holds at a time, and what memory it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lossmith.engine.head.factors import Factors
from lossmith.engine.head.packing import Packing
from lossmith.engine.head.products import multiplies_halves
from lossmith.engine.head.small_gradients import temporary_bytes

# Bytes of logits held at a time. On a CPU larger chunks are hardly faster. On an accelerator small ones leave
# it idle, and each reads and writes the whole sum of the weight's gradient: there it is as much as that sum
# takes, where that is more.
MEMORY_BUDGET = {"cpu": 52 * 2**20}
MEMORY_BUDGET_ELSEWHERE = 512 * 2**20

# On an accelerator the rows of a chunk fill whole tiles of a product, and each begins on a boundary of 128
# bytes or more: rows of V = 50257 halves would be loaded two bytes at a time.
ROWS_OF_A_TILE = 128
ALIGNED_ELEMENTS = 64

# Elements of a gradient that are narrowed at a time on a CPU.
NARROWED_ELEMENTS = 2**20


def is_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def rows_of_a_chunk(
    num_rows: int,
    num_classes: int,
    itemsize: int,
    device: torch.device,
    memory_budget: int | None,
    *,
    besides: int = 0,
    sum_bytes: int = 0,
    accumulator: int = 0,
) -> int:
    """How many rows of logits are held at a time: what the budget holds, spread evenly over the chunks. On an
    accelerator one chunk holds all where that takes no more memory than several and the sum over them.

    Args:
        num_rows: N.
        num_classes: V, or the elements from one row to the next.
        itemsize: bytes of an element.
        memory_budget: bytes of logits held at a time.
        besides: bytes that each element takes elsewhere.
        sum_bytes: what each chunk reads and writes of the weight's gradient.
        accumulator: bytes of the sum over chunks, which one chunk does without.
    """
    on_cpu = is_cpu(device)
    default = MEMORY_BUDGET["cpu"] if on_cpu else max(MEMORY_BUDGET_ELSEWHERE, sum_bytes)
    most = max(1, (memory_budget or default) // (num_classes * itemsize))
    tile = 1 if on_cpu or most < ROWS_OF_A_TILE else ROWS_OF_A_TILE
    most -= most % tile
    if not on_cpu and (num_rows - most) * num_classes * (itemsize + besides) <= accumulator:
        return max(1, num_rows)
    num_chunks = max(1, math.ceil(num_rows / most))
    rows = max(1, math.ceil(num_rows / num_chunks))
    return rows if num_chunks == 1 else math.ceil(rows / tile) * tile


@dataclass(frozen=True)
class Sizes:
    """What a sweep of a linear head holds at a time.

    Attributes:
        num_tokens: N, those that take part.
        rows: tokens of a chunk.
        stride: elements from one row of its logits to the next.
        logits_bytes: its logits.
        narrowed_bytes: their gradient in the dtype of the products, where that is elsewhere in memory.
        rows_bytes: its hidden states and their gradient, where they are copies.
        weight_bytes: the weight in the dtype of the products, where it has another.
        accumulator_bytes: the sum of the weight's gradient over chunks, where it is wider than the weight.
        skipping_bytes: what it takes to leave small gradients out.
    """

    num_tokens: int
    rows: int
    stride: int
    logits_bytes: int
    narrowed_bytes: int
    rows_bytes: int
    weight_bytes: int
    accumulator_bytes: int
    skipping_bytes: int

    @classmethod
    def of(cls, factors: Factors, num_tokens: int, packing: Packing) -> Sizes:
        """
        Args:
            factors: what the logits are made of.
            num_tokens: how many tokens take part.
            packing: which do.
        """
        (num_classes, size), dtype, device = factors.weight.shape, factors.compute_dtype, factors.device
        itemsize, narrow = factors.logits_dtype.itemsize, dtype.itemsize
        on_cpu = is_cpu(device)
        stride = num_classes if on_cpu else -(-num_classes // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS
        # halves that are not multiplied as they are, but widened
        made_in = dtype if multiplies_halves(dtype, device) else factors.wide
        is_narrowed = dtype == made_in != factors.logits_dtype
        sum_bytes = num_classes * size * factors.wide.itemsize if factors.sums_weight else 0
        accumulator = sum_bytes if factors.weight.dtype != factors.wide else 0
        # even for a single chunk
        needs_wide = on_cpu or factors.weight.dtype != dtype or factors.is_lifted
        rows = rows_of_a_chunk(
            num_tokens,
            stride,
            itemsize,
            device,
            factors.memory_budget,
            besides=0 if on_cpu or not is_narrowed else narrow,
            sum_bytes=sum_bytes,
            accumulator=0 if needs_wide else accumulator,
        )
        narrowed = rows * stride
        if on_cpu:
            narrowed = min(narrowed, max(NARROWED_ELEMENTS, stride))
        skips = factors.skip_small_gradients > 0
        kept = factors.hidden.dtype
        leaves_out = packing.positions is not None
        copies = narrow * (kept != dtype or leaves_out or not packing.is_packed)
        copies += made_in.itemsize * (kept != made_in or leaves_out) + kept.itemsize * (kept != made_in)
        return cls(
            num_tokens=num_tokens,
            rows=rows,
            stride=stride,
            logits_bytes=rows * stride * itemsize,
            narrowed_bytes=narrowed * narrow if is_narrowed else 0,
            rows_bytes=rows * size * copies,
            weight_bytes=num_classes * size * narrow if factors.weight.dtype != dtype else 0,
            accumulator_bytes=accumulator if needs_wide or rows < num_tokens else 0,
            skipping_bytes=temporary_bytes(rows, num_classes, size, factors.wide.itemsize) if skips else 0,
        )

    @property
    def num_chunks(self) -> int:
        return -(-self.num_tokens // self.rows)

    def peak_bytes(self, gradient_bytes: int, *, keeps_logits: bool) -> int:
        """The most memory besides inputs and gradients at once.

        Args:
            gradient_bytes: the weight's gradient, which takes the place of its sum.
            keeps_logits: whether the logits are still there then.
        """
        swept = self.logits_bytes + self.narrowed_bytes + self.rows_bytes + self.accumulator_bytes
        if self.accumulator_bytes:
            finished = self.accumulator_bytes + self.logits_bytes * keeps_logits
            swept = max(swept - gradient_bytes, finished)
        return self.weight_bytes + self.skipping_bytes + swept
