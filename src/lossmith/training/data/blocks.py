"""Tokens to blocks.

Training blocks start anywhere (nanoGPT's way) and each is a function of the seed and its number alone,
so a resumed run sees exactly the blocks it would have seen. Evaluation walks the held-out text: a causal
model in windows that predict every token once, the others in whole blocks side by side.
"""

import random

from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from lossmith.training.errors import UserError

IGNORED = -100


def block_that_fits(num_tokens: int) -> int:
    """Tokens in a block where the text has as few as this: blocks begin at several places of it."""
    return max(2, num_tokens // 4)


class RandomBlocks(Dataset):
    """Blocks at random offsets of the training tokens [N], as many as the run will draw. Block `i` depends
    on the seed and `i`, on nothing else. A UserError where the text is shorter than one block."""

    def __init__(self, tokens: Tensor, block_size: int, num_blocks: int, seed: int):
        if len(tokens) <= block_size:
            raise UserError(
                f"the training text has {len(tokens):,} tokens but block_size={block_size}; expected more "
                f"tokens than one block holds. Pass --block_size={block_that_fits(len(tokens))} or more text."
            )
        self.tokens = tokens
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.seed = seed

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # Seeding with a text hashes it, so that neighbouring numbers give unrelated offsets.
        start = random.Random(f"{self.seed}:{index}").randrange(len(self.tokens) - self.block_size + 1)
        return as_example(self.tokens[start : start + self.block_size])


class _HeldOut(Dataset):
    """Blocks of the held-out tokens [N]; a UserError where there is nothing to look at."""

    def __init__(self, tokens: Tensor, block_size: int):
        if len(tokens) < 2:
            raise UserError(
                f"the held-out text has {len(tokens)} tokens; expected at least 2. Use a larger dataset."
            )
        self.tokens = tokens
        self.block_size = block_size


class Windows(_HeldOut):
    """The held-out tokens [N] cut so that each token but the first is predicted exactly once.

    Neighbouring windows share one token: the last that one predicts is the first the next one is given.
    """

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // (self.block_size - 1))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * (self.block_size - 1)
        example = as_example(self.tokens[start : start + self.block_size])
        short = self.block_size - len(example["input_ids"])
        # Padding comes last, so under a causal model nothing that counts can see it.
        return {
            "input_ids": pad(example["input_ids"], (0, short), value=0),
            "labels": pad(example["labels"], (0, short), value=IGNORED),
        }


class WholeBlocks(_HeldOut):
    """The held-out tokens [N] cut into blocks side by side, for models that see both ways.

    All are `block_size` long, so that none needs padding: the last reaches back into the one before it. A
    text shorter than that is one short block.
    """

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.block_size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        end = min((index + 1) * self.block_size, len(self.tokens))
        return as_example(self.tokens[max(0, end - self.block_size) : end])


def as_example(block: Tensor) -> dict[str, Tensor]:
    """Inputs and labels of a block [T]; the shift by one is the loss's duty."""
    labels = block.clone()
    # Nothing predicts the first token. Saying so keeps the Trainer's count of targets right whether or
    # not its version knows that this model's loss shifts.
    labels[0] = IGNORED
    return {"input_ids": block, "labels": labels}
