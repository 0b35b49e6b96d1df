"""``Unchanged``: what statistics are computed from has to stay as it was until the last of them is."""

from __future__ import annotations

import torch
from torch import Tensor


class Unchanged:
    """The tensors that statistics are computed from.

    Args:
        read: the tensors by name; None for absent ones.
    """

    def __init__(self, **read: Tensor | None) -> None:
        self._read = [(name, one, _version(one)) for name, one in read.items() if one is not None]

    def check(self) -> None:
        """
        Raises:
            RuntimeError: one of them has changed.
        """
        for name, tensor, version in self._read:
            if _version(tensor) != version:
                raise RuntimeError(
                    f"{name}: modified in place (by an optimizer step, perhaps) after these statistics were "
                    "first asked for, so that further ones would be of something else; announce what you "
                    "need with stats.compute(...) before"
                )


def _version(tensor: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version
