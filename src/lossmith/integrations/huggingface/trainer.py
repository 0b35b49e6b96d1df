"""``LossTrainer``: Hugging Face's Trainer with an objective."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from lossmith.integrations.huggingface.attachment import attach, attached_to
from lossmith.integrations.huggingface.labels import check_objective, count
from lossmith.modifiers.pipeline import LossModifierPipeline
from lossmith.objective import Objective

LOSS_FILE = "lossmith_loss.pt"
PARTS = "loss/"
METRICS_OF_MODIFIERS = "loss_modifiers/"


class LossTrainer(Trainer):
    """Hugging Face's Trainer, training with an objective.

    The loss is computed in the model's forward (:func:`attach`) and divided by what the objective itself
    counts, over all micro-batches and ranks. Its parameters are in the optimizer with the model's, by the
    same rules of weight decay; its state is in every checkpoint as ``lossmith_loss.pt`` and comes back on
    resuming. Its parts are logged as ``loss/<part>``, what a pipeline's modifiers measure as
    ``loss_modifiers/<metric>``.

    It stands before other subclasses, ``class SFT(LossTrainer, SFTTrainer)``, and goes past their losses.

    Args:
        loss: the objective.
        args, options: of :class:`transformers.Trainer`.

    Raises:
        ValueError: arguments that would make another loss of it.
        FileNotFoundError: on resuming from a checkpoint that lacks the loss's state.

    Example:
        >>> import tempfile, torch, transformers, lossmith
        >>> from lossmith.integrations.huggingface import LossTrainer
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> trainer = LossTrainer(
        ...     loss=lossmith.UnifiedLoss(vocab_size=50, use_ngram_penalty=True),
        ...     model=transformers.LlamaForCausalLM(config),
        ...     args=transformers.TrainingArguments(tempfile.mkdtemp(), max_steps=1, use_cpu=True),
        ...     train_dataset=[{"input_ids": row, "labels": row} for row in torch.randint(50, (8, 12))],
        ... )
    """

    def __init__(self, *args: Any, loss: Objective, **options: Any) -> None:
        check_objective(loss)
        if options.get("compute_loss_func") is not None:
            raise ValueError("this Trainer has a loss already; leave out compute_loss_func, or loss")
        self.loss = loss
        self._at_first: dict[str, Any] | None = None
        self._sums: dict[str, Tensor] = {}
        self._summed_since = 0
        super().__init__(*args, **options)
        self._check_arguments()
        # Not before: PEFT would freeze what is in the model, and TRL puts a forward of its own in place.
        self._attach(self.model)
        self.model_accepts_loss_kwargs = True

    def _check_arguments(self) -> None:
        """
        Raises:
            ValueError: arguments with which the loss would be another than the one asked for.
        """
        if self.args.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor makes a loss of its own; make the objective with label_smoothing="
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                "nn.DataParallel copies the model at every step, and what the copies' losses learn is lost; "
                "start with torchrun or accelerate launch, or show one device with CUDA_VISIBLE_DEVICES"
            )
        if self.get_cp_size() > 1 or self.get_sp_size() > 1:
            raise ValueError(
                "context and sequence parallelism cut rows into pieces, and an objective reads whole rows; "
                "leave them off"
            )
        if not self.loss.state_dict():
            return
        plugin: Any = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if is_deepspeed_zero3_enabled() or (plugin is not None and plugin.fsdp_version != 2):
            raise ValueError(
                f"ZeRO-3 and FSDP1 take the state of a {type(self.loss).__name__} apart, and it cannot be "
                "saved; use ZeRO-2, or FSDP2"
            )

    def call_model_init(self, trial: Any = None) -> Any:
        """A model made anew has its loss as it was at first."""
        if self._at_first is None:
            self._at_first = copy.deepcopy(self.loss.state_dict())
        self.loss.load_state_dict(self._at_first)
        return self._attach(super().call_model_init(trial))

    def _attach(self, model: Any) -> Any:
        self._attached = attached_to(attach(model, self.loss))
        return model

    # ── the loss ──────────────────────────────────────────────────────────────────────────────────

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """What the objective divides by, over the micro-batches and, if they are averaged, the ranks."""
        if not batch_samples or any(batch.get("labels") is None for batch in batch_samples):
            return None
        counts = [_count(self.loss, batch, device) for batch in batch_samples]
        total: Any = torch.stack(counts)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total.sum())
        return total.sum() / self.get_tp_size()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if num_items_in_batch is not None:
            # by its own name: num_items_in_batch are tokens
            inputs = {**inputs, "denominator": num_items_in_batch}
        # a subclass may compute another loss here
        result = Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            is_multiplied = self.args.average_tokens_across_devices and num_items_in_batch is not None
            self._take_in(self.accelerator.num_processes // self.get_tp_size() if is_multiplied else 1)
        return result

    # ── the log ───────────────────────────────────────────────────────────────────────────────────

    def _take_in(self, factor: int) -> None:
        """Add up the parts, as the Trainer does with the loss."""
        if not self._sums:
            self._summed_since = self.state.global_step
        assert self._attached is not None
        for name, part in (self._attached.parts or {}).items():
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
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_loss(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_loss(self.state.best_model_checkpoint)

    def _load_loss(self, folder: Any) -> None:
        """
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


def _count(loss: Objective, batch: Any, device: torch.device) -> Tensor:
    mask = batch.get("attention_mask")
    mask = mask.to(device) if isinstance(mask, Tensor) else None
    return count(loss, batch["labels"].to(device), mask)


def _whole(value: Any) -> Any:
    """A tensor that FSDP has sharded, put together; every rank has to call this."""
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def _load_whole(loss: Objective, state: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    if any(hasattr(value, "full_tensor") for value in loss.state_dict().values()):
        set_model_state_dict(loss, state, options=StateDictOptions(full_state_dict=True))
    else:
        loss.load_state_dict(state)
