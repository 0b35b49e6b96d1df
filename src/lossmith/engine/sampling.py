"""One id a row, drawn from the row's softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmith.engine.rows.blocks import accumulation_dtype

# Rows are drawn this many logits at a time, which bounds the extra memory.
BLOCK_ELEMENTS = 2**22


@torch.no_grad()
def sample_ids(logits: Tensor, *, softcap: float | None = None) -> Tensor:
    """Ids [...] drawn from softmax(logits [..., V]), one multinomial draw each, by inverting the
    distribution function: first id whose cumulated probability exceeds a uniform number.

    Draws from PyTorch's default generator of the device.
    """
    flat = logits.detach().reshape(-1, logits.shape[-1])
    uniform = uniform_numbers(len(flat), accumulation_dtype(flat.dtype), flat.device)
    return draw(flat, uniform, softcap).reshape(logits.shape[:-1])


def uniform_numbers(num: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[num, 1] numbers in [0, 1), one for each id that is to be drawn."""
    return torch.rand(num, 1, device=device, dtype=dtype)


def draw(logits: Tensor, uniform: Tensor, softcap: float | None) -> Tensor:
    """[R] the ids that uniform numbers [R, 1] stand for in the distributions of ``logits`` [R, V]."""
    num_rows = max(1, BLOCK_ELEMENTS // logits.shape[-1])
    blocks = zip(logits.split(num_rows), uniform.split(num_rows), strict=True)
    return torch.cat([_draw(some, numbers, softcap) for some, numbers in blocks])


def _draw(logits: Tensor, uniform: Tensor, softcap: float | None) -> Tensor:
    z = logits.to(uniform.dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    cumulated = z.softmax(-1).cumsum(-1)
    total = cumulated[:, -1:]
    # below the total, so that an id that has no probability is never the first to exceed it
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return (cumulated <= threshold).sum(-1).clamp(max=logits.shape[-1] - 1)
