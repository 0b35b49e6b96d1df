"""A linear head's matrix products, a chunk of tokens at a time: logits out of hidden states, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lossmith.engine.head import sizes
from lossmith.engine.head.factors import Factors
from lossmith.engine.head.packing import Packing
from lossmith.engine.head.products import multiplies_halves, wide_product
from lossmith.engine.head.sizes import Sizes
from lossmith.engine.head.small_gradients import SmallGradients
from lossmith.engine.memory import fresh
from lossmith.engine.sweep import Rows


class Chunks:
    """The tokens of a batch that have a target, in chunks, and the logits of one chunk at a time.

    Args:
        factors: what the logits are made of.
        targets: [N].
        ignore_index: the target of tokens that take no part.
        packing: which are left out; found here if not given.
    """

    def __init__(
        self, factors: Factors, targets: Tensor, ignore_index: int, packing: Packing | None = None
    ) -> None:
        self.factors, self.targets, self.ignore_index = factors, targets, ignore_index
        hidden, weight, bias = factors.tensors
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.weight = weight.to(factors.compute_dtype).resolve_neg()  # once, not for every chunk
        self.bias = None if bias is None else bias.to(factors.compute_dtype)
        self.dtype, self.wide = factors.compute_dtype, factors.wide
        self.num_classes = weight.shape[0]
        packing = packing or Packing.of(targets, ignore_index, factors.skip_ignored)
        self.packed, self.is_packed = packing.positions, packing.is_packed
        self.num_rows = targets.numel() if self.packed is None else self.packed.numel()
        self.sizes = Sizes.of(factors, self.num_rows, packing)
        self.size = self.sizes.rows
        self._buffer: Tensor | None = None
        self._narrowed: Tensor | None = None

    def all(self) -> Iterator[Rows]:
        """The rows of each chunk."""
        for start in range(0, self.num_rows, self.size):
            rows = slice(start, min(start + self.size, self.num_rows))
            yield rows if self.packed is None else self.packed[rows]

    def inputs(self, rows: Rows) -> Tensor:
        """[n, D] the hidden states of a chunk; 0 where there is no target, even if NaN is there."""
        x = self.hidden[rows].to(self.dtype)
        if self.is_packed:
            return x
        return x.masked_fill((self.targets[rows] == self.ignore_index).unsqueeze(1), 0.0)

    def logits(self, x: Tensor) -> Tensor:
        """[n, V] the logits of hidden states [n, D], in memory that the next chunk reuses."""
        z = self.buffer()[: len(x)]
        if self.bias is not None and z.dtype == x.dtype != self.wide:  # rounded once, with the bias
            return torch.addmm(self.bias, x, self.weight.t(), out=z)
        wide_product(x, self.weight.t(), into=z)
        return z if self.bias is None else z.add_(self.bias)

    def buffer(self) -> Tensor:
        """[size, V] for the logits of a chunk; each row begins where an accelerator likes it."""
        if self._buffer is None:
            self._buffer = self._memory(self.factors.logits_dtype)
        return self._buffer

    def narrowed(self, g: Tensor) -> Tensor:
        """[n, V] a gradient, in the dtype of the products; on a CPU in the memory where it is."""
        if g.dtype == self.dtype or sizes.is_cpu(g.device):
            return narrowed(g, self.dtype)
        if self._narrowed is None:
            self._narrowed = self._memory(self.dtype)
        return self._narrowed[: len(g)].copy_(g)

    def _memory(self, dtype: torch.dtype) -> Tensor:
        memory = fresh((self.size, self.sizes.stride), dtype=dtype, device=self.hidden.device, zero=False)
        return memory[:, : self.num_classes]

    def reuse(self, buffer: Tensor) -> None:
        """Take the memory of an earlier sweep of the same chunks."""
        self._buffer = buffer

    def release(self) -> None:
        """Give the memory of the logits back."""
        self._buffer = self._narrowed = None


class HeadGradient:
    """The gradients of hidden states, weight and bias, summed over chunks; at least fp32 while they are.

    Args:
        chunks: the chunks that the gradients are of.
        needed: which of the three are wanted.
        weight_sum: [V, D] memory for that of the weight, if there is some.
        is_begun: whether it has that of earlier chunks, to which these are added.
    """

    def __init__(
        self,
        chunks: Chunks,
        needed: Sequence[bool],
        weight_sum: Tensor | None = None,
        *,
        is_begun: bool = False,
    ) -> None:
        self.chunks = chunks
        device = chunks.hidden.device
        self.hidden = self.bias = None
        self.weight = weight_sum
        if needed[0]:
            self.hidden = fresh(
                tuple(chunks.hidden.shape),
                dtype=chunks.hidden.dtype,
                device=device,
                zero=chunks.packed is not None or not chunks.num_rows,
            )
        if weight_sum is not None:
            if not (chunks.num_rows or is_begun):
                weight_sum.zero_()
        elif needed[1]:
            # a single product is rounded once, to the weight's dtype; a sum of several is not rounded between
            dtype = chunks.wide if chunks.sizes.accumulator_bytes else chunks.factors.weight.dtype
            self.weight = fresh(
                tuple(chunks.weight.shape), dtype=dtype, device=device, zero=not chunks.num_rows
            )
        if needed[2]:
            self.bias = torch.zeros(chunks.num_classes, dtype=chunks.wide, device=device)
        share = chunks.factors.skip_small_gradients
        self.skipping = SmallGradients(self, share) if share and any(needed[:2]) else None
        self._is_first = not is_begun

    def add(self, rows: Rows, x: Tensor, g: Tensor) -> None:
        """Take in a chunk: its hidden states [n, D] and the gradient of its logits [n, V], whose memory is
        written over."""
        c = self.chunks
        if self.bias is not None:
            self.bias += g.sum(0, dtype=c.wide)
        if self.skipping is not None:
            if self._is_first and self.weight is not None:
                self.weight.zero_()
            self._is_first = False
            if self.skipping.add(rows, x, g):
                return
        are_halves = multiplies_halves(c.dtype, g.device)
        if are_halves:
            g = c.narrowed(g)
        if self.weight is not None:
            wide_product(g.t(), x, into=self.weight, is_sum=not self._is_first)
        if self.hidden is not None:
            dtype = c.dtype if are_halves else c.wide
            is_there = isinstance(rows, slice) and self.hidden.dtype == dtype
            total = self.hidden[rows] if is_there else torch.empty_like(x, dtype=dtype)
            if are_halves:
                torch.mm(g, c.weight, out=total)
            else:
                wide_product(g, c.weight, into=total)
            if not is_there:
                self.hidden[rows] = total.to(self.hidden.dtype)
        self._is_first = False

    def add_nothing(self, rows: Rows) -> None:
        """Take in a chunk whose logits have no gradient."""
        if self.hidden is not None:
            self.hidden[rows] = 0.0
        if self.weight is not None and self._is_first:
            self.weight.zero_()
        self._is_first = False

    def finish(self, *, is_rounded: bool = True) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients in the shapes of what they are the gradients of, and in their dtypes; sums as they
        are unless ``is_rounded``."""
        self.skipping = None  # it holds this; what autograd finds to be anybody else's it copies
        self.chunks.release()  # before the weight's gradient is rounded into memory of its own
        hidden, weight, bias = self.chunks.factors.tensors
        return (
            None if self.hidden is None else self.hidden.view(hidden.shape),
            None if self.weight is None else self.weight.to(weight.dtype if is_rounded else None),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype if is_rounded else None),
        )


def narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, V] values on a CPU in a dtype of at most half the width, in the memory where they are."""
    if values.dtype == dtype:
        return values
    target = values.view(dtype).view(-1)[: values.numel()].view(values.shape)
    # Some rows at a time, and those copied out before: they end up in front of where they were.
    rows = max(1, sizes.NARROWED_ELEMENTS // values.shape[1])
    for start in range(0, len(values), rows):
        some = slice(start, start + rows)
        target[some] = values[some].to(dtype)
    return target
