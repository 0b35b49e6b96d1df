"""Every key of the trainer: its name, type, default, range and meaning.

Names follow nanoGPT where it has one. Each group of keys is a dataclass, and `TrainConfig` inherits from all
of them, so that `--n_layer=6` needs no prefix. The losses' keys are the options of their constructors
(`loss_keys`); `lossmith.modifiers` declares those of the loss modifiers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from lossmith.modifiers.config import KEYS as DECLARED_BY_MODIFIERS
from lossmith.options import Declared, option, options_of
from lossmith.training.config.loss_keys import LossKeys, NVAMPKeys, UnifiedKeys, keys_class

# Defaults of a mixture of experts.
NUM_EXPERTS, EXPERTS_PER_TOKEN = 4, 2
# Unless it is set, min_lr is learning_rate divided by this.
MIN_LR_DIVISOR = 10


# The module in `tasks/` and the class that train each combination of `mode` and `objective`.
MODES = {
    ("language_model", "causal"): "causal_language_model.CausalLanguageModel",
    ("language_model", "masked"): "masked_language_model.MaskedLanguageModel",
    ("token_classifier", "causal"): "token_classifier.TokenClassifier",
    ("sequence_scorer", "causal"): "sequence_scorer.SequenceScorer",
}


@dataclass
class TaskKeys:
    """What is trained."""

    mode: Annotated[
        str,
        option(
            "what the model predicts: tokens, which tokens were replaced, or the share of a text that was",
            choices=tuple(dict.fromkeys(mode for mode, _ in MODES)),
        ),
    ] = "language_model"
    objective: Annotated[
        str,
        option(
            "what a language model predicts, the next token or the tokens that were masked",
            choices=tuple(dict.fromkeys(objective for _, objective in MODES)),
        ),
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
    """The model: Llama's architecture or Mixtral's, or ModernBERT's if it is bidirectional."""

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
    on_nonfinite: Annotated[
        Literal["stop", "skip"],
        option("at a loss or gradient that is not finite, stop the run, or skip the step and count it"),
    ] = "stop"


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
    pull_interval: Annotated[
        int,
        option(
            "steps between measurements of how each part of the loss pulls at the hidden states; 0 for none",
            low=0,
        ),
    ] = 100
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


ModifierKeys = keys_class(
    "Loss modifiers.", [(name, spec.hint, spec.default) for name, spec in DECLARED_BY_MODIFIERS.items()]
)


@dataclass
class TrainConfig(
    ModifierKeys, NVAMPKeys, UnifiedKeys, RunKeys, OptimizerKeys, LossKeys, ModelKeys, DataKeys, TaskKeys
):
    """All keys of `lossmith train`."""

    @property
    def is_language_model(self) -> bool:
        return self.mode == TaskKeys.mode

    @property
    def is_causal(self) -> bool:
        """Whether the model predicts the next token."""
        return self.is_language_model and self.objective == TaskKeys.objective

    @property
    def experts(self) -> tuple[int, int] | None:
        """Experts per layer and experts per token; None without a mixture of experts."""
        if self.model != "moe":
            return None
        return self.num_experts or NUM_EXPERTS, self.moe_top_k or EXPERTS_PER_TOKEN

    def changed(self, names: Iterable[str]) -> list[str]:
        """The keys whose values differ from their defaults."""
        return [name for name in names if getattr(self, name) != SPECS[name].default]


SPECS = options_of(TrainConfig)


def sections() -> list[tuple[str, list[Declared]]]:
    """The groups of keys in documented order, each as (title, keys)."""
    groups: tuple[Any, ...] = (
        TaskKeys, DataKeys, ModelKeys, LossKeys, OptimizerKeys, RunKeys, UnifiedKeys, NVAMPKeys, ModifierKeys,
    )  # fmt: skip
    return [((group.__doc__ or "").split(".")[0], list(options_of(group).values())) for group in groups]


def describe(spec: Declared) -> str:
    """A key's meaning and, if it has them, its choices."""
    return spec.meaning + (f": {', '.join(spec.choices)}" if spec.choices else "")


def default_of(spec: Declared) -> str:
    """A key's default as shown to users."""
    return str(spec.default) or '""'
