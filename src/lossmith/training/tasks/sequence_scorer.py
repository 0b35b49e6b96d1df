"""``SequenceScorer``: predict how much of a text was replaced."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from rich.table import Table
from torch import Generator, Tensor
from transformers import ModernBertForSequenceClassification, PreTrainedModel

import lossmith
from lossmith.modifiers.tokens.judge import expected_wrongness
from lossmith.training.config.keys import TrainConfig
from lossmith.training.data.corruption import draw_number, generator_of
from lossmith.training.tasks.measures import Figure, KnowingNothing
from lossmith.training.tasks.task import Batch, CorruptedTask, detached, sum_each

SAMPLE_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
FAR_OFF = 0.15  # for a mean over few texts
ROUNDING = 1e-9
ERROR = Figure("mean_absolute_error", "mean absolute error {:.3f}")


class SequenceScorer(CorruptedTask):
    """Predict the score y(x) = x^4 - 2 x^3 + 2 x of the share x of tokens that were replaced.

    The input is `<|cls|>` and a block, the prediction the sigmoid of the model's one logit, the loss its
    squared error. `judge_weight_checkpoint` takes such a checkpoint.
    """

    mode = lossmith.ModelMode.SEQUENCE_SCORER
    model_class = ModernBertForSequenceClassification
    head: ClassVar = {"id2label": {0: "wrongness"}}
    loss_words = "loss {:.4f}"
    step_figure = ERROR
    evaluation_figures = (ERROR, Figure("correlation", "correlation {:.3f}"))
    sample_title = "one text, more and more of it replaced"

    @classmethod
    def num_positions(cls, config: TrainConfig) -> int:
        return config.block_size + 1  # <|cls|> precedes the block

    def replace(self, block: Tensor, num: int, generator: Generator) -> Batch:
        """A block [T] with `num` tokens replaced, and its score."""
        ids, replaced = self.replacement(block, num, generator)
        return {
            "input_ids": torch.cat([torch.tensor([self.cls]), ids]),
            "labels": expected_wrongness(replaced.float().mean()),
        }

    def corrupt(self, block: Tensor, generator: Generator) -> Batch:
        """Replace a random share of a block [T], from none of it to all."""
        return self.replace(block, draw_number(0, len(block), generator), generator)

    def make_objective(self) -> None:
        return None

    def loss(
        self,
        predictions: Mapping[str, Any],  # logits [B, 1]
        labels: Tensor,  # [B]
        inputs: dict[str, Any],
        denominator: Tensor | None,
    ) -> dict[str, Any]:
        scores = predictions["logits"].float().squeeze(-1).sigmoid()
        output = self.pipeline.evaluate(scores, labels, denominator=denominator)
        errors = (scores - labels).detach().abs()
        observed = torch.stack([errors.sum(), torch.ones_like(errors).sum()])
        return {"loss": output.total, "parts": detached(output.parts), "observed": observed}

    def describe_loss(self) -> str:
        return "squared error of the score"

    def training_measures(self, mean: float) -> dict[str, float]:
        return {"mean_absolute_error": mean}

    def knowing_nothing(self) -> KnowingNothing:
        length = self.config.block_size
        targets = expected_wrongness(torch.arange(length + 1, dtype=torch.float64) / length)
        loss = float((targets - 0.5).square().mean())
        return KnowingNothing(loss, f"saying 0.5 of every text costs {loss:.3f}", FAR_OFF)

    def sums(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        logits = model(input_ids=batch["input_ids"].to(model.device)).logits  # [B, 1]
        scores = logits.squeeze(-1).cpu().double().sigmoid()
        targets = batch["labels"].double()
        errors = scores - targets
        products = (scores**2, targets**2, scores * targets)
        return sum_each(errors**2, errors.abs(), scores, targets, *products, torch.ones_like(targets))

    def measures(self, sums: Sequence[float]) -> dict[str, float]:
        num = sums[-1]
        squared, absolute, score, target, score2, target2, product = (value / num for value in sums[:-1])
        spread = math.sqrt(max(score2 - score**2, 0.0)) * math.sqrt(max(target2 - target**2, 0.0))
        return {
            "loss": squared,
            "mean_absolute_error": absolute,
            # Below that it would be the correlation of rounding errors.
            "correlation": (product - score * target) / spread if spread > ROUNDING else math.nan,
            "sequences": int(num),
        }

    @torch.no_grad()
    def sample(self, model: PreTrainedModel) -> Table | None:
        """A held-out text with more and more of it replaced, and the model's scores."""
        if not self.config.sample_tokens:
            return None
        block = self.first_block
        table = Table(box=None, padding=(0, 3, 0, 0))
        for title in ("replaced", "target", "predicted"):
            table.add_column(title, justify="right")
        model.eval()
        for share in SAMPLE_SHARES:
            example = self.replace(block, round(share * len(block)), generator_of(f"sample {share}"))
            logit = model(input_ids=example["input_ids"][None].to(model.device)).logits
            table.add_row(f"{share:.0%}", f"{example['labels']:.3f}", f"{float(logit.sigmoid()):.3f}")
        return table
