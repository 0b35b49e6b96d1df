"""Whether something looks at every operation, or the operations can be left to compiled code."""

from __future__ import annotations

import torch
from torch import Tensor

_KINDS = (Tensor, torch.nn.Parameter, type(None))


def is_watched() -> bool:
    """Whether a dispatch mode sees every operator: a counter, a tracer, tensors without memory."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing traces the computation, and the tensors are plain ones."""
    if torch.compiler.is_compiling() or is_watched():
        return False
    return all(type(tensor) in _KINDS for tensor in tensors)
