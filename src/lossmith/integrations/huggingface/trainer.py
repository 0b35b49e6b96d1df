"""``LossTrainer``: Hugging Face's Trainer with an objective; ``ObjectiveTrainer``: its base."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_pt_utils import find_batch_size
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lossmith.engine.head.plan import (
    HeadOptions,
    LogitsDtype,
    MemoryBudget,
    SkipIgnored,
    SkipSmallGradients,
    Strategy,
)
from lossmith.integrations.huggingface.attached_loss import NAME, AttachedLoss
from lossmith.integrations.huggingface.attachment import attach, attached_to
from lossmith.integrations.huggingface.labels import check_objective
from lossmith.integrations.huggingface.loss_state import is_parted, keep_buffers, load_state, save_state
from lossmith.integrations.huggingface.plain_measures import PlainMeasures, observe
from lossmith.modifiers.pipeline import LossModifierPipeline
from lossmith.objectives.objective import Objective


class ObjectiveTrainer(Trainer):
    """Hugging Face's Trainer for a model whose forward computes an objective.

    It passes on the denominator of the loss, logs the parts and what modifiers measure, and saves and
    restores the state. Subclasses set ``loss``, the objective, before they call ``__init__``.

    Args:
        args, options: see :class:`transformers.Trainer`.
    """

    loss: Objective

    def __init__(self, *args: Any, **options: Any) -> None:
        self._sums: dict[str, Tensor] = {}
        self._summed_since = 0
        super().__init__(*args, **options)
        self.add_callback(_TellTheLoss(self))

    # ── the loss ──────────────────────────────────────────────────────────────────────────────────

    def parts_of(self, outputs: Any) -> Mapping[str, Tensor]:
        """The detached parts of the loss of the last batch, for which the model returned ``outputs``."""
        raise NotImplementedError

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # With use_liger_kernel the Trainer passes skip_logits in evaluation, for a forward not used here.
        inputs = {name: value for name, value in inputs.items() if name != "skip_logits"}
        if num_items_in_batch is not None:
            inputs["denominator"] = num_items_in_batch  # num_items_in_batch would mean tokens
        # a subclass may compute another loss
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
            logs |= {f"loss/{name}": value for name, value in self._mean_parts().items()}
        if "loss" in logs and isinstance(self.loss, LossModifierPipeline):
            metrics = self.loss.get_all_metrics()
            logs |= {f"loss_modifiers/{name}": value for name, value in metrics.items()}
        super().log(logs, *args, **options)

    def _mean_parts(self) -> dict[str, float]:
        """The parts per step since the last time, averaged over ranks."""
        num_steps = max(self.state.global_step - self._summed_since, 1)
        sums, self._sums = self._sums, {}
        stacked = torch.stack([value.float() for value in sums.values()])
        gathered: Any = self.accelerator.gather(stacked.unsqueeze(0))
        return dict(zip(sums, (gathered.mean(0) / num_steps).tolist(), strict=True))

    # ── checkpoints ───────────────────────────────────────────────────────────────────────────────

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        folder = self.args.output_dir if output_dir is None else output_dir
        save_state(self.loss, self.model, str(folder), writes=self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is not None:  # FSDP1 and ZeRO-3 list the loss's parameters with the model's
            state_dict = {name: value for name, value in state_dict.items() if NAME not in name.split(".")}
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_renamed(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_loss(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:  # it loads the rest of a model by itself
            self.load_loss(checkpoint)

    def _load_best_model(self) -> None:
        if not self._load_renamed(self.state.best_model_checkpoint):
            super()._load_best_model()
        self.load_loss(self.state.best_model_checkpoint)

    def _load_renamed(self, folder: Any) -> bool:
        """Load renamed weights and return whether it did. FSDP and DeepSpeed keep another copy of them, under
        the model's own names."""
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return not is_sharded and load_renamed(self.model, folder)

    def load_loss(self, folder: Any) -> None:
        """Restore the state of the loss from a checkpoint.

        Raises:
            FileNotFoundError: a checkpoint without the loss that it was trained with.
        """
        load_state(self.loss, self.model, folder)


