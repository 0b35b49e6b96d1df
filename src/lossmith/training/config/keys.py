"""Every key of the trainer: its name, type, default, range and meaning.

The names are nanoGPT's wherever nanoGPT has one. A group of keys is a dataclass; `TrainConfig` is all
of them side by side, so that `--n_layer=6` needs no prefix. The keys of the loss modifiers are those that
`lossmith.modifiers` declares.
"""

from collections.abc import Iterable
from dataclasses import dataclass, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lossmith.modifiers.config import KEYS as DECLARED_BY_MODIFIERS
from lossmith.options import Declared, option, options_of
from lossmith.training.config.loss_keys import OPTIONS, LossKeys, NVAMPKeys, UnifiedKeys
from lossmith.training.errors import UserError

# Of a mixture of experts, where the keys say nothing.
NUM_EXPERTS, EXPERTS_PER_TOKEN = 4, 2
# A learning rate that is set alone brings its lowest value with it.
MIN_LR_DIVISOR = 10


@dataclass
class TaskKeys:
    """What is trained."""

    mode: Annotated[
        Literal["language_model", "token_classifier", "sequence_scorer"],
        option(
            "what the model predicts: tokens, which tokens were replaced, or the share of a text that was"
        ),
    ] = "language_model"
    objective: Annotated[
        Literal["causal", "masked"],
        option("what a language model predicts, the next token or the tokens that were masked"),
    ] = "causal"


@dataclass
class DataKeys:
    """What is read and how it becomes tokens."""

    dataset: Annotated[
        str,
        option(
            "`pydoc` (the text of Python's own documentation), a text file, a folder of text files, the name "
            "of a folder under `data/`, or a name on the Hugging Face hub (needs `datasets`)"
        ),
    ] = "pydoc"
    vocab_size: Annotated[
        int, option("pieces of the byte-level BPE trained on the training split", low=259)
    ] = 2048
    block_size: Annotated[int, option("tokens the model sees at once", low=2)] = 128


@dataclass
class ModelKeys:
    """The model: Llama's architecture or Mixtral's, or ModernBERT's where it sees both ways."""

    model: Annotated[
        Literal["llama", "moe"],
        option("of a causal language model: one network in every layer, or a mixture of experts"),
    ] = "llama"
    n_layer: Annotated[int, option("layers", low=1)] = 4
    n_head: Annotated[int, option("attention heads; divides `n_embd`", low=1)] = 4
    n_embd: Annotated[int, option("width", low=2)] = 128
    dropout: Annotated[float, option("dropout of the attention weights", low=0.0, below=1.0)] = 0.0


@dataclass
class OptimizerKeys:
    """AdamW, warmed up, then a cosine down to `min_lr`."""

    max_iters: Annotated[int, option("optimizer steps in all", low=1)] = 720
    batch_size: Annotated[int, option("blocks per micro-batch", low=1)] = 8
    gradient_accumulation_steps: Annotated[int, option("micro-batches per optimizer step", low=1)] = 1
    learning_rate: Annotated[float, option("highest learning rate", above=0.0)] = 2e-3
    min_lr: Annotated[
        float, option("learning rate at the last step; a tenth of `learning_rate` unless set", low=0.0)
    ] = 2e-4
    warmup_iters: Annotated[int, option("steps of linear warm-up", low=0)] = 60
    # Strong, because the default run sees its small text eight times over.
    weight_decay: Annotated[float, option("weight decay of the matrices", low=0.0)] = 2.0
    beta1: Annotated[float, option("AdamW's decay of the mean", low=0.0, below=1.0)] = 0.9
    beta2: Annotated[float, option("AdamW's decay of the square", low=0.0, below=1.0)] = 0.99
    grad_clip: Annotated[float, option("largest norm of the gradient; 0 turns clipping off", low=0.0)] = 1.0


@dataclass
class RunKeys:
    """Where, how long, how often."""

    out_dir: Annotated[str, option("folder for checkpoints, the configuration and the log")] = "out"
    resume: Annotated[bool, option("continue the run in `out_dir` from its last checkpoint")] = False
    eval_only: Annotated[bool, option("evaluate the last checkpoint in `out_dir` and stop")] = False
    eval_interval: Annotated[
        int, option("steps between evaluations, with a checkpoint after each", low=1)
    ] = 180
    eval_iters: Annotated[
        int,
        option(
            "batches per evaluation, spread over the held-out text; 0 for all; the last is always all", low=0
        ),
    ] = 20
    log_interval: Annotated[int, option("steps between lines of `log.jsonl`", low=1)] = 10
    sample_tokens: Annotated[int, option("tokens of the sample shown at the end; 0 for none", low=0)] = 120
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], option("where to train")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        option("precision of the arithmetic; the weights stay float32"),
    ] = "auto"
    compile: Annotated[bool, option("compile the model with `torch.compile`")] = False
    materialize_logits: Annotated[
        bool, option("compute all logits at once in training, rather than a few tokens' at a time")
    ] = False
    seed: Annotated[
        int, option("seed of the weights, the order of the data and the sample", low=0, high=2**32 - 1)
    ] = 1337
    tensorboard_log: Annotated[
        bool, option("log to TensorBoard, in `tensorboard/` under `out_dir` (needs the extra `track`)")
    ] = False
    wandb_log: Annotated[bool, option("log to Weights & Biases (needs the extra `track`)")] = False
    wandb_project: Annotated[str, option("its project")] = "lossmith"


if TYPE_CHECKING:

    class ModifierKeys:
        """The loss modifiers' keys, flat names such as `entropy_modifier_weight`; this one is read here."""

        judge_weight_checkpoint: str

else:
    ModifierKeys = make_dataclass(
        "ModifierKeys",
        [(name, spec.hint, spec.default) for name, spec in DECLARED_BY_MODIFIERS.items()],
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
        for name, spec in SPECS.items():
            check_range(spec, getattr(self, name))
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
SPECS = options_of(TrainConfig)


def sections() -> list[tuple[str, list[Declared]]]:
    """The keys by group, in the order they are documented: (what the group is, its keys)."""
    groups: tuple[Any, ...] = (
        TaskKeys, DataKeys, ModelKeys, LossKeys, OptimizerKeys, RunKeys, UnifiedKeys, NVAMPKeys, ModifierKeys,
    )  # fmt: skip
    return [((group.__doc__ or "").split(".")[0], list(options_of(group).values())) for group in groups]


def describe(spec: Declared) -> str:
    """What a key means, with the values it can take where they are few."""
    return spec.meaning + (f": {', '.join(spec.choices)}" if spec.choices else "")


def default_of(spec: Declared) -> str:
    """A key's default as it is shown."""
    return str(spec.default) or '""'


# Larger whole numbers are shown as powers of ten.
LONGEST_NUMBER = 10**15


def limits_of(spec: Declared) -> str:
    """What a key's value has to be, `max_iters >= 1`; nothing where any of its type will do."""
    if spec.choices:
        return f"one of {', '.join(spec.choices)}"
    limits = spec.kind.limits
    return f"{spec.name} {limits}" if limits[:1] in ("<", ">") else ""


def check_range(spec: Declared, value: Any) -> None:
    """Raise UserError, naming the key, when `value` is outside the limits declared for `spec`."""
    if spec.kind.holds(value):
        return
    if spec.choices:
        raise UserError(f"{spec.name}={value!r}; expected one of {', '.join(spec.choices)}.")
    shown = f"{value:g}" if isinstance(value, int) and abs(value) > LONGEST_NUMBER else repr(value)
    raise UserError(f"{spec.name}={shown} is out of range; expected {spec.name} {spec.kind.limits}.")
