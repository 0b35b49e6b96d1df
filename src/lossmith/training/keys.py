"""Every key of the trainer: its name, type, default, range and meaning.

The names are nanoGPT's wherever nanoGPT has one. A group of keys is a dataclass; `TrainConfig` is all
of them side by side, so that `--n_layer=6` needs no prefix. The keys of the loss modifiers are those that
`lossmith.modifiers` declares.
"""

import math
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any

from lossmith.modifiers.config import KEYS as DECLARED_BY_MODIFIERS
from lossmith.options import option as key
from lossmith.options import range_problem
from lossmith.training.errors import UserError
from lossmith.training.loss_keys import OPTIONS, LossKeys, NVAMPKeys, UnifiedKeys

# Of a mixture of experts, where the keys say nothing.
NUM_EXPERTS, EXPERTS_PER_TOKEN = 4, 2
# A learning rate that is set alone brings its lowest value with it.
MIN_LR_DIVISOR = 10


@dataclass
class TaskKeys:
    """What is trained."""

    mode: str = key(
        "language_model",
        "what the model predicts: tokens, which tokens were replaced, or the share of a text that was",
        choices=("language_model", "token_classifier", "sequence_scorer"),
    )
    objective: str = key(
        "causal",
        "what a language model predicts, the next token or the tokens that were masked",
        choices=("causal", "masked"),
    )


@dataclass
class DataKeys:
    """What is read and how it becomes tokens."""

    dataset: str = key(
        "pydoc",
        "`pydoc` (the text of Python's own documentation), a text file, a folder of text files, the name "
        "of a folder under `data/`, or a name on the Hugging Face hub (needs `datasets`)",
    )
    vocab_size: int = key(2048, "pieces of the byte-level BPE trained on the training split", low=259)
    block_size: int = key(128, "tokens the model sees at once", low=2)


@dataclass
class ModelKeys:
    """The model: Llama's architecture or Mixtral's, or ModernBERT's where it sees both ways."""

    model: str = key(
        "llama",
        "of a causal language model: one network in every layer, or a mixture of experts",
        choices=("llama", "moe"),
    )
    n_layer: int = key(4, "layers", low=1)
    n_head: int = key(4, "attention heads; divides `n_embd`", low=1)
    n_embd: int = key(128, "width", low=2)
    dropout: float = key(0.0, "dropout of the attention weights", low=0.0, below=1.0)


@dataclass
class OptimizerKeys:
    """AdamW, warmed up, then a cosine down to `min_lr`."""

    max_iters: int = key(720, "optimizer steps in all", low=1)
    batch_size: int = key(8, "blocks per micro-batch", low=1)
    gradient_accumulation_steps: int = key(1, "micro-batches per optimizer step", low=1)
    learning_rate: float = key(2e-3, "highest learning rate", above=0.0)
    min_lr: float = key(
        2e-4, "learning rate at the last step; a tenth of `learning_rate` unless set", low=0.0
    )
    warmup_iters: int = key(60, "steps of linear warm-up", low=0)
    # Strong, because the default run sees its small text eight times over.
    weight_decay: float = key(2.0, "weight decay of the matrices", low=0.0)
    beta1: float = key(0.9, "AdamW's decay of the mean", low=0.0, below=1.0)
    beta2: float = key(0.99, "AdamW's decay of the square", low=0.0, below=1.0)
    grad_clip: float = key(1.0, "largest norm of the gradient; 0 turns clipping off", low=0.0)


