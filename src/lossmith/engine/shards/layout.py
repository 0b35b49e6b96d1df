"""``VocabShards``: which classes each rank of a group has; and what all such layouts have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed
from torch import Tensor

# torch.distributed's, which older type stubs do not name
Group = Any


class Shards:
    """What one dimension is split into, a part for each rank of a group.

    Attributes:
        sizes: of every rank's part.
        group: the ranks; None for all.
        of_what: what is split, in words.
    """

    sizes: Any
    group: Group
    of_what: ClassVar[str]

    @property
    def rank(self) -> int:
        """This one's number in the group."""
        return torch.distributed.get_rank(self.group)

    @property
    def size(self) -> int:
        """How much of it this rank has."""
        return self.sizes[self.rank]

    def check_part(self, name: str, part: Any, dim: int) -> None:
        """
        Raises:
            TypeError: this rank's part is no tensor.
            ValueError: it is of another size along ``dim``.
        """
        if not isinstance(part, Tensor):
            raise TypeError(f"{name} must be a tensor, this rank's part; got {type(part).__name__}")
        found = part.shape[dim] if part.dim() else 0
        if found != self.size:
            raise ValueError(
                f"rank {self.rank} has {self.size} of the {sum(self.sizes)} {self.of_what}; "
                f"got {name} of {found}"
            )


@dataclass(frozen=True, eq=False)
class VocabShards(Shards):
    """How the vocabulary is split: rank r has ``sizes[r]`` classes, which come after its predecessors'.

    Args:
        sizes: of every rank, in the group's order.
        group: the ranks that have a shard; None for all.

    Raises:
        TypeError: sizes that are no numbers of classes.
        ValueError: not a size for each rank, or a rank without a class.

    Example:
        >>> import torch, lossmith
        >>> shards = lossmith.VocabShards.even(32000, group)    # doctest: +SKIP
        >>> loss = criterion(lossmith.ShardedLogits(logits_of_this_rank, shards), targets)    # doctest: +SKIP
    """

    of_what: ClassVar[str] = "classes"

    sizes: tuple[int, ...]
    group: Group = None

    def __post_init__(self) -> None:
        is_list = isinstance(self.sizes, list | tuple)
        if not is_list or not all(type(size) is int for size in self.sizes):
            expected = "how many classes each rank has, as in (600, 400)"
            raise TypeError(f"sizes must be {expected}; got {self.sizes!r}")
        object.__setattr__(self, "sizes", tuple(self.sizes))
        ranks = torch.distributed.get_world_size(self.group)
        if len(self.sizes) != ranks or min(self.sizes) < 1:
            raise ValueError(
                f"expected how many classes each of {ranks} ranks has, one at least; got sizes={self.sizes}"
            )

    @classmethod
    def even(cls, num_classes: int, group: Group = None) -> VocabShards:
        """Split as ``torch.chunk`` and DTensor split: all but the last ones have the same number."""
        ranks = torch.distributed.get_world_size(group)
        most = -(-num_classes // ranks)
        return cls(tuple(max(0, min(most, num_classes - r * most)) for r in range(ranks)), group)

    @property
    def num_classes(self) -> int:
        """V, of all ranks together."""
        return sum(self.sizes)

    @property
    def starts(self) -> list[int]:
        """The first class of every rank."""
        return [sum(self.sizes[:r]) for r in range(len(self.sizes))]

    def has(self, ids: Tensor, rank: int) -> Tensor:
        """Where ids are classes of a rank."""
        start = self.starts[rank]
        return (ids >= start) & (ids < start + self.sizes[rank])

    def gather(self, values: Tensor) -> list[Tensor]:
        """The values of every rank, alike in shape and dtype; without gradients."""
        given = values.detach().contiguous()
        found = [torch.empty_like(given) for _ in self.sizes]
        torch.distributed.all_gather(found, given, group=self.group)
        return found


def sum_of_gradients(value: Tensor, group: Group) -> Tensor:
    """A tensor that every rank of the group has; its gradient is the sum of theirs."""
    return _SumOfGradients.apply(value, group)


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


def stacked(parts: Sequence[Tensor], own: Tensor, rank: int) -> Tensor:
    """[R, ...] the parts of all ranks, this one's with its gradient."""
    return torch.stack([own if r == rank else part for r, part in enumerate(parts)])
