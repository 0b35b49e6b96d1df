"""``CausalLanguageModel``: predict the next token."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from rich.text import Text
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, MixtralForCausalLM, PreTrainedModel

import lossmith
from lossmith.components.moe import MoEBalance
from lossmith.integrations.huggingface.attachment import attach, attached_to
from lossmith.training.config.keys import TrainConfig
from lossmith.training.data.blocks import IGNORED, Windows
from lossmith.training.data.tokenizer import bytes_per_token
from lossmith.training.tasks.measures import PERPLEXITY, Figure, perplexity
from lossmith.training.tasks.models import choose_experts_by_bias, make_language_model
from lossmith.training.tasks.task import Batch, Seen, TokenTask

SAMPLE_TEMPERATURE = 0.8
SAMPLE_TOP_K = 50


class CausalLanguageModel(TokenTask):
    """Predict the next token."""

    mode = lossmith.ModelMode.LANGUAGE_MODEL
    model_class = LlamaForCausalLM
    shift = True
    evaluation_figures = (PERPLEXITY, Figure("bits_per_byte", "{:.3f} bits per byte"))

    def make_held_out(self, tokens: Tensor) -> Dataset:
        self.bytes_per_token = bytes_per_token(self.tokenizer)
        return Windows(tokens, self.config.block_size)

    @classmethod
    def architecture(cls, config: TrainConfig) -> type[PreTrainedModel]:
        return MixtralForCausalLM if config.experts else cls.model_class

    def build_model(self) -> PreTrainedModel:
        # The tokenizer of an older run has only the end-of-text token.
        others = [token for token in self.tokenizer.all_special_ids if token != self.end_of_text]
        return make_language_model(self.config, self.end_of_text, never_generated=others)

    def put_loss_into(self, model: PreTrainedModel) -> PreTrainedModel:
        # `attach` gives components the hidden states, the routers' logits and the unembedding.
        attach(model, self.pipeline, materialize_logits=self.config.materialize_logits or None)
        for part in self.pipeline.modules():
            if isinstance(part, MoEBalance) and part.mode == "bias":
                choose_experts_by_bias(model, part)
        self.attached = attached_to(model)
        assert self.attached is not None
        self.attached.observe = self.observed
        return model

    def seen(self, outputs: Any) -> Seen:
        assert self.attached is not None
        assert self.attached.parts is not None
        assert self.attached.observed is not None
        return Seen(self.attached.parts, self.attached.observed, self.shares, self.pulls)

    def sums(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        labels = batch["labels"]  # [B, T]
        targets = labels[:, 1:]
        num_bytes = self.bytes_per_token[targets[targets != IGNORED]].sum()
        predictions = self.predict(model, batch["input_ids"].to(model.device))
        plain = lossmith.CrossEntropyLoss(reduction="none", shift=True)
        output = plain.evaluate(predictions, labels.to(model.device))
        wide = torch.float32 if output.total.device.type == "mps" else torch.float64
        sums = output.total.sum(dtype=wide), output.num_tokens, num_bytes
        return torch.stack([value.cpu().double() for value in sums])

    def predict(self, model: PreTrainedModel, ids: Tensor) -> Any:
        """Logits [B, T, V], or the head's inputs where the model trains without logits: all of them at once
        would take more memory than training does."""
        attached = attached_to(model)
        if attached is None:
            return model(input_ids=ids).logits
        *_, predictions = attached.fused.run(model, lambda: model(input_ids=ids), leaves_out=True)
        return predictions

    def measures(self, sums: Sequence[float]) -> dict[str, float]:
        nll, num_tokens, num_bytes = sums
        return {
            "loss": nll / num_tokens,
            "perplexity": perplexity(nll / num_tokens),
            "bits_per_byte": nll / math.log(2) / num_bytes,
            "tokens": int(num_tokens),
        }

    def sample(self, model: PreTrainedModel) -> Text | None:
        """Text generated from nothing, the same for the same weights and seed."""
        # Positions beyond block_size were never trained.
        length = min(self.config.sample_tokens, self.config.block_size - 1)
        if length <= 0:
            return None
        start = torch.tensor([self.end_of_text])
        tokens = self.generate(model, start, length, seed=self.config.seed)
        return Text(str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip("\n"))

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        start: Tensor,
        length: int,
        *,
        seed: int,
        temperature: float = SAMPLE_TEMPERATURE,
        top_k: int = SAMPLE_TOP_K,
    ) -> Tensor:
        """The tokens `start` [T] and up to `length` drawn after them; at temperature 0 the most probable."""
        devices = [model.device] if model.device.type == "cuda" else []
        drawn = (
            {"temperature": temperature, "top_k": min(top_k, self.config.vocab_size)} if temperature else {}
        )
        ids = start[None].to(model.device)
        model.eval()
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            tokens = model.generate(  # pyright: ignore[reportCallIssue]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                do_sample=temperature > 0,
                **drawn,
                use_cache=True,
            )
        return tokens[0].cpu()
