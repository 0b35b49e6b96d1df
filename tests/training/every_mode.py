"""The modes of the trainer, for tests that hold for all of them."""

from lossmith.training.corpus import load_corpus
from lossmith.training.data import train_tokenizer
from lossmith.training.keys import TrainConfig
from lossmith.training.tasks import make_task as make_task_of
from lossmith.training.tasks.task import Task

MODES = {
    "causal": [],
    "masked": ["--objective=masked"],
    "classifier": ["--mode=token_classifier"],
    "scorer": ["--mode=sequence_scorer"],
}
CORRUPTED = [name for name in MODES if name != "causal"]


def make_task(config: TrainConfig) -> Task:
    """The task of a configuration, with a tokenizer of its own."""
    corpus = load_corpus(config.dataset)
    return make_task_of(config, corpus, train_tokenizer(corpus, config.vocab_size), num_blocks=1000)
