"""One id a row, drawn from the row's softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmith.engine.blocks import accumulation_dtype

# Rows are drawn this many logits at a time, which bounds the extra memory.
BLOCK_ELEMENTS = 2**22


@torch.no_grad()
def sample_ids(logits: Tensor, *, softcap: float | None = None) -> Tensor:
    """Ids [...] drawn from softmax(logits [..., V]), one multinomial draw each, by inverting the
    distribution function: first id whose cumulated probability exceeds a uniform number.

    Draws from PyTorch's default generator of the device.
    """
    flat = logits.detach().reshape(-1, logits.shape[-1])
    uniform = torch.rand(len(flat), 1, device=flat.device, dtype=accumulation_dtype(flat.dtype))
    num_rows = max(1, BLOCK_ELEMENTS // flat.shape[-1])
    drawn = [
        _draw(flat[start : start + num_rows], uniform[start : start + num_rows], softcap)
        for start in range(0, len(flat), num_rows)
    ]
    return torch.cat(drawn).reshape(logits.shape[:-1])


def _draw(logits: Tensor, uniform: Tensor, softcap: float | None) -> Tensor:
    z = logits.to(uniform.dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    cumulated = z.softmax(-1).cumsum(-1)
    total = cumulated[:, -1:]
    # below the total, so that an id that has no probability is never the first to exceed it
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return (cumulated <= threshold).sum(-1).clamp(max=logits.shape[-1] - 1)
