"""The modes of the trainer, for tests that hold for all of them."""

from lossmith.training.config.keys import TrainConfig
from lossmith.training.data.corpus import load_corpus
from lossmith.training.data.tokenizer import train_tokenizer
from lossmith.training.tasks import make_task as make_task_of
from lossmith.training.tasks.task import Task

MODES = {
    "causal": [],
    "masked": ["--objective=masked"],
    "classifier": ["--mode=token_classifier"],
    "scorer": ["--mode=sequence_scorer"],
}
# Losses that come out the same on any number of ranks, and what they have to carry.
LOSSES = {
    "nvamp": ["--loss=nvamp", "--nvamp_stats_scope=global", "--nvamp_gamma=0.1"],
    "unified": [
        "--loss=unified", "--use_mtp", "--adaptive_temperature", "--use_ngram_penalty", "--ngram_size=1",
        "--eos_token_id=0", "--label_smoothing=0.1",
    ],
    "moe": ["--model=moe", "--loss=unified", "--router_z_loss_weight=0.1"],
    "moe by bias": ["--model=moe", "--loss=unified", "--use_moe_balancing", "--moe_balance_mode=bias"],
    "masked": ["--objective=masked", "--loss=unified", "--adaptive_temperature", "--z_loss=1e-3"],
}  # fmt: skip
CORRUPTED = [name for name in MODES if name != "causal"]


def make_task(config: TrainConfig) -> Task:
    """The task of a configuration, with a tokenizer of its own."""
    corpus = load_corpus(config.dataset)
    return make_task_of(config, corpus, train_tokenizer(corpus, config.vocab_size), num_blocks=1000)
