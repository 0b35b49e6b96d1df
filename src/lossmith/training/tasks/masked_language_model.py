"""``MaskedLanguageModel``: predict masked tokens from both sides."""

from collections.abc import Sequence

import torch
from rich.text import Text
from torch import Generator, Tensor
from transformers import ModernBertForMaskedLM, PreTrainedModel

import lossmith
from lossmith.integrations.huggingface.fused_head import FusedHead
from lossmith.integrations.huggingface.trial import try_out
from lossmith.training.data.blocks import IGNORED
from lossmith.training.data.corruption import draw_number, generator_of, mask_tokens
from lossmith.training.data.marked_text import Mark, marked_text
from lossmith.training.tasks.loss_in_forward import with_loss
from lossmith.training.tasks.measures import ACCURACY, PERPLEXITY, perplexity
from lossmith.training.tasks.task import Batch, CorruptedTask, TokenTask, sum_each

SAMPLE_SHARE = 0.3  # masked in the sample
RIGHT, WRONG = Mark("«", "»", "bold green", "right"), Mark("‹", "›", "bold red", "wrong")


class MaskedLanguageModel(CorruptedTask, TokenTask):
    """Predict masked tokens, with a new share masked in each row, as in discrete diffusion.

    Every number of masked tokens from 1 to all is equally likely, and so is every choice of them.
    """

    mode = lossmith.ModelMode.LANGUAGE_MODEL
    model_class = ModernBertForMaskedLM
    loss_of = " of masked tokens"
    evaluation_figures = (PERPLEXITY, ACCURACY)
    sample_title = "masked tokens filled in"

    def corrupt(self, block: Tensor, generator: Generator) -> Batch:
        """Mask a random share of a block [T]; only masked tokens have labels."""
        ids, masked = mask_tokens(block, self.mask, draw_number(1, len(block), generator), generator)
        return {"input_ids": ids, "labels": torch.where(masked, block, IGNORED)}

    def put_loss_into(self, model: PreTrainedModel) -> PreTrainedModel:
        fused = None if self.config.materialize_logits else FusedHead(model, try_out(model))
        return with_loss(model, self.loss, fused)

    def sums(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        labels = batch["labels"].to(model.device)
        logits = model(input_ids=batch["input_ids"].to(model.device)).logits  # [B, T, V]
        stats = lossmith.token_stats(logits, labels).compute("nll", "correct")
        return sum_each(stats.nll, stats.correct, labels != IGNORED)

    def measures(self, sums: Sequence[float]) -> dict[str, float]:
        nll, correct, num_tokens = sums
        return {
            "loss": nll / num_tokens,
            "perplexity": perplexity(nll / num_tokens),
            "accuracy": correct / num_tokens,
            "tokens": int(num_tokens),
        }

    @torch.no_grad()
    def sample(self, model: PreTrainedModel) -> Text | None:
        """The beginning of the held-out text with three tokens in ten masked and filled in."""
        block = self.first_block[: self.config.sample_tokens]
        if not len(block):
            return None
        num = max(1, round(SAMPLE_SHARE * len(block)))
        ids, masked = mask_tokens(block, self.mask, num, generator_of("sample"))
        model.eval()
        logits = model(input_ids=ids[None].to(model.device)).logits[0]
        filled = torch.where(masked, logits.argmax(-1).cpu(), block)
        marks = [
            None if not was_masked else RIGHT if is_right else WRONG
            for was_masked, is_right in zip(masked.tolist(), (filled == block).tolist(), strict=True)
        ]
        return marked_text(self.tokenizer, filled.tolist(), marks, (RIGHT, WRONG))
