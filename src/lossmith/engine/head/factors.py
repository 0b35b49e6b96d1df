"""``Factors``: what a linear head's logits are the product of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lossmith.engine.rows.blocks import accumulation_dtype


@dataclass(frozen=True, eq=False)
class Factors:
    """What logits are the product of, hidden @ weight.T + bias, and how it is computed.

    Attributes:
        hidden: [..., D].
        weight: [V, D].
        bias: [V], or None.
        compute_dtype: that of the products.
        memory_budget: bytes of logits held at a time; None for the device's default.
        sums_weight: whether the weight's gradient is going to be summed.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    compute_dtype: torch.dtype
    memory_budget: int | None
    sums_weight: bool = False

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def wide(self) -> torch.dtype:
        """That of the logits and the statistics: fp32 at least."""
        return accumulation_dtype(self.compute_dtype)

    @property
    def logits_dtype(self) -> torch.dtype:
        """That of a chunk's logits."""
        return self.wide
