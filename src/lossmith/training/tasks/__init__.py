"""What each mode trains, one file per mode; `make_task` picks it by the keys."""

from importlib import import_module

from transformers import PreTrainedTokenizerFast

from lossmith import Objective
from lossmith.training.config.keys import MODES, TrainConfig
from lossmith.training.data.corpus import Corpus
from lossmith.training.tasks.task import Task


def task_class(config: TrainConfig) -> type[Task]:
    """The task for the keys `mode` and `objective`."""
    module, name = MODES[config.mode, config.objective].split(".")
    return getattr(import_module(f"lossmith.training.tasks.{module}"), name)


def make_task(
    config: TrainConfig,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    num_blocks: int,
    objective: Objective | None = None,
) -> Task:
    """The task of a run; the arguments are those of :class:`Task`."""
    return task_class(config)(config, corpus, tokenizer, num_blocks, objective)
