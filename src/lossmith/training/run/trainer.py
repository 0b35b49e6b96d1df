"""Hugging Face's Trainer for a task.

The library provides the loop, the optimizer, accumulation, mixed precision, checkpoints and resuming. Ours
are the order of the blocks, the denominator of the loss, the evaluation (the Trainer averages batch means,
which weighs tokens unevenly) and the log.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, SequentialSampler, Subset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback

from lossmith import Pull
from lossmith.integrations.huggingface.trainer import ObjectiveTrainer
from lossmith.training.config.keys import TrainConfig
from lossmith.training.errors import UserError
from lossmith.training.run.bad_step import Step
from lossmith.training.run.bad_steps import BadSteps, Tell
from lossmith.training.run.checkpoints import checkpoints
from lossmith.training.run.finite import FiniteSteps, finite_weights
from lossmith.training.run.folder import RunFolder
from lossmith.training.run.launcher import require_data_parallel
from lossmith.training.run.manifest import seal, times_of
from lossmith.training.run.progress import Stopwatch
from lossmith.training.tasks.task import Task
from lossmith.training.untrusted import shortened

PULL, PULL_COSINE = "pull/", "pull_cosine/"  # prefixes in the log
# What `accelerate launch --mixed_precision` calls them.
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}


class TaskTrainer(ObjectiveTrainer):
    """The Trainer for one task, whose model computes the loss in its forward.

    Args:
        task, model, args, callbacks: what is trained, and how.
        folder: the run's, on the rank that writes.
        tell: takes what is found of a step that was not finite: (step, name, sentence).
    """

    def __init__(
        self,
        task: Task,
        model: PreTrainedModel,
        args: TrainingArguments,
        callbacks: Sequence[TrainerCallback] = (),
        folder: RunFolder | None = None,
        tell: Tell = lambda *_: None,
    ):
        self.task = task
        self.folder = folder
        self.loss = task.pipeline
        config = self.config = task.config
        self.observed: torch.Tensor | float = 0.0  # summed since the last line of the log
        tokens_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.stopwatch = Stopwatch(tokens_per_step * config.block_size)
        self.finite = FiniteSteps(self.loss, skips=config.on_nonfinite == "skip", tell=self._not_finite)
        self.bad_steps = BadSteps(Path(config.out_dir), folder, tell)
        self.step = Step()
        # A compiled model makes one graph of itself and its loss, and there is no way back through one alone.
        self.pull_interval = 0 if config.compile else config.pull_interval
        self.pulls: Mapping[str, Pull] = {}  # measured since the last line of the log
        self.settings = SettingsOfThisRun(config)
        super().__init__(
            model=model,
            args=args,
            data_collator=default_data_collator,
            train_dataset=task.train_blocks,
            eval_dataset=task.held_out,
            processing_class=task.tokenizer,
            callbacks=[self.stopwatch, self.finite, self.settings, *callbacks],
        )
        self.remove_callback(PrinterCallback)  # it prints dictionaries

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        # The blocks are random already; in order, they can be resumed.
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # pyright: ignore[reportArgumentType]

    def _get_num_items_in_batch(
        self, batch_samples: list[Any], device: torch.device
    ) -> torch.Tensor | int | None:
        """The denominator of these micro-batches' losses, over all ranks."""
        if not batch_samples:
            return None
        count = torch.stack([self.task.count(batch) for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count  # pyright: ignore

    def parts_of(self, outputs: Any) -> Mapping[str, torch.Tensor]:
        self.was_finite = self.finite.see(outputs["loss"])
        seen, batch = self.task.seen(outputs), self.step.batches[-1]
        batch.loss, batch.parts, batch.shares = outputs["loss"].detach(), seen.parts, seen.shares
        self.pulls = seen.pulls or self.pulls
        return seen.parts if len(seen.parts) > 1 else {}  # a single part is the loss

    def _take_in(self, parts: Mapping[str, torch.Tensor], factor: int) -> None:
        if self.finite.skips:  # as the Trainer does with the loss: the mean since the last line
            num_steps = factor * (1 + self.state.global_step - self._globalstep_last_logged)
            parts = {
                name: torch.where(self.was_finite, part, self._sums.get(name, 0.0) / num_steps)
                for name, part in parts.items()
            }
        super()._take_in(parts, factor)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        given = {} if num_items_in_batch is None else {"denominator": num_items_in_batch}
        self.step.begin({**inputs, **given}, self.state.global_step)
        is_first = len(self.step.batches) == 1
        step = self.state.global_step + 1
        self.task.asks_pull = is_first and self.pull_interval > 0 and step % self.pull_interval == 0
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        wide = torch.float32 if loss.device.type == "mps" else torch.float64
        observed = self.task.seen(outputs).observed.to(wide)
        if self.finite.skips:
            observed = torch.where(self.was_finite, observed, 0.0)
        self.observed = self.observed + observed
        return (loss, outputs) if return_outputs else loss

    # ── numbers that are not finite ───────────────────────────────────────────────────────────────

    def _not_finite(self, is_loss: bool) -> None:
        """Look at a step whose loss or gradient is not finite. Unless it is skipped, the next line of the
        log, evaluation or checkpoint stops the run."""
        if self.finite.skips or not self.bad_steps.said:
            self.bad_steps.take(self, self.state.global_step + 1, is_loss)

    # ── checkpoints ───────────────────────────────────────────────────────────────────────────────

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        """Look at the model, write the checkpoint, and write its manifest last."""
        self._require_finite()
        checkpoint = Path(self.config.out_dir) / f"checkpoint-{self.state.global_step}"
        before = times_of(checkpoint)
        with self._writing(checkpoint, before):
            super()._save_checkpoint(*args, **options)
            self.accelerator.wait_for_everyone()  # others write their random numbers
            if self.args.should_save:
                seal(checkpoint, changed_since(before, checkpoint), self.args.world_size)

    @contextlib.contextmanager
    def _writing(self, checkpoint: Path, before: Mapping[str, int]) -> Iterator[None]:
        """Turn a failure to write a checkpoint into a UserError, and delete what there is of it."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = shortened(getattr(error, "strerror", None) or str(error))
            if self.folder:
                with contextlib.suppress(OSError):
                    self.folder.drop(checkpoint.name, changed_since(before, checkpoint))
            found = checkpoints(checkpoint.parent)
            kept = f"{found[-1][1]} is whole: --resume goes on from it." if found else "Start the run again."
            free = shutil.disk_usage(checkpoint.parent).free / 1e6
            raise UserError(
                f"{checkpoint} could not be written: {reason} ({free:,.0f} MB are free there). Make room, or "
                f"raise the limit on files. {kept}"
            ) from error

    def _require_finite(self) -> None:
        """Raise UserError, before a checkpoint is written, if the run has become no number."""
        assert self.model is not None
        if self.finite.are_finite() and finite_weights(self.model):
            return
        self.evaluate()  # it says so, if the loss of the held-out text is no number either
        raise self._no_number("gradient or a weight became no finite number")

    def _load_rng_state(self, checkpoint: Any) -> None:
        try:
            super()._load_rng_state(checkpoint)
        except Exception as error:  # of many classes
            raise unusable(checkpoint, error) from error

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """As the Trainer's; a checkpoint that cannot be loaded is a UserError."""
        try:
            return super().train(resume_from_checkpoint, *args, **options)
        except Exception as error:
            if isinstance(error, UserError) or self.settings.has_begun or not resume_from_checkpoint:
                raise
            raise unusable(resume_from_checkpoint, error) from error

    # ── evaluations and the log ───────────────────────────────────────────────────────────────────

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        *,
        everything: bool = False,
    ) -> dict[str, float]:
        """The task's measures over `eval_iters` batches spread over the held-out data, or over all of it."""
        held_out = self.task.held_out
        chosen = range(len(held_out))  # pyright: ignore[reportArgumentType]
        if self.config.eval_iters and not everything:
            chosen = chosen[:: math.ceil(len(chosen) / (self.config.eval_iters * self.args.eval_batch_size))]
        # Add up the ranks' sums, so that nothing counts twice; a distributed sampler would pad the last
        # batch.
        share = chosen[self.args.process_index :: self.args.world_size]
        batches = DataLoader(Subset(held_out, share), batch_size=self.args.eval_batch_size)
        with self.accelerator.autocast():
            measures = self.task.evaluate(self.model, batches, self._add_over_ranks)  # pyright: ignore[reportArgumentType]
        if self.state.global_step and not math.isfinite(measures["loss"]):  # in training, before a checkpoint
            raise self._no_number(f"validation loss became {measures['loss']}")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measures.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _add_over_ranks(self, sums: list[float]) -> list[float]:
        if self.args.world_size == 1:
            return sums
        mine = torch.tensor(sums, dtype=torch.float64, device=self.args.device)
        return self.accelerator.reduce(mine, reduction="sum").tolist()  # pyright: ignore

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the speed, a measure and the parts' metrics; stop a run whose loss is not finite."""
        if "loss" in logs:
            logs["tokens_per_second"] = self.stopwatch.lap(self.state.global_step)
            assert isinstance(self.observed, torch.Tensor)
            total, number = self._add_over_ranks(self.observed.tolist())
            self.observed = 0.0
            logs.update(self.task.training_measures(total / max(number, 1)))
            logs.update(self.task.part_metrics())
            logs.update(logged_pulls(self.pulls))
            self.pulls = {}
            if self.finite.skipped:
                logs["skipped_steps"] = self.finite.skipped
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise self._no_number(f"loss became {logs['loss']}")

    def _no_number(self, what: str) -> UserError:
        found = checkpoints(Path(self.config.out_dir))
        is_older = bool(found) and found[-1][0] < self.state.global_step  # older than the failure
        then = f"and --resume from {found[-1][1]}" if is_older else "and start again"
        first = f"It began in {self.bad_steps.said}. " if self.bad_steps.said else ""
        return UserError(
            f"the {what} by step {self.state.global_step}, so training stopped. {first}"
            f"Lower --learning_rate or keep --grad_clip on, {then}."
        )


def logged_pulls(pulls: Mapping[str, Pull]) -> dict[str, float]:
    """The pulls of the parts as the log names them."""
    found = {f"{PULL}{name}": float(pull.norm) for name, pull in pulls.items()}
    return found | {f"{PULL_COSINE}{name}": float(pull.cosine) for name, pull in pulls.items()}


def changed_since(before: Mapping[str, int], folder: Path) -> list[str]:
    """The names of the files in a folder that were written since."""
    return [name for name, time in times_of(folder).items() if before.get(name) != time]


def unusable(checkpoint: Any, error: Exception) -> UserError:
    """The error for a checkpoint with which the library fails, although it is as it was saved."""
    reason = shortened(f"{type(error).__name__}: {error}")
    return UserError(
        f"{checkpoint} cannot be loaded ({reason}). If the run's configuration was changed, change it back; "
        f"otherwise move {checkpoint} away so that the checkpoint before it is used."
    )


class SettingsOfThisRun(TrainerCallback):
    """Restores this run's settings after a checkpoint has loaded those of the earlier run."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.has_begun = False  # the checkpoint, if any, is loaded

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        self.has_begun = True
        for name in ("logging_steps", "eval_steps", "save_steps"):
            setattr(state, name, getattr(args, name))
        schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)
        schedule.base_lrs = [self.config.learning_rate] * len(schedule.base_lrs)
        for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
            is_decayed = any(parameter.dim() > 1 for parameter in group["params"])
            group["weight_decay"] = self.config.weight_decay if is_decayed else 0.0
            group["betas"] = (self.config.beta1, self.config.beta2)
            group["initial_lr"] = self.config.learning_rate
            group["lr"] = self.config.learning_rate * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]  # what the log says

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = False  # the runner evaluates everything then


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The Trainer's arguments; a UserError if the device, the precision or the engine is not available."""
    require_data_parallel(config.compile)
    device, dtype = choose_device(config), choose_dtype(config)
    args = TrainingArguments(
        output_dir=config.out_dir,
        max_steps=config.max_iters,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": config.min_lr},
        warmup_steps=config.warmup_iters,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        max_grad_norm=config.grad_clip,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=device == "cpu",
        torch_compile=config.compile,
        seed=config.seed,
        logging_steps=config.log_interval,
        logging_first_step=True,
        logging_nan_inf_filter=config.on_nonfinite == "skip",  # it filters non-finite losses out
        eval_strategy="steps",
        eval_steps=config.eval_interval,
        save_strategy="steps",
        save_steps=config.eval_interval,
        save_total_limit=None,  # see KeepCheckpoints
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=device == "cuda",
        remove_unused_columns=False,
    )
    # With several GPUs the Trainer would use DataParallel; torchrun is the way to use them.
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args


def choose_device(config: TrainConfig) -> str:
    """The device that was asked for, or the best available."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if config.device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there[config.device]:
        usable = ", ".join(name for name in there if there[name])
        raise UserError(
            f"device={config.device} is not available to this PyTorch ({torch.__version__}); "
            f"available: {usable}. Pass --device=auto to take the best of them."
        )
    if config.device == "mps" and there["cuda"]:
        raise UserError(
            "device=mps but this machine has CUDA, which the Trainer prefers. Pass --device=cuda."
        )
    return config.device


def choose_dtype(config: TrainConfig) -> str:
    """The precision that was asked for, or bfloat16 on a GPU that supports it and float32 elsewhere."""
    device, dtype = choose_device(config), config.dtype
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no":  # the Trainer would take it, whatever `dtype` says
        if PRECISIONS.get(launched) is None or dtype not in ("auto", PRECISIONS[launched]):
            raise UserError(
                f"accelerate launch asks for mixed precision {launched}, but dtype={dtype}. Leave its "
                "--mixed_precision out and pass --dtype=bfloat16 or --dtype=float16, or neither."
            )
        dtype = PRECISIONS[launched]
    if dtype == "auto":
        return "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if dtype == "float16" and device != "cuda":
        raise UserError(
            f"dtype=float16 needs a CUDA device for its loss scaling; this run is on {device}. "
            "Pass --dtype=bfloat16 or --dtype=float32."
        )
    return dtype
