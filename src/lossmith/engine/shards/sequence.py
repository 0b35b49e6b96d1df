"""``SequenceShards``: which positions of a sequence each rank of a group has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, ClassVar

import torch
import torch.distributed
from torch import Tensor

from lossmith.engine.shards.layout import Group, Shards

# Consecutive positions: the first, and the one after the last.
Piece = tuple[int, int]


@dataclass(frozen=True, eq=False)
class SequenceShards(Shards):
    """How sequences are split: rank r has the positions ``pieces[r]`` of every sequence, in their order.

    Args:
        pieces: of every rank, in the group's order, its pieces (first position, position after the last).
        group: the ranks that have a part of the sequences; None for all.

    Raises:
        TypeError: pieces that are no pairs of positions.
        ValueError: not pieces for each rank, or a position that no rank has, or two.

    Example:
        >>> import torch, lossmith
        >>> shards = lossmith.SequenceShards.even(4096, group)    # doctest: +SKIP
        >>> loss = criterion(logits_of_this_rank, labels_of_this_rank, sequence=shards)    # doctest: +SKIP
    """

    of_what: ClassVar[str] = "positions"

    pieces: tuple[tuple[Piece, ...], ...]
    group: Group = None

    def __post_init__(self) -> None:
        try:
            pieces = tuple(tuple((index(first), index(end)) for first, end in of) for of in self.pieces)
        except (TypeError, ValueError):
            expected = "each rank's (first position, position after the last), as in [[(0, 5)], [(5, 8)]]"
            raise TypeError(f"pieces must be {expected}; got {self.pieces!r}") from None
        object.__setattr__(self, "pieces", pieces)
        ranks, at = torch.distributed.get_world_size(self.group), 0
        if len(pieces) != ranks or not all(pieces):
            raise ValueError(f"expected pieces of each of {ranks} ranks; got {self.pieces!r}")
        for first, end in sorted(piece for of_rank in pieces for piece in of_rank):
            if first != at or end <= first:
                raise ValueError(
                    f"every position must be in one piece; {min(first, at)} is not, in {self.pieces!r}"
                )
            at = end

    @classmethod
    def even(cls, length: int, group: Group = None) -> SequenceShards:
        """Split as ``torch.chunk`` splits: each rank has one piece, and all but the last the same number."""
        pieces = _cut(length, torch.distributed.get_world_size(group))
        return cls(tuple((piece,) if piece[0] < piece[1] else () for piece in pieces), group)

    @classmethod
    def balanced(cls, length: int, group: Group = None) -> SequenceShards:
        """Split as PyTorch's ``context_parallel`` splits: of 2 R equal pieces rank r has the r-th, and the
        r-th from the end, so that causal attention is the same work for all."""
        ranks = torch.distributed.get_world_size(group)
        if length % (2 * ranks):
            raise ValueError(
                f"expected a multiple of 2 x {ranks} positions; got {length}. Pad, or split with even()"
            )
        pieces = _cut(length, 2 * ranks)
        return cls(tuple((pieces[r], pieces[-1 - r]) for r in range(ranks)), group)

    @property
    def length(self) -> int:
        """T, of whole sequences."""
        return max(end for of_rank in self.pieces for _, end in of_rank)

    @property
    def sizes(self) -> list[int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How many positions every rank has."""
        return [sum(end - first for first, end in of_rank) for of_rank in self.pieces]

    def part(self, whole: Tensor, dim: int = -1) -> Tensor:
        """This rank's positions of a tensor that has all of them along ``dim``.

        Raises:
            ValueError: it has another number of positions.
        """
        if not whole.dim() or whole.shape[dim] != self.length:
            raise ValueError(f"expected {self.length} positions; got a tensor {list(whole.shape)}")
        own = [whole.narrow(dim, first, end - first) for first, end in self.pieces[self.rank]]
        return torch.cat(own, dim)

    def own_rows(self, whole: Tensor) -> Tensor:
        """[N, ...] of whole sequences, one after the other, at this rank's positions."""
        return self.part(whole.reshape(-1, self.length, *whole.shape[1:]), 1).flatten(0, 1)

    def gather(self, part: Tensor, dim: int = -1) -> Tensor:
        """A tensor of which every rank has its positions along ``dim``, whole; the gradient is that of this
        rank's part. Every rank must make the same call.

        Raises:
            ValueError: it has another number of positions.
        """
        self.check_part("a tensor", part, dim)
        return self.put(part, self._of_all(part, dim), dim)

    def gather_together(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """[..., T_r] tensors alike in shape, whole, for one collective: in double precision, in which ids and
        floats are exact."""
        found = self._of_all(torch.stack([part.detach().double() for part in parts]), -1)
        return [
            self.put(part, whole.to(part.dtype)) for part, whole in zip(parts, found.unbind(), strict=True)
        ]

    def gather_tokens(self, given: Any) -> Any:
        """The same for a row a token, [B, T_r, ...] or flat [N, ...], or a list of such tensors."""
        if isinstance(given, list | tuple):
            return [self.gather_tokens(one) for one in given]
        if not isinstance(given, Tensor) or given.dim() < 2 or given.shape[:-1].numel() % self.size:
            got = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(
                f"expected a row for each token of {self.size} positions, [B, T, ...] or [N, ...]; got {got}"
            )
        rows = self.gather(given.reshape(-1, self.size, given.shape[-1]), 1)
        return rows if given.dim() > 2 else rows.flatten(0, 1)

    def put(self, own: Tensor, whole: Tensor, dim: int = -1) -> Tensor:
        """Whole sequences with this rank's part, and its gradient, in its place."""
        places = self._places(self.rank, own, dim)
        for r, of_rank in enumerate(self.pieces):
            if r != self.rank:
                places |= {first: whole.narrow(dim, first, end - first) for first, end in of_rank}
        return _joined(places, dim)

    def _of_all(self, part: Tensor, dim: int) -> Tensor:
        """The parts of all ranks put together, without gradients."""
        given = part.detach().movedim(dim, 0).to(_sent_as(part.dtype))
        padded = given.new_zeros(max(self.sizes), *given.shape[1:])
        padded[: len(given)] = given
        found = [torch.empty_like(padded) for _ in self.sizes]
        torch.distributed.all_gather(found, padded, group=self.group)
        places: dict[int, Tensor] = {}
        for r, values in enumerate(found):
            places |= self._places(r, values, 0)
        return _joined(places, 0).movedim(0, dim).to(part.dtype)

    def _places(self, rank: int, part: Tensor, dim: int) -> dict[int, Tensor]:
        """The pieces of a rank's part by their first position."""
        at, places = 0, {}
        for first, end in self.pieces[rank]:
            places[first], at = part.narrow(dim, at, end - first), at + end - first
        return places


def _joined(places: dict[int, Tensor], dim: int) -> Tensor:
    """Pieces by their first position, one after the other."""
    return torch.cat([places[first] for first in sorted(places)], dim)


def _cut(length: int, pieces: int) -> list[Piece]:
    most = -(-length // pieces)
    return [(min(r * most, length), min((r + 1) * most, length)) for r in range(pieces)]


def _sent_as(dtype: torch.dtype) -> torch.dtype:
    """What every backend sends; nothing is lost."""
    return {torch.bool: torch.uint8, torch.bfloat16: torch.float32, torch.float16: torch.float32}.get(
        dtype, dtype
    )
