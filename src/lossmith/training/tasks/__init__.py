"""What one mode of the trainer trains, a file each; `make_task` picks it by the keys."""

from transformers import PreTrainedTokenizerFast

from lossmith.training.config.keys import TrainConfig
from lossmith.training.data.corpus import Corpus
from lossmith.training.tasks.causal_language_model import CausalLanguageModel
from lossmith.training.tasks.masked_language_model import MaskedLanguageModel
from lossmith.training.tasks.sequence_scorer import SequenceScorer
from lossmith.training.tasks.task import Task
from lossmith.training.tasks.token_classifier import TokenClassifier

TASKS: dict[tuple[str, str], type[Task]] = {
    ("language_model", "causal"): CausalLanguageModel,
    ("language_model", "masked"): MaskedLanguageModel,
    ("token_classifier", "causal"): TokenClassifier,
    ("sequence_scorer", "causal"): SequenceScorer,
}


def task_class(config: TrainConfig) -> type[Task]:
    """The task that `mode` and `objective` name."""
    return TASKS[config.mode, config.objective]


def make_task(
    config: TrainConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, num_blocks: int
) -> Task:
    """What a run trains; the arguments are those of :class:`Task`."""
    return task_class(config)(config, corpus, tokenizer, num_blocks)
