"""Tokens to blocks.

Training blocks start anywhere, as in nanoGPT. Each is a function of the seed and its index alone, so that a
resumed run sees the blocks it would have seen. Evaluation walks through the held-out text: causal models in
windows that predict every token once, the others in adjacent blocks.
"""

import random

from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from lossmith.training.errors import UserError

IGNORED = -100


def block_that_fits(num_tokens: int) -> int:
    """A block size for a short text, such that blocks can start in several places."""
    return max(2, num_tokens // 4)


class RandomBlocks(Dataset):
    """Blocks at random offsets of the training tokens [N]; block `i` depends on the seed and `i` alone."""

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
        # A string seed is hashed, so that neighbouring indices give unrelated offsets.
        start = random.Random(f"{self.seed}:{index}").randrange(len(self.tokens) - self.block_size + 1)
        return as_example(self.tokens[start : start + self.block_size])


class _HeldOut(Dataset):
    """Blocks of the held-out tokens [N]."""

    def __init__(self, tokens: Tensor, block_size: int):
        if len(tokens) < 2:
            raise UserError(
                f"the held-out text has {len(tokens)} tokens; expected at least 2. Use a larger dataset."
            )
        self.tokens = tokens
        self.block_size = block_size


class Windows(_HeldOut):
    """The held-out tokens [N] in windows that predict each token but the first exactly once.

    Neighbours share one token: the last target of one is the first input of the next.
    """

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // (self.block_size - 1))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * (self.block_size - 1)
        example = as_example(self.tokens[start : start + self.block_size])
        short = self.block_size - len(example["input_ids"])
        # Padding comes last, where no supervised token of a causal model sees it.
        return {
            "input_ids": pad(example["input_ids"], (0, short), value=0),
            "labels": pad(example["labels"], (0, short), value=IGNORED),
        }


class WholeBlocks(_HeldOut):
    """The held-out tokens [N] in adjacent blocks, for bidirectional models.

    None needs padding: the last block overlaps the one before it. A text shorter than a block is one short
    block.
    """

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.block_size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        end = min((index + 1) * self.block_size, len(self.tokens))
        return as_example(self.tokens[max(0, end - self.block_size) : end])


def as_example(block: Tensor) -> dict[str, Tensor]:
    """Inputs and labels of a block [T]; the loss shifts them."""
    labels = block.clone()
    # Nothing predicts the first token. This keeps the Trainer's count of targets right, whether or not
    # its version knows that the loss shifts.
    labels[0] = IGNORED
    return {"input_ids": block, "labels": labels}
