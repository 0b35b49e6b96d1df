"""``TokenClassifier``: predict which tokens of a text were replaced."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from rich.text import Text
from torch import Generator, Tensor
from transformers import ModernBertForTokenClassification, PreTrainedModel

import lossmith
from lossmith.training.data.corruption import draw_number
from lossmith.training.data.marked_text import Mark, marked_text
from lossmith.training.tasks.measures import ACCURACY, Figure
from lossmith.training.tasks.task import Batch, CorruptedTask, TokenTask, sum_each

LARGEST_SHARE = 0.5  # of a row's tokens replaced; beyond that too little of the text is left
KEPT, REPLACED = 0, 1
FOUND, MISSED, FALSE_ALARM = (
    Mark("«", "»", "bold green", "found"),
    Mark("‹", "›", "bold red", "missed"),
    Mark("¿", "?", "bold yellow", "false alarm"),
)


class TokenClassifier(CorruptedTask, TokenTask):
    """Predict which tokens of a text were replaced by others."""

    mode = lossmith.ModelMode.TOKEN_CLASSIFIER
    model_class = ModernBertForTokenClassification
    head: ClassVar = {"id2label": {KEPT: "kept", REPLACED: "replaced"}}
    num_classes = 2
    far_off = 0.1
    loss_of = " of replaced or not"
    step_figure = ACCURACY
    evaluation_figures = (Figure("f1", "F1 {:.3f}"), ACCURACY, Figure("replaced", "({:.1%} replaced)"))
    sample_title = "replaced tokens"

    def corrupt(self, block: Tensor, generator: Generator) -> Batch:
        """Replace a random share of a block [T], from none of it to half."""
        num = draw_number(0, int(LARGEST_SHARE * len(block)), generator)
        ids, replaced = self.replacement(block, num, generator)
        return {"input_ids": ids, "labels": torch.where(replaced, REPLACED, KEPT)}

    def observe(self, stats: lossmith.TokenStats) -> Tensor:
        return stats.unscaled.correct.float()

    def training_measures(self, mean: float) -> dict[str, float]:
        return {"accuracy": mean}

    def sums(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        labels = batch["labels"].to(model.device)
        logits = model(input_ids=batch["input_ids"].to(model.device)).logits  # [B, T, 2]
        stats = lossmith.token_stats(logits, labels)
        replaced, found = labels == REPLACED, logits.argmax(-1) == REPLACED
        hits, everything = found & replaced, torch.ones_like(labels)
        return sum_each(stats.nll, found == replaced, hits, found, replaced, everything)

    def measures(self, sums: Sequence[float]) -> dict[str, float]:
        nll, correct, hits, found, replaced, num_tokens = sums
        return {
            "loss": nll / num_tokens,
            "accuracy": correct / num_tokens,
            "f1": 2 * hits / max(found + replaced, 1),
            "replaced": replaced / num_tokens,
            "tokens": int(num_tokens),
        }

    @torch.no_grad()
    def sample(self, model: PreTrainedModel) -> Text | None:
        """A held-out block with its replaced tokens marked as found, missed or false alarms."""
        length = self.config.sample_tokens
        if not length:
            return None
        example = max(
            (self.held_out[i] for i in range(min(8, len(self.held_out)))),  # pyright: ignore[reportArgumentType]
            key=lambda example: -abs(example["labels"][:length].float().mean() - LARGEST_SHARE / 3),
        )
        ids, replaced = example["input_ids"][:length], example["labels"][:length]
        model.eval()
        found = model(input_ids=example["input_ids"][None].to(model.device)).logits[0, :length].argmax(-1)
        kinds = {(REPLACED, REPLACED): FOUND, (REPLACED, KEPT): MISSED, (KEPT, REPLACED): FALSE_ALARM}
        marks = [kinds.get(pair) for pair in zip(replaced.tolist(), found.tolist(), strict=True)]
        return marked_text(self.tokenizer, ids.tolist(), marks, (FOUND, MISSED, FALSE_ALARM))
