"""``Task``: what one mode of the trainer trains: its data, its model, its loss and its measures.

The runner asks a task for these and knows nothing else about it, so that another mode is another subclass,
and a line in the table of modes (`config/keys.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import RenderableType
from torch import Generator, Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import lossmith
from lossmith.training.config.keys import TrainConfig
from lossmith.training.config.loss_keys import OPTIONS
from lossmith.training.config.objective import make_objective
from lossmith.training.data.blocks import RandomBlocks, WholeBlocks
from lossmith.training.data.corpus import Corpus
from lossmith.training.data.corruption import Corrupted, Replacement
from lossmith.training.data.tokenizer import CLS, END_OF_TEXT, MASK, encode, token_id
from lossmith.training.tasks.loss_in_forward import with_loss
from lossmith.training.tasks.measures import Figure, KnowingNothing, perplexity, uniform_guess
from lossmith.training.tasks.models import make_bidirectional_model

Batch = dict[str, Tensor]
HELD_OUT = "held out"  # names the random numbers of the held-out blocks: the same in every run
LOSS_NAMES = {"cross_entropy": "cross-entropy", "nvamp": "NVAMP", "unified": "unified loss"}


@dataclass(frozen=True)
class Seen:
    """What is to be known of a batch that was trained on.

    Attributes:
        parts: what its loss was made of, detached.
        observed: the sum that `training_measures` takes the mean of, and how many they were [2].
    """

    parts: Mapping[str, Tensor]
    observed: Tensor


class Task(ABC):
    """One mode of the trainer.

    Args:
        config: the run's configuration.
        corpus: the text.
        tokenizer: trained on the corpus's training split, or the saved run's.
        num_blocks: training blocks that the run will draw.

    Attributes:
        held_out: what it is judged by.
        num_held_out_tokens: how much that is.
        pipeline: the loss; the loss modifiers are added to it when training starts.
    """

    mode: ClassVar[lossmith.ModelMode]
    model_class: ClassVar[type[PreTrainedModel]]
    loss_of: ClassVar[str] = ""  # what the loss is of, where that has to be said
    step_figures: ClassVar[Sequence[Figure]]
    evaluation_figures: ClassVar[Sequence[Figure]]
    sample_title: ClassVar[str] = "sample"

    def __init__(
        self, config: TrainConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, num_blocks: int
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.corpus = corpus
        self.num_blocks = num_blocks
        self.end_of_text = token_id(tokenizer, END_OF_TEXT)
        held_out_tokens = encode(tokenizer, corpus.held_out)
        self.num_held_out_tokens = len(held_out_tokens)
        self.held_out: Dataset = self.make_held_out(held_out_tokens)
        self.pipeline = lossmith.LossModifierPipeline(base=self.make_objective(), model_mode=self.mode)

    # ── data ──────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def train_tokens(self) -> Tensor:
        """The training text, [N]; most evaluations do not need it."""
        return encode(self.tokenizer, self.corpus.train)

    @cached_property
    def train_blocks(self) -> Dataset:
        """What is trained on."""
        config = self.config
        blocks = RandomBlocks(self.train_tokens, config.block_size, self.num_blocks, config.seed)
        return self.make_train_blocks(blocks)

    @abstractmethod
    def make_held_out(self, tokens: Tensor) -> Dataset:
        """Examples of the held-out text [N]."""

    @abstractmethod
    def make_train_blocks(self, blocks: RandomBlocks) -> Dataset:
        """Examples of blocks of the training text."""

    @property
    def mask(self) -> int:
        return token_id(self.tokenizer, MASK)

    @property
    def cls(self) -> int:
        return token_id(self.tokenizer, CLS)

    # ── the model and its loss ────────────────────────────────────────────────────────────────────

    @classmethod
    def num_positions(cls, config: TrainConfig) -> int:
        """How long a sequence the model can read."""
        return config.block_size

    @classmethod
    def architecture(cls, config: TrainConfig) -> type[PreTrainedModel]:
        """The class of the model."""
        return cls.model_class

    @abstractmethod
    def build_model(self) -> PreTrainedModel:
        """A new model, as its library makes it."""

    def make_model(self) -> PreTrainedModel:
        """A new model with the loss inside its forward."""
        return self.put_loss_into(self.build_model())

    def load_model(self, checkpoint: Path) -> PreTrainedModel:
        """The model of a checkpoint, likewise."""
        return self.put_loss_into(self.architecture(self.config).from_pretrained(checkpoint))

    def put_loss_into(self, model: PreTrainedModel) -> PreTrainedModel:
        """Let the model's forward return the loss; the modifiers have to be in it already."""
        return with_loss(model, self.loss)

    @abstractmethod
    def make_objective(self) -> lossmith.Objective | None:
        """The training loss without modifiers, None for squared error."""

    def loss(
        self,
        predictions: Mapping[str, Any],
        labels: Tensor,
        inputs: dict[str, Any],
        denominator: Tensor | None,
    ) -> dict[str, Any]:
        """What the model's forward returns in training: `loss`, and the fields of `Seen`.

        The Trainer adds up `count` over all micro-batches and ranks before any forward; with that sum as
        the denominator the micro-batches' losses simply add up.
        """
        raise NotImplementedError

    def seen(self, outputs: Any) -> Seen:
        """What is to be known of the last batch, of what the model's forward returned."""
        return Seen(outputs["parts"], outputs["observed"])

    def count(self, batch: Batch) -> Tensor:
        """What the loss of a batch is divided by."""
        return self.pipeline.count(batch["labels"])

    @abstractmethod
    def training_measures(self, mean: float) -> dict[str, float]:
        """What is logged beside the loss, from the mean of what was observed."""

    def part_metrics(self) -> dict[str, float]:
        """What the objective measured of its parts in the last batch, `moe_balance_loss/max_violation`
        say."""
        return {}

    def describe_loss(self) -> str:
        """The loss and those of its options that are on."""
        config = self.config
        changed = [f"{name} {getattr(config, name)}" for name in config.changed(OPTIONS[config.loss])]
        return ", ".join([LOSS_NAMES[config.loss] + self.loss_of, *changed])

    # ── how good it is ────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def knowing_nothing(self) -> KnowingNothing:
        """What a model costs that knows nothing."""

    @abstractmethod
    def sums(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Sums over a held-out batch that `measures` is made of."""

    @abstractmethod
    def measures(self, sums: Sequence[float]) -> dict[str, float]:
        """The measures, from the sums over everything; `loss`, unmodified, is always among them."""

    @torch.no_grad()
    def evaluate(
        self,
        model: PreTrainedModel,
        batches: Any,
        add_over_ranks: Callable[[list[float]], list[float]] = list,
    ) -> dict[str, float]:
        """The measures of a model over batches of the held-out data, each sequence weighing the same
        whatever batch it came in."""
        model.eval()
        total: Tensor | float = 0.0
        for batch in batches:
            total = total + self.sums(model, batch).cpu().double()
        assert isinstance(total, Tensor), "nothing to evaluate"
        return self.measures(add_over_ranks(total.tolist()))

    @abstractmethod
    def sample(self, model: PreTrainedModel) -> RenderableType | None:
        """Something to look at once the run is over, or None."""


class TokenTask(Task):
    """A task whose labels are a class at every position, or none there."""

    measured: lossmith.Metrics | None = None
    shift: ClassVar[bool] = False  # whether logits[t] predict labels[t + 1]
    num_classes: ClassVar[int | None] = None  # where they are not the vocabulary's
    far_off: ClassVar[float] = 0.5  # nats

    def make_objective(self) -> lossmith.Objective:
        return make_objective(self.config, shift=self.shift)

    def loss(
        self,
        predictions: Mapping[str, Any],  # logits [B, T, V], or what makes them
        labels: Tensor,  # [B, T]
        inputs: dict[str, Any],
        denominator: Tensor | None,
    ) -> dict[str, Any]:
        output = self.pipeline.evaluate(
            targets=labels, denominator=denominator, input_ids=inputs["input_ids"], **predictions
        )
        return {"loss": output.total, "parts": detached(output.parts), "observed": self.observed(output)}

    def observed(self, output: lossmith.LossOutput) -> Tensor:
        """[2] the sum of what is observed of every token, and how many they are. What the objective measures
        of its parts, every metric with a slash in its name, is kept until the next batch, unread."""
        assert output.stats is not None
        self.measured = output.metrics.only(lambda name: "/" in name and name not in output.parts)
        return torch.stack([self.observe(output.stats).detach().sum(), output.num_tokens])

    def training_measures(self, mean: float) -> dict[str, float]:
        return {"perplexity": perplexity(mean)}

    def knowing_nothing(self) -> KnowingNothing:
        return uniform_guess(self.num_classes or self.config.vocab_size, self.far_off)

    def part_metrics(self) -> dict[str, float]:
        return {} if self.measured is None else self.measured.to_dict()

    def observe(self, stats: lossmith.TokenStats) -> Tensor:
        """[N] what `training_measures` are made of: the plain negative log-likelihood of each token."""
        return stats.unscaled.nll


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
    def first_block(self) -> Tensor:
        """The first block [T] of the held-out text as it was."""
        assert isinstance(self.held_out, Corrupted)
        return self.held_out.blocks[0]["input_ids"]

    @cached_property
    def replacement(self) -> Replacement:
        """Tokens drawn as often as they occur in the training text."""
        return Replacement(self.train_tokens, self.config.vocab_size, [self.end_of_text, self.mask, self.cls])


def detached(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a loss as numbers, without what they were made of."""
    return {name: part.detach() for name, part in parts.items()}


def sum_each(*values: Tensor) -> Tensor:
    """The sum of each tensor, in double precision on the CPU."""
    return torch.stack([value.detach().cpu().double().sum() for value in values])
