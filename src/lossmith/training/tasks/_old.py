"""What one mode of the trainer trains: its data, its model, its loss and its measures.

The runner asks a task for these and knows nothing else about it, so that another mode is another
class here.
"""

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import lossmith
from lossmith.training.corpus import Corpus
from lossmith.training.data import END_OF_TEXT, IGNORED, RandomBlocks, Windows, bytes_per_token, encode
from lossmith.training.keys import TrainConfig
from lossmith.training.model import make_language_model

SAMPLE_TEMPERATURE = 0.8
SAMPLE_TOP_K = 50


class Task(Protocol):
    """One mode of the trainer."""

    tokenizer: PreTrainedTokenizerFast
    held_out: Dataset
    num_held_out_tokens: int

    @property
    def train_blocks(self) -> Dataset:
        """What is trained on."""
        ...

    @property
    def num_train_tokens(self) -> int:
        """How much that is."""
        ...

    def make_model(self) -> PreTrainedModel:
        """A new model with the objective inside its forward."""
        ...

    def load_model(self, checkpoint: Path) -> PreTrainedModel:
        """The model of a checkpoint, likewise."""
        ...

    def plain_nll(self) -> list[float]:
        """What the tokens trained on since the last call cost without options, and how many they are."""
        ...

    def expected_initial_loss(self) -> tuple[float, str]:
        """The loss of a model that knows nothing, and how that is called."""
        ...

    def evaluate(
        self,
        model: PreTrainedModel,
        batches: Any,
        add_over_ranks: Callable[[list[float]], list[float]] | None = None,
    ) -> dict[str, float]:
        """The measures of a model over batches of the held-out data; `loss` is always among them."""
        ...

    def sample(self, model: PreTrainedModel) -> str | None:
        """Something to look at once the run is over, or None."""
        ...


class LanguageModel:
    """Predict the next token.

    Args:
        config: the run's configuration.
        corpus: the text.
        tokenizer: trained on the corpus's training split, or the saved run's.
        num_blocks: training blocks that the run will draw.
    """

    def __init__(
        self, config: TrainConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, num_blocks: int
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.corpus = corpus
        self.num_blocks = num_blocks
        held_out_tokens = encode(tokenizer, corpus.held_out)
        self.num_held_out_tokens = len(held_out_tokens)
        self.held_out: Dataset = Windows(held_out_tokens, config.block_size)
        self.bytes_per_token = bytes_per_token(tokenizer)
        self.objective = make_objective(config)
        self.seen = lossmith.Perplexity()

    @cached_property
    def _training(self) -> RandomBlocks:
        """An evaluation alone does not need it."""
        tokens = encode(self.tokenizer, self.corpus.train)
        return RandomBlocks(tokens, self.config.block_size, self.num_blocks, self.config.seed)

    @property
    def train_blocks(self) -> Dataset:
        return self._training

    @property
    def num_train_tokens(self) -> int:
        return len(self._training.tokens)

    def make_model(self) -> PreTrainedModel:
        end_of_text = self.tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        assert isinstance(end_of_text, int)
        return self._with_loss(make_language_model(self.config, end_of_text))

    def load_model(self, checkpoint: Path) -> PreTrainedModel:
        return self._with_loss(AutoModelForCausalLM.from_pretrained(checkpoint))

    def _with_loss(self, model: PreTrainedModel) -> PreTrainedModel:
        # The model's own forward calls this, so the gradients are right under any wrapper of the model.
        model.loss_function = self.loss
        return model

    def loss(
        self,
        logits: torch.Tensor,  # [B, T, V]
        labels: torch.Tensor,  # [B, T], not shifted
        num_items_in_batch: torch.Tensor | int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """The objective, called the way Hugging Face's models call theirs.

        The Trainer counts the targets of all micro-batches and ranks before any forward; with that
        count as the denominator the micro-batches' losses simply add up.
        """
        output = self.objective.evaluate(logits, labels, denominator=num_items_in_batch)
        if torch.is_grad_enabled():
            self.seen.add(output.stats.unscaled.nll.detach().double().sum(), output.num_tokens)
        return output.total

    def plain_nll(self) -> list[float]:
        """The plain negative log-likelihood of the tokens since the last call, summed, and their number."""
        sums = [self.seen.nll_sum, float(self.seen.num_tokens)]
        self.seen.reset()
        return sums

    def expected_initial_loss(self) -> tuple[float, str]:
        return math.log(self.config.vocab_size), f"log {self.config.vocab_size}"

    @torch.no_grad()
    def evaluate(
        self,
        model: PreTrainedModel,
        batches: Any,
        add_over_ranks: Callable[[list[float]], list[float]] | None = None,
    ) -> dict[str, float]:
        """Plain negative log-likelihood per token and what follows from it, weighted by tokens."""
        model.eval()
        plain = lossmith.Perplexity(shift=True)
        num_bytes = 0
        for batch in batches:
            labels = batch["labels"]  # [B, T]
            targets = labels[:, 1:]
            num_bytes += int(self.bytes_per_token[targets[targets != IGNORED]].sum())
            logits = model(input_ids=batch["input_ids"].to(model.device)).logits  # [B, T, V]
            plain.update(logits, labels.to(model.device))
        sums = [plain.nll_sum, plain.num_tokens, num_bytes]
        if add_over_ranks is not None:
            sums = add_over_ranks(sums)
        nll_sum, num_tokens, num_bytes = sums
        total = lossmith.Perplexity()
        total.add(nll_sum, int(num_tokens))
        return {
            "loss": nll_sum / num_tokens,
            "perplexity": total.compute(),
            "bits_per_byte": nll_sum / math.log(2) / num_bytes,
            "tokens": int(num_tokens),
        }

    @torch.no_grad()
    def sample(self, model: PreTrainedModel) -> str | None:
        """Text generated from nothing; the same for the same weights and seed."""
        # Beyond block_size the rotary positions were never trained.
        length = min(self.config.sample_tokens, self.config.block_size - 1)
        if length <= 0:
            return None
        start = torch.tensor([[self.tokenizer.convert_tokens_to_ids(END_OF_TEXT)]], device=model.device)
        devices = [model.device] if model.device.type == "cuda" else []
        model.eval()
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.config.seed)
            tokens = model.generate(  # pyright: ignore[reportCallIssue]
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=length,
                do_sample=True,
                temperature=SAMPLE_TEMPERATURE,
                top_k=min(SAMPLE_TOP_K, self.config.vocab_size),
                use_cache=True,
            )
        return str(self.tokenizer.decode(tokens[0], skip_special_tokens=True))


def make_objective(config: TrainConfig) -> lossmith.Objective:
    """The training loss that the keys describe."""
    return lossmith.CrossEntropyLoss(
        shift=True,
        label_smoothing=config.label_smoothing,
        smoothing_mode=config.smoothing_mode,  # pyright: ignore[reportArgumentType]
        z_loss=config.z_loss,
        focal_gamma=config.focal_gamma,
        confidence_penalty=config.confidence_penalty,
        temperature=config.temperature,
    )
