"""``TokenTask``: a task with a class to predict at every position, trained by cross-entropy."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

import lossmith
from lossmith.training.config.objective import make_objective
from lossmith.training.tasks.measures import perplexity
from lossmith.training.tasks.task import Task, detached


class TokenTask(Task):
    """A task whose labels are a class at every position, or none there."""

    measured: lossmith.Metrics | None = None
    shift: ClassVar[bool] = False  # whether logits[t] predict labels[t + 1]
    num_classes: ClassVar[int | None] = None  # where they are not the vocabulary's

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

    def part_metrics(self) -> dict[str, float]:
        return {} if self.measured is None else self.measured.to_dict()

    def observe(self, stats: lossmith.TokenStats) -> Tensor:
        """[N] what `training_measures` are made of: the plain negative log-likelihood of each token."""
        return stats.unscaled.nll
