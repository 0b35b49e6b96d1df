"""What is done to a block of tokens for a model to find out: tokens masked, tokens replaced.

Like the blocks themselves, a corruption is a function of a text and the block's number alone, so it does
not depend on batches, ranks, or whether a run was resumed.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lossmith.training.errors import UserError

Example = dict[str, Tensor]


class Corrupted(Dataset):
    """The blocks of a dataset, whose `input_ids` [T] `corrupt` makes examples of; `stream` names the random
    numbers, and block `i` depends on it and `i`, on nothing else."""

    def __init__(self, blocks: Dataset, corrupt: Callable[[Tensor, torch.Generator], Example], stream: str):
        self.blocks = blocks
        self.corrupt = corrupt
        self.stream = stream

    def __len__(self) -> int:
        return len(self.blocks)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> Example:
        return self.corrupt(self.blocks[index]["input_ids"], generator_of(f"{self.stream}:{index}"))


def generator_of(text: str) -> torch.Generator:
    """Random numbers that depend on a text alone; like texts give unrelated ones."""
    return torch.Generator().manual_seed(random.Random(text).getrandbits(63))


def choose(length: int, num: int, generator: torch.Generator) -> Tensor:
    """`num` positions of `length`, at random: [T] bool."""
    chosen = torch.zeros(length, dtype=torch.bool)
    chosen[torch.randperm(length, generator=generator)[:num]] = True
    return chosen


def draw_number(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number from `low` to `high`, both included, each as likely as another."""
    return int(torch.randint(low, high + 1, (), generator=generator))


class Replacement:
    """Other tokens in place of a block's own, drawn as often as they occur in a text [N], but for those that
    are `never` drawn. A UserError where the text holds too few kinds of tokens to put another in place of
    any."""

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
        """A block [T] with `num` tokens replaced, each by another one, and which they are, [T] bool."""
        replaced = choose(len(block), num, generator)
        own = self.counts[block]
        # A number among those that the token at hand does not own: no drawing again, no bias.
        drawn = (
            torch.rand(len(block), generator=generator, dtype=torch.float64) * (self.ends[-1] - own)
        ).long()
        drawn = torch.minimum(drawn, self.ends[-1] - own - 1)
        drawn += torch.where(drawn >= self.ends[block] - own, own, 0)
        others = torch.searchsorted(self.ends, drawn, right=True)
        return torch.where(replaced, others, block), replaced


def mask_tokens(block: Tensor, mask: int, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A block [T] with `mask` in place of `num` tokens, and which they are, [T] bool."""
    masked = choose(len(block), num, generator)
    return torch.where(masked, mask, block), masked
