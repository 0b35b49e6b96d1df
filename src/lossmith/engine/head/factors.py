"""``Factors``: what a linear head's logits are the product of."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

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
        skip_ignored: whether tokens without a target are left out; None for a CPU alone.
        narrow_logits: whether a chunk's logits have the dtype of the products.
        sums_weight: whether the weight's gradient is going to be summed.
        skip_small_gradients: the share of the gradient that may be left out of the products; 0 for none.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    compute_dtype: torch.dtype
    memory_budget: int | None
    skip_ignored: bool | None = None
    narrow_logits: bool = False
    sums_weight: bool = False
    skip_small_gradients: float = 0.0

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias

    @property
    def options(self) -> tuple[Any, ...]:
        """All but the tensors, in their order."""
        return tuple(getattr(self, field.name) for field in fields(self)[3:])

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def wide(self) -> torch.dtype:
        """That of the statistics and of sums: fp32 at least."""
        return accumulation_dtype(self.compute_dtype)

    @property
    def is_lifted(self) -> bool:
        """Whether a gradient that is made before the upstream one is known has to be kept from underflow."""
        return torch.float16 in (self.compute_dtype, self.hidden.dtype, self.weight.dtype)

    @property
    def logits_dtype(self) -> torch.dtype:
        """That of a chunk's logits."""
        return self.compute_dtype if self.narrow_logits else self.wide
