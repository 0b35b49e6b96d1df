"""``SmallGradients``: both products of a chunk's gradient, without the classes whose part in them is small.

A trained model gives most classes next to nothing. The tokens of a chunk, in order of their mass, the sum of
|gradient| over the classes, are cut into blocks. In each block the classes with the smallest mass are left
out, until together they have the share of the chunk's mass that may be. What a block leaves out is not
dropped: its rank-one part, each token's sum spread over those classes by their mass, enters both products at
the cost of a few vectors. These small numbers nearly all have one sign, and embeddings have a direction in
common: dropped, they would be missed along it.

The error of the gradient [N, V] is, in the 1-norm, at most twice the share, whatever the loss is. Cut
Cross-Entropy (Wijmans et al., 2025, arXiv:2411.09009), where the idea is from, drops blocks of a softmax in
which all entries are below 2^-12, however much those are together: before training, nearly everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lossmith.engine.head.products import multiplies_halves, wide_product
from lossmith.engine.sweep import Rows

if TYPE_CHECKING:
    from lossmith.engine.head.chunks import HeadGradient

# Tokens of a block: fewer have more classes in common, and smaller products.
BLOCK_ROWS = 128
# The share of the products from which it pays to leave it out; and for how many chunks nobody looks again
# after one in which it was less.
WORTH_IT = 1 / 3
UNSEEN_CHUNKS = 3
# Elements of a temporary.
PIECE_ELEMENTS = 2**19
# A threshold is found to 2% of what it could be.
BISECTIONS = 10


class SmallGradients:
    """What a sweep leaves out of the products of its gradients.

    Args:
        result: the gradients that are summed.
        share: of a chunk's mass, that may be left out.

    Attributes:
        num_parts, num_left_out: elements of the chunks' gradients, and those that were in no product.
    """

    def __init__(self, result: HeadGradient, share: float) -> None:
        self.result, self.share = result, share
        self.num_parts = self.num_left_out = 0
        self._unseen = 0

    def add(self, rows: Rows, x: Tensor, g: Tensor) -> bool:
        """Take in a chunk: its hidden states [n, D] and the gradient of its logits [n, V]. False, and nothing
        done, if so little could be left out that whole products are faster, or the gradient is not finite."""
        self.num_parts += g.numel()
        if self._unseen:
            self._unseen -= 1
            return False
        order = torch.linalg.vector_norm(g, dim=1).argsort()  # about that of their masses, and quickly found
        permute_rows(g, order)
        blocks = g.split(BLOCK_ROWS)
        masses = self._masses(blocks)
        least = threshold(masses, self.share * masses.sum(dtype=torch.float64).item())
        stays = masses >= least
        num_left_out = g.numel() - int(sum(len(b) * s.sum() for b, s in zip(blocks, stays, strict=True)))
        if not least or num_left_out < WORTH_IT * g.numel():
            self._unseen = UNSEEN_CHUNKS
            permute_rows(g, order.argsort())
            return False
        self.num_left_out += num_left_out
        spread = masses.masked_fill_(stays, 0.0)  # over the classes that are left out; adds up to 1
        spread /= spread.sum(1, keepdim=True).clamp(min=torch.finfo(spread.dtype).tiny)
        means, sums = self._means(spread), []
        for k, (block, tokens) in enumerate(zip(blocks, order.split(BLOCK_ROWS), strict=True)):
            left = block.sum(1, dtype=spread.dtype)  # less what stays
            hidden = self._products(x[tokens], block, stays[k].nonzero().squeeze(1), left)
            if hidden is not None and means is not None:
                hidden.addr_(left, means[k])
                self._put(hidden, rows, tokens)
            sums.append(left @ x[tokens].to(left.dtype))
        if self.result.weight is not None:
            wide_product(spread.t(), torch.stack(sums), into=self.result.weight, is_sum=True)
        return True

    def _masses(self, blocks: Sequence[Tensor]) -> Tensor:
        """[blocks, V] the mass of each class."""
        num_classes = blocks[0].shape[1]
        masses = torch.zeros(len(blocks), num_classes, dtype=self.result.chunks.wide)
        for mass, block in zip(masses, blocks, strict=True):
            for some in block.split(max(1, PIECE_ELEMENTS // num_classes)):
                mass += some.abs().sum(0, dtype=mass.dtype)
        return masses

    def _means(self, spread: Tensor) -> Tensor | None:
        """[blocks, D] the mean of the weight's rows that each block leaves out."""
        weight = self.result.chunks.weight
        if self.result.hidden is None:
            return None
        into = torch.empty(len(spread), weight.shape[1], dtype=spread.dtype)
        wide_product(spread, weight, into=into)
        return into

    def _products(self, x: Tensor, g: Tensor, classes: Tensor, left: Tensor) -> Tensor | None:
        """Add the products of a block [m, V] with the classes that stay, and take these off its sums ``left``
        [m]; [m, D] the gradient of the hidden states."""
        result, weight = self.result, self.result.chunks.weight
        hidden = None if result.hidden is None else torch.zeros(x.shape, dtype=left.dtype)
        for some in classes.split(max(1, PIECE_ELEMENTS // max(x.shape))):
            part = g.index_select(1, some)
            left -= part.sum(1, dtype=left.dtype)
            if multiplies_halves(x.dtype, x.device):
                part = part.to(x.dtype)
            if hidden is not None:
                wide_product(part, weight.index_select(0, some), into=hidden, is_sum=True)
            if result.weight is not None:
                product = torch.empty(len(some), x.shape[1], dtype=result.weight.dtype)
                wide_product(part.t(), x, into=product)
                result.weight.index_add_(0, some, product)
        return hidden

    def _put(self, hidden: Tensor, rows: Rows, tokens: Tensor) -> None:
        assert self.result.hidden is not None
        at = tokens + rows.start if isinstance(rows, slice) else rows[tokens]
        self.result.hidden.index_copy_(0, at, hidden.to(self.result.hidden.dtype))


def temporary_bytes(num_rows: int, num_classes: int, size: int, itemsize: int) -> int:
    """About the memory that a chunk's products take without their small classes, besides what whole ones do.

    Args:
        num_rows, num_classes, size: n, V and D.
        itemsize: bytes of an element of the sums.
    """
    block = min(num_rows, BLOCK_ROWS)
    masses = -(-num_rows // BLOCK_ROWS) * num_classes * (2 * itemsize + 2)
    piece = min(num_classes, max(1, PIECE_ELEMENTS // max(block, size)))
    products = piece * (block + 2 * size) + 2 * block * size
    return masses + itemsize * max(products, min(block, max(1, PIECE_ELEMENTS // num_classes)) * num_classes)


def permute_rows(values: Tensor, order: Tensor) -> None:
    """values <- values[order], in the memory where they are."""
    waiting = order.tolist()
    for start, first in enumerate(waiting):
        if first == start:
            continue
        kept, at = values[start].clone(), start
        while waiting[at] != start:  # around the cycle
            values[at] = values[waiting[at]]
            waiting[at], at = at, waiting[at]
        values[at], waiting[at] = kept, at


def threshold(masses: Tensor, most: float) -> float:
    """About the largest number below which masses add up to no more than ``most``; never more than it.
    0 where they are no numbers."""
    if not 0 < most < math.inf:
        return 0.0
    low, high = most / masses.numel(), most  # all below the one are not too much, and one above the other is
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high)
        left_out = masses.where(masses < middle, 0.0).sum(dtype=torch.float64).item()
        low, high = (middle, high) if left_out <= most else (low, middle)
    return low
