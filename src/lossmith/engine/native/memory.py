"""Tensors as compiled code takes them: where they lie, once dtype, size and layout are known to be right."""

from __future__ import annotations

import torch
from torch import Tensor


class Memory:
    """Where tensors lie, or a copy of those that do not lie in a row; lives as long as the call."""

    def __init__(self) -> None:
        self._alive: list[Tensor] = []

    def of(
        self, name: str, tensor: Tensor | None, dtype: torch.dtype, numel: int, *, is_output: bool = False
    ) -> int | None:
        """
        Raises:
            ValueError: the tensor is not what the library takes it for.
        """
        if tensor is None:
            return None
        is_expected = tensor.dtype == dtype and tensor.numel() == numel and tensor.is_cpu
        is_in_a_row = tensor.is_contiguous()
        if not is_expected or (is_output and not is_in_a_row):
            raise ValueError(
                f"the compiled code takes {name} as {numel} of {dtype} on the CPU, contiguous where they are "
                f"filled in; got {list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )
        if not is_in_a_row or tensor.is_neg():
            tensor = tensor.resolve_neg().contiguous()
        self._alive.append(tensor)
        return tensor.data_ptr()

    def keep(self, tensor: Tensor) -> int:
        """Where a tensor lies whose layout the library is told."""
        self._alive.append(tensor)
        return tensor.data_ptr()
