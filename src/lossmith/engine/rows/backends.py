"""Rows of logits to raw statistics and back, by whichever arithmetic takes them.

``native_rows`` takes fp32 and bf16 rows on a CPU, and ``torch_rows``, in blocks, everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lossmith.engine.checks import check_ids_again
from lossmith.engine.memory import fresh
from lossmith.engine.rows import native_rows
from lossmith.engine.rows.blocks import Blocks, grad_in_blocks, stats_in_blocks
from lossmith.engine.statistics.raw import View

# Elements in a block: on a CPU two fp32 buffers of it stay in the last-level cache; elsewhere
# launches are what a small block would cost, and this bounds the extra memory.
BLOCK_ELEMENTS = {"cpu": 2**20}
BLOCK_ELEMENTS_ELSEWHERE = 2**26


def fill_stats(
    logits: Tensor,
    targets: Tensor,
    candidates: Tensor | None,
    class_weight: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    views: Sequence[View],
) -> None:
    """Fill in the raw statistics [N] of every view of ``logits`` [..., V] at ``targets`` [N]."""
    if native_rows.takes(logits, softcap):
        native_rows.sweep(logits, targets, candidates, class_weight, ignore_index, views)
    else:
        blocks = Blocks(logits, targets, ignore_index, _block_elements(logits))
        stats_in_blocks(blocks, candidates, class_weight, softcap, views)


def gradient(
    logits: Tensor,
    targets: Tensor,
    candidates: Tensor | None,
    class_weight: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    views: Sequence[View],
    *,
    in_place: bool = False,
) -> Tensor:
    """The gradient [N, V] of ``logits`` from those of every view's raw statistics; exactly 0 in rows that
    are ignored, or that nobody has a gradient for, also where their logits are no numbers.

    Args:
        in_place: ``logits`` [N, V] are nobody else's, and become the gradient.
    """
    given = [value != 0 for view in views for value in view.grads.values()]
    wanted = [rows if rows.dim() == 1 else rows.any(-1) for rows in given]
    targets = targets.masked_fill(~torch.stack(wanted).any(0), ignore_index)
    if native_rows.takes(logits, softcap):
        shape = (targets.numel(), logits.shape[-1])
        into = logits if in_place else fresh(shape, dtype=logits.dtype, device=logits.device, zero=False)
        native_rows.sweep(logits, targets, candidates, class_weight, ignore_index, views, into)
        return into
    check_ids_again("targets", targets, logits.shape[-1], exempt=ignore_index)
    if candidates is not None:
        check_ids_again("candidates", candidates, logits.shape[-1], exempt=-1)
    blocks = Blocks(logits, targets, ignore_index, _block_elements(logits))
    return grad_in_blocks(blocks, candidates, class_weight, softcap, views, in_place=in_place)


def _block_elements(logits: Tensor) -> int:
    return BLOCK_ELEMENTS.get(logits.device.type, BLOCK_ELEMENTS_ELSEWHERE)
