"""``put``: how state moves, in place, so that a CUDA graph that is replayed moves it too."""

from __future__ import annotations

from torch import Tensor, nn


def put(module: nn.Module, **values: Tensor) -> None:
    """Give buffers of a module new values, without moving their memory; on another device they follow the
    values, as a module does that was left on the CPU."""
    for name, value in values.items():
        buffer = getattr(module, name)
        if buffer.device == value.device:
            buffer.copy_(value.detach())
        else:
            setattr(module, name, value.detach().to(buffer.dtype))