class LossTrainer(ObjectiveTrainer):
    """Hugging Face's Trainer with an objective as its loss.

    The model's forward computes the loss (:func:`attach`) and divides it by the objective's own count over
    all micro-batches and ranks. The optimizer trains the loss's parameters with the model's, by the same
    rules of weight decay. Every checkpoint holds the loss's state as ``lossmith_loss.pt``, and resuming
    restores it. The log has its parts as ``loss/<part>``, the plain negative log-likelihood of the same
    tokens as ``nll``, and what a pipeline's modifiers measure as ``loss_modifiers/<metric>``. An evaluation
    adds ``eval_nll``, ``eval_perplexity`` and ``eval_accuracy``, over tokens, and ``eval_loss/<part>``.

    In training, and in evaluation if only the loss is wanted, the logits never exist all at once. Metrics and
    :meth:`predict` get them.

    Put it before other subclasses, ``class SFT(LossTrainer, SFTTrainer)``; it bypasses their losses.

    Args:
        loss: the objective.
        materialize_logits, strategy, memory_budget, skip_ignored, logits_dtype, skip_small_gradients: see
            :func:`attach`.
        args, options: see :class:`transformers.Trainer`.

    Raises:
        ValueError: arguments that would change the loss.
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

    _attached: AttachedLoss

    def __init__(
        self,
        *args: Any,
        loss: Objective,
        materialize_logits: bool | None = None,
        strategy: Strategy = "auto",
        memory_budget: MemoryBudget = None,
        skip_ignored: SkipIgnored = None,
        logits_dtype: LogitsDtype = "wide",
        skip_small_gradients: SkipSmallGradients = 0.0,
        **options: Any,
    ) -> None:
        check_objective(loss)
        of_head = HeadOptions(
            strategy=strategy,
            memory_budget=memory_budget,
            skip_ignored=skip_ignored,
            logits_dtype=logits_dtype,
            skip_small_gradients=skip_small_gradients,
        )
        self.loss = loss
        self._attach_to = functools.partial(
            attach, loss=loss, materialize_logits=materialize_logits, **of_head.options
        )
        self._at_first: dict[str, Any] | None = None
        self._trained, self._evaluated = PlainMeasures(), PlainMeasures()
        super().__init__(*args, **options)
        self._check_arguments()
        # Not earlier: PEFT would freeze what is in the model, and TRL replaces the forward.
        self._attach(self.model)
        if self._fsdp is not None and self._fsdp.fsdp_version == 1:
            keep_buffers(self._fsdp, loss, self.model, self.args.device)
        self.model_accepts_loss_kwargs = True

    def _check_arguments(self) -> None:
        """Refuse arguments that would change the loss."""
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
        if self._fsdp is not None and self._fsdp.cpu_ram_efficient_loading and self.loss.state_dict():
            raise ValueError(
                "cpu_ram_efficient_loading fills the model from its state_dict, which leaves out that of a "
                f"{type(self.loss).__name__}; leave it off"
            )

    @property
    def _fsdp(self) -> Any:
        """The settings of FSDP, or None without it."""
        return self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None

    def call_model_init(self, trial: Any = None) -> Any:
        """Give a newly made model the loss in its initial state."""
        if self._at_first is None:
            self._at_first = copy.deepcopy(self.loss.state_dict())
        elif is_parted(self.loss, self.model):
            raise ValueError(
                f"the engine of the last model still has the parameters of the {type(self.loss).__name__} in "
                "parts; for another model make a new trainer, with a new loss"
            )
        self.loss.load_state_dict(self._at_first)
        return self._attach(super().call_model_init(trial))

    def _attach(self, model: Any) -> Any:
        """The same model, with the loss attached."""
        attached = attached_to(self._attach_to(model))
        assert attached is not None
        self._attached = attached
        attached.observe = observe
        return model

    # ── the loss ──────────────────────────────────────────────────────────────────────────────────

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """What the objective divides by, over the micro-batches and, if they are averaged, the ranks."""
        if not batch_samples or any(batch.get("labels") is None for batch in batch_samples):
            return None
        counts = []
        for batch in batch_samples:
            mask = batch.get("attention_mask")
            mask = mask.to(device) if isinstance(mask, Tensor) else None
            counts.append(self._attached.count(batch["labels"].to(device), mask))
        total: Any = torch.stack(counts)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total.sum())
        return total.sum() / self.get_tp_size()

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As the Trainer's, but without logits if only the loss is wanted."""
        self._attached.leaves_out_logits = prediction_loss_only
        self._attached.observed = None
        try:
            found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._attached.leaves_out_logits = False
        self._evaluated.add(self._attached.observed, self._attached.parts, find_batch_size(inputs) or 1)
        return found

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As the Trainer's, with what the model knows beside its loss."""
        self._evaluated = PlainMeasures()
        asked = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        output = super().evaluation_loop(*asked)
        measures = self._evaluated.evaluated(metric_key_prefix, self._over_ranks)
        return output._replace(metrics={**(output.metrics or {}), **measures})

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self._trained.add(self._attached.observed)
        return found

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if "loss" in logs and (nll := self._trained.nll(self._over_ranks)) is not None:
            logs["nll"] = nll
        super().log(logs, *args, **options)

    def _over_ranks(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")  # pyright: ignore[reportReturnType]

    def parts_of(self, outputs: Any) -> Mapping[str, Tensor]:
        return self._attached.parts or {}


class _TellTheLoss(TrainerCallback):
    """Tells the loss of each optimizer step, since it cannot see those of optimizers such as DeepSpeed's."""

    def __init__(self, trainer: ObjectiveTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.loss.on_optimizer_step()


# ── weights under other names ─────────────────────────────────────────────────────────────────────


def load_renamed(model: Any, folder: str | Path) -> bool:
    """Load a checkpoint whose weights are not under the model's names; return whether it was one.

    Other checkpoints, and models that are wrapped or have adapters, are left to the Trainer. Transformers
    saves mixtures of experts under their published names, with Mixtral's experts one by one, and
    ``from_pretrained`` reads them. The Trainer looks for the model's own names instead, and leaves the
    experts at their initial weights.

    Raises:
        ValueError: the checkpoint lacks weights of the model.
    """
    if not isinstance(model, PreTrainedModel) or names_in(Path(folder)) <= model.state_dict().keys():
        return False
    original: Any = getattr(type(model), "without_loss", type(model))
    saved, found = original.from_pretrained(folder, config=model.config, output_loading_info=True)
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise ValueError(
            f"{folder} lacks {len(names)} weights of this {type(model).__name__}, {names[0]} for one, which "
            "would begin anew in the middle of a run. Resume with the model that was trained there"
        )
    # Copied, so that the memory layout stays and sums are the same to the last bit.
    model.load_state_dict(saved.state_dict())
    return True


def names_in(folder: Path) -> set[str]:
    """The names of a checkpoint's weights in safetensors."""
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file():
        with safe_open(whole, framework="pt") as file:
            return set(file.keys())
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) if index.is_file() else set()
