"""``ObjectiveTrainer``: what every Trainer with an objective does with it, wherever the loss is computed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from lossmith.integrations.huggingface.saved_weights import load_renamed
from lossmith.modifiers.pipeline import LossModifierPipeline
from lossmith.objectives.objective import Objective

LOSS_FILE = "lossmith_loss.pt"
PARTS = "loss/"
METRICS_OF_MODIFIERS = "loss_modifiers/"


class ObjectiveTrainer(Trainer):
    """Hugging Face's Trainer for a model whose forward computes an objective.

    It passes on what the loss is divided by, logs the parts and what modifiers measure, and saves and
    restores the state. Subclasses set ``loss`` before they call ``__init__``, and say where a batch's parts
    are.

    Args:
        args, options: of :class:`transformers.Trainer`.

    Attributes:
        loss: the objective.
    """

    loss: Objective

    def __init__(self, *args: Any, **options: Any) -> None:
        self._sums: dict[str, Tensor] = {}
        self._summed_since = 0
        super().__init__(*args, **options)
        self.add_callback(_TellTheLoss(self))

    # ── the loss ──────────────────────────────────────────────────────────────────────────────────

    def parts_of(self, outputs: Any) -> Mapping[str, Tensor]:
        """What the loss of the last batch was made of, detached.

        Args:
            outputs: what the model returned.
        """
        raise NotImplementedError

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if num_items_in_batch is not None:
            # by its own name: num_items_in_batch are tokens
            inputs = {**inputs, "denominator": num_items_in_batch}
        # a subclass may compute another loss here
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        if model.training:
            is_multiplied = self.args.average_tokens_across_devices and num_items_in_batch is not None
            factor = self.accelerator.num_processes // self.get_tp_size() if is_multiplied else 1
            self._take_in(self.parts_of(outputs), factor)
        return (loss, outputs) if return_outputs else loss

    # ── the log ───────────────────────────────────────────────────────────────────────────────────

    def _take_in(self, parts: Mapping[str, Tensor], factor: int) -> None:
        """Add up the parts, as the Trainer does with the loss."""
        if not self._sums:
            self._summed_since = self.state.global_step
        for name, part in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + factor * part

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if "loss" in logs and self._sums:
            logs |= {f"{PARTS}{name}": value for name, value in self._mean_parts().items()}
        if "loss" in logs and isinstance(self.loss, LossModifierPipeline):
            metrics = self.loss.get_all_metrics()
            logs |= {f"{METRICS_OF_MODIFIERS}{name}": value for name, value in metrics.items()}
        super().log(logs, *args, **options)

    def _mean_parts(self) -> dict[str, float]:
        """The parts a step, a mean over ranks, since the last time."""
        num_steps = max(self.state.global_step - self._summed_since, 1)
        sums = torch.stack([value.float() for value in self._sums.values()])
        gathered: Any = self.accelerator.gather(sums.unsqueeze(0))
        means = gathered.mean(0) / num_steps
        named = dict(zip(self._sums, means.tolist(), strict=True))
        self._sums = {}
        return named

    # ── checkpoints ───────────────────────────────────────────────────────────────────────────────

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        state = {name: _whole(value) for name, value in self.loss.state_dict().items()}
        folder = self.args.output_dir if output_dir is None else output_dir
        if state and self.args.should_save:
            torch.save(state, os.path.join(str(folder), LOSS_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_renamed(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_loss(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not self._load_renamed(self.state.best_model_checkpoint):
            super()._load_best_model()
        self.load_loss(self.state.best_model_checkpoint)

    def _load_renamed(self, folder: Any) -> bool:
        # These two keep another copy of the weights, under the model's own names.
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        return load_renamed(self.model, folder)

    def load_loss(self, folder: Any) -> None:
        """Restore the state of the loss from a checkpoint.

        Raises:
            FileNotFoundError: a checkpoint without the loss that it was trained with.
        """
        if not self.loss.state_dict():
            return
        path = os.path.join(folder, LOSS_FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{folder} has no {LOSS_FILE}: {type(self.loss).__name__} was not trained there, and would "
                "begin anew in the middle of a run. Resume with the loss that the run had, or load the model "
                "with from_pretrained and begin a new run"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        _load_whole(self.loss, state)


class _TellTheLoss(TrainerCallback):
    """Says of each optimizer step that it was made, which does not show where the optimizer has something
    else in the place of the parameters, as DeepSpeed's has.

    Args:
        trainer: whose loss it is.
    """

    def __init__(self, trainer: ObjectiveTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.loss.on_optimizer_step()


def _whole(value: Any) -> Any:
    """A tensor that FSDP has sharded, put together; every rank has to call this."""
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def _load_whole(loss: Objective, state: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    if any(hasattr(value, "full_tensor") for value in loss.state_dict().values()):
        set_model_state_dict(loss, state, options=StateDictOptions(full_state_dict=True))
    else:
        loss.load_state_dict(state)
