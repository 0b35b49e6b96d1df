"""One id a row, drawn from the row's softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmith.engine.rows import triton_rows
from lossmith.engine.rows.blocks import accumulation_dtype

# Rows are drawn this many logits at a time, which bounds the extra memory.
BLOCK_ELEMENTS = 2**22


@torch.no_grad()
def sample_ids(logits: Tensor, *, softcap: float | None = None) -> Tensor:
    """Ids [...] drawn from softmax(logits [..., V]), one multinomial draw each.

    Draws from PyTorch's default generator of the device.
    """
    flat = logits.detach().reshape(-1, logits.shape[-1])
    numbers = random_numbers(len(flat), flat.dtype, flat.device)
    return draw(flat, numbers, softcap).reshape(logits.shape[:-1])


def random_numbers(num: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[num, 1] what the ids of rows are drawn with: numbers in [0, 1), or the seeds of kernels."""
    if triton_rows.runs_on(device, dtype):
        return torch.randint(2**62, (num, 1), device=device)
    return torch.rand(num, 1, device=device, dtype=accumulation_dtype(dtype))


def draw(logits: Tensor, numbers: Tensor, softcap: float | None) -> Tensor:
    """[R] the ids that random numbers [R, 1] stand for in the distributions of ``logits`` [R, V]."""
    if not numbers.is_floating_point():
        return triton_rows.sample(logits, numbers, softcap)
    num_rows = max(1, BLOCK_ELEMENTS // logits.shape[-1])
    blocks = zip(logits.split(num_rows), numbers.split(num_rows), strict=True)
    return torch.cat([_draw(some, uniform, softcap) for some, uniform in blocks])


def _draw(logits: Tensor, uniform: Tensor, softcap: float | None) -> Tensor:
    """By inverting the distribution function: the first id whose cumulated probability exceeds a uniform
    number."""
    z = logits.to(uniform.dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    cumulated = z.softmax(-1).cumsum(-1)
    total = cumulated[:, -1:]
    # below the total, so that an id that has no probability is never the first to exceed it
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return (cumulated <= threshold).sum(-1).clamp(max=logits.shape[-1] - 1)
