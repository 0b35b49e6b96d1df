"""``AfterHead``: what a model does to its logits after its head has made them, measured and not looked up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SPREAD = 8.0  # made-up logits reach to +-sinh(8): soft caps show at the ends, scales in the middle
GOLDEN = 0.6180339887498949  # multiples of it are spread evenly, and neighbours differ
TINY, HUGE = 2.0**-40, 2.0**20  # a soft cap leaves the first alone and flattens the second
TOLERANCE = 64  # of the dtype's eps, relative to each logit


@dataclass(frozen=True)
class AfterHead:
    """Logits of what the head returns, z: softcap * tanh(scale * z / softcap), or scale * z without a cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    @classmethod
    @torch.no_grad()
    def seen(cls, given: Tensor, made: Tensor) -> AfterHead | None:
        """What a model did to ``given``, of :func:`made_up_logits`, if a scale and a cap say all of it.

        Args:
            given: what the head was made to return.
            made: what the model returned as its logits.
        """
        if made.shape != given.shape or not _depends_on(made, given):
            return None
        z, found = given.double().flatten(), made.double().flatten()
        if torch.finfo(made.dtype).bits < 32:  # too coarse to measure by, but it shows that nothing was done
            return cls() if torch.equal(given.to(made.dtype), made) else None
        scale, end = float(found[0] / z[0]), abs(float(found[1]))
        if not 0 < abs(scale) < torch.inf or not 0 < end < torch.inf:
            return None
        after = cls(scale, end if end < abs(scale * HUGE) / 2 else None)
        error, eps = (found - after(z)).abs(), torch.finfo(made.dtype).eps
        return after if bool((error <= TOLERANCE * eps * found.abs()).all()) else None


def made_up_logits(like: Tensor, label: int | None = None) -> Tensor:
    """Logits of many magnitudes, a leaf that asks for a gradient: in the shape of ``like``, and in fp64 where
    the device has it, whatever the model's dtype, so that what is done to them can be measured.

    Args:
        like: what the head returned.
        label: an id that is to be improbable at every position.
    """
    index = torch.arange(like.numel(), dtype=torch.float64)
    z = ((index * GOLDEN % 1) * 2 - 1).mul(SPREAD).sinh().reshape(like.shape)
    if label is not None:
        z[..., label] = -1.0
    z.view(-1)[:2] = torch.tensor([TINY, HUGE], dtype=z.dtype)
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    return z.to(like.device, wide).requires_grad_()


def _depends_on(made: Tensor, given: Tensor) -> bool:
    """Whether ``made`` came from ``given`` and from nothing that learns: a learned scale may be 1 today."""
    leaves, waiting, seen = [], [made.grad_fn], set()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return len(leaves) == 1 and leaves[0] is given
