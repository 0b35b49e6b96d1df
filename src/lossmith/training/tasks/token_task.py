"""``TokenTask``: a task with a class to predict at every position, trained by cross-entropy."""

from typing import Any, ClassVar

import torch
from torch import Tensor

import lossmith
from lossmith.training.tasks.task import Task


class TokenTask(Task):
    """A task whose labels are a class at every position, or none there."""

    shift: ClassVar[bool] = False  # whether logits[t] predict labels[t + 1]

    def make_objective(self) -> lossmith.Objective:
        config = self.config
        return lossmith.CrossEntropyLoss(
            shift=self.shift,
            label_smoothing=config.label_smoothing,
            smoothing_mode=config.smoothing_mode,  # pyright: ignore[reportArgumentType]
            z_loss=config.z_loss,
            focal_gamma=config.focal_gamma,
            confidence_penalty=config.confidence_penalty,
            temperature=config.temperature,
        )

    def loss(
        self,
        logits: Tensor,  # [B, T, V]
        labels: Tensor,  # [B, T], not shifted
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | None,
    ) -> dict[str, Tensor]:
        output = self.pipeline.evaluate(
            logits, labels, denominator=num_items_in_batch, input_ids=inputs["input_ids"]
        )
        assert output.stats is not None
        observed = self.observe(output.stats).detach()
        return {"loss": output.total, "observed": torch.stack([observed.sum(), output.num_tokens])}

    def observe(self, stats: lossmith.TokenStats) -> Tensor:
        """[N] what `training_measure` is made of: the plain negative log-likelihood of each token."""
        return stats.unscaled.nll
