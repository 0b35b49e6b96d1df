"""``CorruptedTask``: a task whose blocks are corrupted for the model to find out."""

from abc import abstractmethod
from functools import cached_property
from typing import Any, ClassVar

from torch import Generator, Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from lossmith.training.data.blocks import RandomBlocks, WholeBlocks
from lossmith.training.data.corruption import Corrupted, Replacement
from lossmith.training.data.tokenizer import CLS, MASK, token_id
from lossmith.training.tasks.models import make_bidirectional_model
from lossmith.training.tasks.task import Batch, Task

HELD_OUT = "held out"  # names the random numbers of the held-out blocks: the same in every run


class CorruptedTask(Task):
    """A task of a model that sees a corrupted block from both sides."""

    head: ClassVar[dict[str, Any]] = {}  # what the model's head is told

    @abstractmethod
    def corrupt(self, block: Tensor, generator: Generator) -> Batch:
        """What is made of a block [T]."""

    def make_held_out(self, tokens: Tensor) -> Dataset:
        return Corrupted(WholeBlocks(tokens, self.config.block_size), self.corrupt, HELD_OUT)

    def make_train_blocks(self, blocks: RandomBlocks) -> Dataset:
        return Corrupted(blocks, self.corrupt, f"corruption {self.config.seed}")

    def build_model(self) -> PreTrainedModel:
        return make_bidirectional_model(
            self.model_class,
            self.config,
            self.end_of_text,
            self.cls,
            self.num_positions(self.config),
            **self.head,
        )

    @property
    def mask(self) -> int:
        return token_id(self.tokenizer, MASK)

    @property
    def cls(self) -> int:
        return token_id(self.tokenizer, CLS)

    @property
    def first_block(self) -> Tensor:
        """The first block [T] of the held-out text as it was."""
        assert isinstance(self.held_out, Corrupted)
        return self.held_out.blocks[0]["input_ids"]

    @cached_property
    def replacement(self) -> Replacement:
        """Tokens drawn as often as they occur in the training text."""
        return Replacement(self.train_tokens, self.config.vocab_size, [self.end_of_text, self.mask, self.cls])