@dataclass
class RunKeys:
    """Where, how long, how often."""

    out_dir: str = key("out", "folder for checkpoints, the configuration and the log")
    resume: bool = key(False, "continue the run in `out_dir` from its last checkpoint")
    eval_only: bool = key(False, "evaluate the last checkpoint in `out_dir` and stop")
    eval_interval: int = key(180, "steps between evaluations, with a checkpoint after each", low=1)
    eval_iters: int = key(
        20, "batches per evaluation, spread over the held-out text; 0 for all; the last is always all", low=0
    )
    log_interval: int = key(10, "steps between lines of `log.jsonl`", low=1)
    sample_tokens: int = key(120, "tokens of the sample shown at the end; 0 for none", low=0)
    device: str = key("auto", "where to train", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = key(
        "auto",
        "precision of the arithmetic; the weights stay float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    compile: bool = key(False, "compile the model with `torch.compile`")
    materialize_logits: bool = key(
        False, "compute all logits at once in training, rather than a few tokens' at a time"
    )
    seed: int = key(1337, "seed of the weights, the order of the data and the sample", low=0, high=2**32 - 1)
    tensorboard_log: bool = key(
        False, "log to TensorBoard, in `tensorboard/` under `out_dir` (needs the extra `track`)"
    )
    wandb_log: bool = key(False, "log to Weights & Biases (needs the extra `track`)")
    wandb_project: str = key("lossmith", "its project")


if TYPE_CHECKING:

    class ModifierKeys:
        """The loss modifiers' keys, flat names such as `entropy_modifier_weight`; this one is read here."""

        judge_weight_checkpoint: str

else:
    ModifierKeys = make_dataclass(
        "ModifierKeys",
        [
            (name, spec.type, field(default=spec.default, metadata=spec.metadata))
            for name, spec in DECLARED_BY_MODIFIERS.items()
        ],
        namespace={"__doc__": "Loss modifiers."},
    )


@dataclass
class TrainConfig(
    ModifierKeys, NVAMPKeys, UnifiedKeys, RunKeys, OptimizerKeys, LossKeys, ModelKeys, DataKeys, TaskKeys
):
    """Everything `lossmith train` can be told."""

    @property
    def experts(self) -> tuple[int, int] | None:
        """How many experts a layer has and how many a token is sent to; None of a model without."""
        if self.model != "moe":
            return None
        return self.num_experts or NUM_EXPERTS, self.moe_top_k or EXPERTS_PER_TOKEN

    def check(self) -> None:
        """Raise UserError for a value out of its range or values that do not go together."""
        for spec in fields(self):
            check_range(spec, getattr(self, spec.name))
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(
                f"n_embd={self.n_embd} over n_head={self.n_head} is {self.n_embd / self.n_head:g} per head; "
                "expected an even whole number, since rotary positions turn pairs of coordinates. "
                f"Try --n_embd={self.n_head * 2 * max(1, round(self.n_embd / self.n_head / 2))}."
            )
        self._check_mode()
        if self.min_lr > self.learning_rate:
            raise UserError(
                f"min_lr={self.min_lr:g} is above learning_rate={self.learning_rate:g}; expected the lowest "
                "learning rate to be no higher than the highest. "
                f"Try --min_lr={self.learning_rate / MIN_LR_DIVISOR:g}."
            )

    def _check_mode(self) -> None:
        """Raise UserError for keys that mean nothing in this mode."""
        if self.mode != TaskKeys.mode and self.objective != TaskKeys.objective:
            raise UserError(
                f"objective={self.objective} is about a language model, but mode={self.mode}. Leave "
                f"objective out, or pass --mode={TaskKeys.mode}."
            )
        if self.model != ModelKeys.model and (self.mode, self.objective) != (
            TaskKeys.mode,
            TaskKeys.objective,
        ):
            raise UserError(
                f"model={self.model} is a causal language model, but mode={self.mode}, "
                f"objective={self.objective}. Leave model out."
            )
        if self.experts is not None and self.experts[1] > self.experts[0]:
            raise UserError(
                f"moe_top_k={self.experts[1]} is above num_experts={self.experts[0]}; expected no more "
                f"experts a token than there are. Try --num_experts={2 * self.experts[1]}."
            )
        if self.materialize_logits and self.mode != TaskKeys.mode:
            raise UserError(
                f"materialize_logits=True is about a language model; mode={self.mode} has few logits, which "
                "are always there. Leave materialize_logits out."
            )
        changed = self.changed(OPTIONS["cross_entropy"])
        if self.mode == "sequence_scorer" and changed:
            name = changed[0]
            raise UserError(
                f"{name}={getattr(self, name)} is an option of cross-entropy; mode={self.mode} trains the "
                f"squared error. Leave {name} out."
            )

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those of the keys that are set to something else than their default."""
        return [name for name in names if getattr(self, name) != SPECS[name].default]


LOSS_KEYS = tuple(dict.fromkeys(["loss", *(name for options in OPTIONS.values() for name in options)]))
SPECS = {spec.name: spec for spec in fields(TrainConfig)}


def sections() -> list[tuple[str, list[Field]]]:
    """The keys by group, in the order they are documented: (what the group is, its fields)."""
    groups: tuple[Any, ...] = (
        TaskKeys, DataKeys, ModelKeys, LossKeys, OptimizerKeys, RunKeys, UnifiedKeys, NVAMPKeys, ModifierKeys,
    )  # fmt: skip
    return [((group.__doc__ or "").split(".")[0], list(fields(group))) for group in groups]


def describe(spec: Field) -> str:
    """What a key means, with the values it can take where they are few."""
    choices = spec.metadata.get("choices")
    return spec.metadata["meaning"] + (f": {', '.join(choices)}" if choices else "")


def default_of(spec: Field) -> str:
    """A key's default as it is shown."""
    return str(spec.default) or '""'


def limits_of(spec: Field) -> str:
    """What a key's value has to be, `max_iters >= 1`; nothing where any of its type will do."""
    choices = spec.metadata.get("choices")
    if choices:
        return f"one of {', '.join(choices)}"
    wanted = range_problem(math.nan, spec.metadata)  # which is in no range
    return f"{spec.name} {wanted}" if wanted else ""


def check_range(spec: Field, value: Any) -> None:
    """Raise UserError, naming the key, when `value` is outside the limits declared for `spec`."""
    limits = spec.metadata
    choices = limits.get("choices")
    if choices and value not in choices:
        raise UserError(f"{spec.name}={value!r}; expected one of {', '.join(choices)}.")
    wanted = None if value is None else range_problem(value, limits)
    if wanted:
        raise UserError(f"{spec.name}={value!r} is out of range; expected {spec.name} {wanted}.")
