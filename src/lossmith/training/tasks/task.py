"""``Task``: a mode of the trainer: its data, model, loss and measures.

The runner knows nothing else about a mode, so a new mode is a subclass and a line in `MODES` of
`config/keys.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from rich.console import RenderableType
from torch import Generator, Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import lossmith
from lossmith.engine.predictions import source_of
from lossmith.training.config.keys import TrainConfig
from lossmith.training.config.loss_keys import OPTIONS
from lossmith.training.config.objective import make_objective
from lossmith.training.config.own_loss import require_usable
from lossmith.training.data.blocks import RandomBlocks, WholeBlocks
from lossmith.training.data.corpus import Corpus
from lossmith.training.data.corruption import Corrupted, Replacement
from lossmith.training.data.tokenizer import CLS, END_OF_TEXT, MASK, encode, token_id
from lossmith.training.tasks.loss_in_forward import with_loss
from lossmith.training.tasks.measures import (
    PERPLEXITY,
    SPEED,
    Figure,
    KnowingNothing,
    perplexity,
    uniform_guess,
)
from lossmith.training.tasks.models import make_bidirectional_model

Batch = dict[str, Tensor]
HELD_OUT = "held out"  # the seed of the held-out blocks, the same in every run
LOSS_NAMES = {"cross_entropy": "cross-entropy", "nvamp": "NVAMP", "unified": "unified loss"}


@dataclass(frozen=True)
class Seen:
    """What is known of a training batch.

    Attributes:
        parts: the parts of its loss, detached.
        observed: [2] the sum of what `training_measures` averages, and its number of terms.
        shares: [K, N] what each token adds to the first K parts; None if they belong to no tokens.
        pulls: what `LossOutput.pull` says of each part; empty unless it was asked for.
    """

    parts: Mapping[str, Tensor]
    observed: Tensor
    shares: Tensor | None = None
    pulls: Mapping[str, lossmith.Pull] = field(default_factory=dict)


class Task(ABC):
    """A mode of the trainer.

    Args:
        config: the run's configuration.
        corpus: the text.
        tokenizer: trained on the corpus's training split, or the saved run's.
        num_blocks: the number of training blocks that the run will draw.
        objective: what a language model is trained with in place of what the keys say.

    Attributes:
        held_out: the data for evaluations.
        num_held_out_tokens: the length of the held-out text.
        pipeline: the loss; the loss modifiers are added to it when training starts.
    """

    mode: ClassVar[lossmith.ModelMode]
    model_class: ClassVar[type[PreTrainedModel]]
    loss_of: ClassVar[str] = ""  # what it predicts, if that is not obvious
    loss_words: ClassVar[str] = "loss {:.3f}"
    step_figure: ClassVar[Figure]  # shown beside the loss of a step
    evaluation_figures: ClassVar[Sequence[Figure]]  # and beside that of an evaluation
    sample_title: ClassVar[str] = "sample"
    asks_pull = False  # of the parts of the next batch
    # Of the last batch; see `Seen`.
    shares: Tensor | None = None
    pulls: Mapping[str, lossmith.Pull] = MappingProxyType({})

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerFast,
        num_blocks: int,
        objective: lossmith.Objective | None = None,
    ):
        self.config = config
        self.given = objective
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
        """The training data."""
        config = self.config
        blocks = RandomBlocks(self.train_tokens, config.block_size, self.num_blocks, config.seed)
        return self.make_train_blocks(blocks)

    @abstractmethod
    def make_held_out(self, tokens: Tensor) -> Dataset:
        """Examples of the held-out text [N]."""

    def make_train_blocks(self, blocks: RandomBlocks) -> Dataset:
        """Examples of blocks of the training text."""
        return blocks

    @property
    def mask(self) -> int:
        return token_id(self.tokenizer, MASK)

    @property
    def cls(self) -> int:
        return token_id(self.tokenizer, CLS)

    # ── the model and its loss ────────────────────────────────────────────────────────────────────

    @classmethod
    def num_positions(cls, config: TrainConfig) -> int:
        """The longest sequence that the model can read."""
        return config.block_size

    @classmethod
    def architecture(cls, config: TrainConfig) -> type[PreTrainedModel]:
        """The class of the model."""
        return cls.model_class

    @abstractmethod
    def build_model(self) -> PreTrainedModel:
        """A new model, without the loss."""

    def make_model(self) -> PreTrainedModel:
        """A new model with the loss inside its forward."""
        return self.put_loss_into(self.build_model())

    def load_model(self, checkpoint: Path) -> PreTrainedModel:
        """A checkpoint's model with the loss inside its forward.

        The checkpoint gives the weights alone: its `config.json` could name other code.
        """
        with torch.device("meta"):
            config = self.build_model().config
        model_class = self.architecture(self.config)
        model = model_class.from_pretrained(
            checkpoint, config=config, use_safetensors=True, local_files_only=True
        )
        return self.put_loss_into(model)

    def put_loss_into(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put the loss, with its modifiers, into the model's forward."""
        return with_loss(model, self.loss)

    @abstractmethod
    def make_objective(self) -> lossmith.Objective | None:
        """The training loss without modifiers; None for squared error."""

    def loss(
        self,
        predictions: Mapping[str, Any],
        labels: Tensor,
        inputs: dict[str, Any],
        denominator: Tensor | None,
    ) -> dict[str, Any]:
        """What the model's forward returns in training: `loss`, and the fields of `Seen`.

        The Trainer sums `count` over all micro-batches and ranks before any forward and passes it as
        `denominator`, so that the losses of the micro-batches add up.
        """
        raise NotImplementedError

    def seen(self, outputs: Any) -> Seen:
        """What is known of the last batch, from what the model's forward returned."""
        return Seen(outputs["parts"], outputs["observed"], self.shares, self.pulls)

    def count(self, batch: Batch) -> Tensor:
        """The denominator of a batch's loss."""
        return self.pipeline.count(batch["labels"])

    @abstractmethod
    def training_measures(self, mean: float) -> dict[str, float]:
        """What is logged beside the loss, from the mean of what was observed."""

    def part_metrics(self) -> dict[str, float]:
        """The metrics of the objective's parts in the last batch: `moe_balance_loss/max_violation` ..."""
        return {}

    def describe_loss(self) -> str:
        """The loss and its options that are on."""
        config = self.config
        options = OPTIONS.get(config.loss, ())  # none, if it is one's own
        changed = [f"{name} {getattr(config, name)}" for name in config.changed(options)]
        return ", ".join([f"{LOSS_NAMES.get(config.loss, config.loss)}{self.loss_of}", *changed])

    def describe(self, row: dict[str, Any]) -> str:
        """A row of the log in words."""
        return "  ".join(self.figures(row))

    def figures(self, row: dict[str, Any]) -> list[str]:
        """The measures in a row of the log, each in words."""
        if "val_loss" in row:
            figures = [Figure("val_loss", f"validation {self.loss_words}"), *self.evaluation_figures]
        else:
            figures = [Figure("loss", self.loss_words), self.step_figure, SPEED]
        return [figure.of(row) for figure in figures]

    # ── how good it is ────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def knowing_nothing(self) -> KnowingNothing:
        """The loss of a model that knows nothing."""

    @abstractmethod
    def sums(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Sums over a held-out batch, from which `measures` are computed."""

    @abstractmethod
    def measures(self, sums: Sequence[float]) -> dict[str, float]:
        """The measures from the total of all sums; the unmodified `loss` is among them."""

    @torch.no_grad()
    def evaluate(
        self,
        model: PreTrainedModel,
        batches: Any,
        add_over_ranks: Callable[[list[float]], list[float]] = list,
    ) -> dict[str, float]:
        """The measures of a model over held-out batches; how they are batched does not matter."""
        model.eval()
        total: Tensor | float = 0.0
        for batch in batches:
            total = total + self.sums(model, batch).cpu().double()
        assert isinstance(total, Tensor), "nothing to evaluate"
        return self.measures(add_over_ranks(total.tolist()))

    @abstractmethod
    def sample(self, model: PreTrainedModel) -> RenderableType | None:
        """Something to show at the end of a run, or None."""


class TokenTask(Task):
    """A task with a class to predict at every position that has a label, trained by cross-entropy."""

    step_figure = PERPLEXITY
    measured: lossmith.Metrics | None = None
    shift: ClassVar[bool] = False  # whether logits[t] predict labels[t + 1]
    num_classes: ClassVar[int | None] = None  # if it is not the vocabulary's
    far_off: ClassVar[float] = 0.5  # nats

    def make_objective(self) -> lossmith.Objective:
        if self.given is not None:
            return require_usable(self.given, self.config.loss, shift=self.shift)
        return make_objective(self.config, shift=self.shift)

    def loss(
        self,
        predictions: Mapping[str, Any],  # logits [B, T, V], or the head's inputs
        labels: Tensor,  # [B, T]
        inputs: dict[str, Any],
        denominator: Tensor | None,
    ) -> dict[str, Any]:
        output = self.pipeline.evaluate(
            targets=labels, denominator=denominator, input_ids=inputs["input_ids"], **predictions
        )
        observed = self.observed(output, source_of(predictions["logits"]))
        return {"loss": output.total, "parts": detached(output.parts), "observed": observed}

    def observed(self, output: lossmith.LossOutput, source: Tensor) -> Tensor:
        """[2] the sum of what is observed of every token, and their number.

        The metrics of the objective's parts, those with a slash in their names, are kept unread until the
        next batch.
        """
        assert output.stats is not None
        self.shares = output.shares
        self.pulls = pulls_of(output, source) if self.asks_pull else {}
        self.measured = output.metrics.only(lambda name: "/" in name and name not in output.parts)
        return torch.stack([self.observe(output.stats).detach().sum(), output.num_tokens])

    def training_measures(self, mean: float) -> dict[str, float]:
        return {"perplexity": perplexity(mean)}

    def knowing_nothing(self) -> KnowingNothing:
        return uniform_guess(self.num_classes or self.config.vocab_size, self.far_off)

    def part_metrics(self) -> dict[str, float]:
        return {} if self.measured is None else self.measured.to_dict()

    def observe(self, stats: lossmith.TokenStats) -> Tensor:
        """What `training_measures` averages, [N]: each token's plain negative log-likelihood."""
        return stats.unscaled.nll


class CorruptedTask(Task):
    """A task of a bidirectional model that sees a corrupted block."""

    head: ClassVar[dict[str, Any]] = {}  # options of the model's head

    @abstractmethod
    def corrupt(self, block: Tensor, generator: Generator) -> Batch:
        """The example made from a block [T]."""

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
        """The first block [T] of the held-out text, not corrupted."""
        assert isinstance(self.held_out, Corrupted)
        return self.held_out.blocks[0]["input_ids"]

    @cached_property
    def replacement(self) -> Replacement:
        """Draws tokens by their frequency in the training text."""
        return Replacement(self.train_tokens, self.config.vocab_size, [self.end_of_text, self.mask, self.cls])


def pulls_of(output: lossmith.LossOutput, source: Tensor) -> dict[str, lossmith.Pull]:
    """The pull of each part of a loss at what it was computed from; a single part pulls alone."""
    if len(output.parts) < 2:
        return {}
    with torch.autocast(source.device.type, enabled=False):  # the way back has the precision of the way there
        return output.pull(source)


def detached(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a loss without their graphs."""
    return {name: part.detach() for name, part in parts.items()}


def sum_each(*values: Tensor) -> Tensor:
    """The sum of each tensor, in double precision on the CPU."""
    return torch.stack([value.detach().cpu().double().sum() for value in values])
