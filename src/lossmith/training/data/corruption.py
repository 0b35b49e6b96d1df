"""Corrupted blocks: tokens masked or replaced, for a model to find out.

Like a block, its corruption is a function of a seed text and the block's index alone, so that it does not
depend on batches, ranks, or resuming.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lossmith.training.errors import UserError

Example = dict[str, Tensor]


class Corrupted(Dataset):
    """The blocks of a dataset, corrupted; block `i` depends on `stream`, which seeds it, and `i` alone."""

    def __init__(self, blocks: Dataset, corrupt: Callable[[Tensor, torch.Generator], Example], stream: str):
        self.blocks = blocks
        self.corrupt = corrupt
        self.stream = stream

    def __len__(self) -> int:
        return len(self.blocks)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> Example:
        return self.corrupt(self.blocks[index]["input_ids"], generator_of(f"{self.stream}:{index}"))


def generator_of(text: str) -> torch.Generator:
    """A generator seeded with the hash of a text."""
    return torch.Generator().manual_seed(random.Random(text).getrandbits(63))


def choose(length: int, num: int, generator: torch.Generator) -> Tensor:
    """`num` random positions of `length`: [T] bool."""
    chosen = torch.zeros(length, dtype=torch.bool)
    chosen[torch.randperm(length, generator=generator)[:num]] = True
    return chosen


def draw_number(low: int, high: int, generator: torch.Generator) -> int:
    """A uniform integer from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


class Replacement:
    """Replaces tokens by others, drawn by their frequency in a text [N], except those `never` drawn."""

    def __init__(self, tokens: Tensor, vocab_size: int, never: list[int]):
        counts = torch.bincount(tokens, minlength=vocab_size)
        counts[never] = 0
        if int((counts > 0).sum()) < 2:
            raise UserError(
                "the training text repeats one token, so none can be put in place of it; expected at least "
                "two kinds. Use a larger dataset."
            )
        self.counts = counts
        self.ends = counts.cumsum(0)  # token v owns the numbers from ends[v] - counts[v] up to ends[v]

    def __call__(self, block: Tensor, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A block [T] with `num` tokens replaced by different ones, and their places, [T] bool."""
        replaced = choose(len(block), num, generator)
        own = self.counts[block]
        # Draw among the numbers that the token at hand does not own: no rejection, no bias.
        drawn = (
            torch.rand(len(block), generator=generator, dtype=torch.float64) * (self.ends[-1] - own)
        ).long()
        drawn = torch.minimum(drawn, self.ends[-1] - own - 1)
        drawn += torch.where(drawn >= self.ends[block] - own, own, 0)
        others = torch.searchsorted(self.ends, drawn, right=True)
        return torch.where(replaced, others, block), replaced


def mask_tokens(block: Tensor, mask: int, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A block [T] with `num` tokens replaced by `mask`, and their places, [T] bool."""
    masked = choose(len(block), num, generator)
    return torch.where(masked, mask, block), masked
