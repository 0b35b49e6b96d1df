"""``LossTrainer``: Hugging Face's Trainer with an objective."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from lossmith.engine.head.plan import Strategy, check_strategy
from lossmith.integrations.huggingface.attachment import attach, attached_to
from lossmith.integrations.huggingface.labels import check_objective, count
from lossmith.integrations.huggingface.objective_trainer import ObjectiveTrainer
from lossmith.objectives.objective import Objective


class LossTrainer(ObjectiveTrainer):
    """Hugging Face's Trainer, training with an objective.

    The loss is computed in the model's forward (:func:`attach`) and divided by what the objective itself
    counts, over all micro-batches and ranks. Its parameters are in the optimizer with the model's, by the
    same rules of weight decay; its state is in every checkpoint as ``lossmith_loss.pt`` and comes back on
    resuming. Its parts are logged as ``loss/<part>``, what a pipeline's modifiers measure as
    ``loss_modifiers/<metric>``.

    In training, and in evaluation where only the loss is wanted, the logits are never there all at once.
    Metrics and :meth:`predict` get them.

    It stands before other subclasses, ``class SFT(LossTrainer, SFTTrainer)``, and goes past their losses.

    Args:
        loss: the objective.
        materialize_logits, strategy, memory_budget: of :func:`attach`.
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

    def __init__(
        self,
        *args: Any,
        loss: Objective,
        materialize_logits: bool = False,
        strategy: Strategy = "auto",
        memory_budget: int | None = None,
        **options: Any,
    ) -> None:
        check_objective(loss)
        check_strategy(strategy, memory_budget)
        self.loss = loss
        self._how: dict[str, Any] = {
            "materialize_logits": materialize_logits,
            "strategy": strategy,
            "memory_budget": memory_budget,
        }
        self._at_first: dict[str, Any] | None = None
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
        if self.compute_loss_func is not None:
            raise ValueError("this Trainer has a loss already; leave out compute_loss_func, or loss")
        other = getattr(self.args, "loss_type", None)  # of TRL's trainers
        if other not in (None, "nll"):
            raise ValueError(
                f"loss_type={other!r} asks for another loss than the objective, which is what is trained "
                "with. Leave it out, or train without LossTrainer"
            )
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
        self._attached = attached_to(attach(model, self.loss, **self._how))
        return model

    # ── the loss ──────────────────────────────────────────────────────────────────────────────────

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """What the objective divides by, over the micro-batches and, if they are averaged, the ranks."""
        if not batch_samples or any(batch.get("labels") is None for batch in batch_samples):
            return None
        counts = [self._count(batch, device) for batch in batch_samples]
        total: Any = torch.stack(counts)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total.sum())
        return total.sum() / self.get_tp_size()

    def _count(self, batch: Any, device: torch.device) -> Tensor:
        assert self._attached is not None
        mask = batch.get("attention_mask")
        mask = mask.to(device) if isinstance(mask, Tensor) else None
        return count(self.loss, batch["labels"].to(device), mask, self._attached.shift)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As the Trainer's; the logits are left out where nobody asks for them."""
        assert self._attached is not None
        self._attached.leaves_out_logits = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._attached.leaves_out_logits = False

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        # With use_liger_kernel the Trainer passes this in evaluation, to a forward that is not in use here.
        inputs = {name: value for name, value in inputs.items() if name != "skip_logits"}
        return super().compute_loss(model, inputs, *args, **options)

    def parts_of(self, outputs: Any) -> Mapping[str, Tensor]:
        assert self._attached is not None
        return self._attached.parts or {}
