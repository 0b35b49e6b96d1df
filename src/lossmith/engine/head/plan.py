"""``Plan``: how a linear head is going to be swept, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from lossmith.options import kind_of, option

Strategy = Annotated[Literal["auto", "one_sweep", "two_sweep"], option("how often a linear head is swept")]
MemoryBudget = Annotated[
    int | None, option("bytes of logits held at a time; None for the device's default", above=0)
]

# Bytes of logits held at a time. On a CPU larger chunks are hardly faster; on an accelerator small ones
# leave it idle.
MEMORY_BUDGET = {"cpu": 52 * 2**20}
MEMORY_BUDGET_ELSEWHERE = 512 * 2**20


def check_strategy(strategy: str, memory_budget: int | None) -> None:
    """
    Raises:
        ValueError: an unknown strategy, or a budget that holds nothing.
        TypeError: a budget that is no number of bytes.
    """
    _STRATEGY.check(strategy)
    _MEMORY_BUDGET.check(memory_budget)


_STRATEGY, _MEMORY_BUDGET = kind_of(Strategy, "strategy"), kind_of(MemoryBudget, "memory_budget")


def rows_of_a_chunk(
    num_rows: int, num_classes: int, itemsize: int, device: torch.device, memory_budget: int | None
) -> int:
    """How many rows of logits are held at a time: what the budget holds, spread evenly over the chunks."""
    budget = memory_budget or MEMORY_BUDGET.get(device.type, MEMORY_BUDGET_ELSEWHERE)
    most = max(1, budget // (num_classes * itemsize))
    num_chunks = max(1, math.ceil(num_rows / most))
    return max(1, math.ceil(num_rows / num_chunks))


@dataclass(frozen=True)
class Plan:
    """How a linear head is going to be swept.

    Attributes:
        strategy: ``one_sweep`` or ``two_sweep``.
        reason: why this one.
        num_tokens: tokens with a target, N; the others take no part in any product.
        hidden_size: D.
        num_classes: V.
        chunk_rows: tokens whose logits are held at a time.
        num_chunks: how many times.
        num_products: matrix products of N V D multiplications each, forward and backward together.
        logits_bytes: what the logits of a chunk take.
        accumulator_bytes: what the sum of the weight's gradient takes where it is wider than the weight.

    Example:
        >>> import torch, lossmith
        >>> hidden = torch.randn(64, 16, requires_grad=True)
        >>> weight = torch.randn(1000, 16, requires_grad=True)
        >>> plan = lossmith.linear_cross_entropy.explain(hidden, weight, torch.zeros(64, dtype=torch.long))
        >>> plan.strategy, plan.num_products
        ('one_sweep', 3.0)
    """

    strategy: Literal["one_sweep", "two_sweep"]
    reason: str
    num_tokens: int
    hidden_size: int
    num_classes: int
    chunk_rows: int
    num_chunks: int
    num_products: float
    logits_bytes: int
    accumulator_bytes: int

    @property
    def num_flops(self) -> float:
        """Floating-point operations of the products."""
        return 2.0 * self.num_products * self.num_tokens * self.num_classes * self.hidden_size

    def __str__(self) -> str:
        extra = (self.logits_bytes + self.accumulator_bytes) / 2**20
        products = "product" if self.num_products == 1 else "products"
        return (
            f"{self.strategy}: {self.reason}. {self.num_tokens} tokens in {self.num_chunks} chunks of "
            f"{self.chunk_rows}; {self.num_products:.3g} {products} of N V D = {self.num_tokens} x "
            f"{self.num_classes} x {self.hidden_size} ({self.num_flops / 1e9:.3g} GFLOP); {extra:.3g} MiB "
            "besides the gradients"
        )
