"""``Plan``: how a linear head is going to be swept, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor

from lossmith.engine.head.sizes import Sizes
from lossmith.options import option, options_of

Strategy = Annotated[Literal["auto", "one_sweep", "two_sweep"], option("how often a linear head is swept")]
MemoryBudget = Annotated[
    int | None, option("bytes of logits held at a time; None for the device's default", above=0)
]


SkipIgnored = Annotated[
    bool | None,
    option("whether tokens without a target are left out of the products; None for a CPU alone"),
]
LogitsDtype = Annotated[
    Literal["wide", "input"], option("dtype of a chunk's logits: fp32 at least, or that of the products")
]
SkipSmallGradients = Annotated[
    float,
    option("share of the gradient of the logits that the products may leave out; on a CPU", low=0, below=0.5),
]


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """How a linear head is swept, and what for; see :func:`lossmith.linear_cross_entropy`.

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.
    """

    strategy: Strategy = "auto"
    memory_budget: MemoryBudget = None
    skip_ignored: SkipIgnored = None
    logits_dtype: LogitsDtype = "wide"
    skip_small_gradients: SkipSmallGradients = 0.0

    def __post_init__(self) -> None:
        for name, kind in _KINDS:
            kind.check(getattr(self, name))

    @property
    def options(self) -> dict[str, Any]:
        """They by name."""
        return {name: getattr(self, name) for name in HEAD_OPTIONS}


_KINDS = tuple((name, declared.kind) for name, declared in options_of(HeadOptions).items())
HEAD_OPTIONS = tuple(name for name, _ in _KINDS)


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
        num_products: matrix products of N V D multiplications each, forward and backward together; the most,
            where small gradients may be left out of them.
        logits_bytes: what the logits of a chunk take.
        accumulator_bytes: what the sum of the weight's gradient takes where it is wider than the weight.
        peak_bytes: the most memory besides inputs and gradients at once, that of statistics [N] left out.
        skip_small_gradients: the share of the gradient of the logits that the products may leave out.

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
    peak_bytes: int
    skip_small_gradients: float = 0.0

    @classmethod
    def of(
        cls,
        sizes: Sizes,
        weight: Tensor,
        *,
        strategy: Literal["one_sweep", "two_sweep"],
        reason: str,
        num_products: float,
        skip_small_gradients: float,
    ) -> Plan:
        """The plan of a sweep of these sizes; ``weight`` [V, D] is the head's."""
        return cls(
            strategy,
            reason,
            num_tokens=sizes.num_tokens,
            hidden_size=weight.shape[1],
            num_classes=weight.shape[0],
            chunk_rows=sizes.rows,
            num_chunks=sizes.num_chunks,
            num_products=num_products,
            logits_bytes=sizes.logits_bytes,
            accumulator_bytes=sizes.accumulator_bytes,
            peak_bytes=sizes.peak_bytes(weight.nbytes, keeps_logits=strategy == "two_sweep"),
            skip_small_gradients=skip_small_gradients,
        )

    @property
    def num_flops(self) -> float:
        """Floating-point operations of the products."""
        return 2.0 * self.num_products * self.num_tokens * self.num_classes * self.hidden_size

    def __str__(self) -> str:
        most = "at most " if self.skip_small_gradients else ""
        products = "product" if self.num_products == 1 else "products"
        return (
            f"{self.strategy}: {self.reason}. {self.num_tokens} tokens in {self.num_chunks} chunks of "
            f"{self.chunk_rows}; {most}{self.num_products:.3g} {products} of N V D = {self.num_tokens} x "
            f"{self.num_classes} x {self.hidden_size} ({self.num_flops / 1e9:.3g} GFLOP); "
            f"{self.peak_bytes / 2**20:.3g} MiB besides the gradients"
        )
