"""``Packing``: which tokens of a batch take part in the products of a linear head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Which tokens take part.

    Attributes:
        is_packed: whether tokens without a target are left out; otherwise all take part, and what comes of
            those is thrown away.
        positions: [N'] those that take part; None for all.
    """

    is_packed: bool
    positions: Tensor | None

    @classmethod
    def of(cls, targets: Tensor, ignore_index: int, skip_ignored: bool | None) -> Packing:
        """
        Args:
            targets: [N].
            ignore_index: the target of tokens without one.
            skip_ignored: whether to leave them out; None for where nobody waits for it. An accelerator has
                to tell the host how many they are.

        Raises:
            ValueError: a CUDA graph is being captured, which is replayed with other targets.
        """
        if not (packs(targets) if skip_ignored is None else skip_ignored):
            return cls(False, None)
        if targets.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "skip_ignored=True needs to know how many tokens have a target, which a CUDA graph cannot "
                "tell while it is captured; pass skip_ignored=None"
            )
        valid = (targets != ignore_index).nonzero().squeeze(1)
        return cls(True, None if valid.numel() == targets.numel() else valid)


def packs(targets: Tensor) -> bool:
    """Whether tokens without a target are left out unless it is said otherwise."""
    return targets.device.type == "cpu"
