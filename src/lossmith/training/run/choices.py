"""Defaults that adapt to the data and folders of a run, each with a sentence that says so.

What the user asked for is never changed: it is done or refused.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from lossmith.modifiers.config import MASTER
from lossmith.modifiers.tokens.judge import SequenceScoringJudgeWeightModifier
from lossmith.training.config.keys import SPECS, TrainConfig
from lossmith.training.config.rules import check
from lossmith.training.data.blocks import block_that_fits
from lossmith.training.data.corpus import Corpus
from lossmith.training.data.tokenizer import encode, train_tokenizer
from lossmith.training.run.checkpoints import checkpoints, newest_sound


def choose_sizes(
    config: TrainConfig, corpus: Corpus
) -> tuple[TrainConfig, PreTrainedTokenizerFast, str | None]:
    """Reduce default sizes that a small text cannot fill; a UserError if the user asked for them.

    Returns:
        The configuration, the tokenizer, and what to say about it, if anything.
    """
    is_default = {name: name not in config.changed([name]) for name in ("vocab_size", "block_size")}
    tokenizer = train_tokenizer(corpus, config.vocab_size, or_fewer=is_default["vocab_size"])
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer)}
    # A longer text certainly has enough tokens, and encoding it takes a while.
    longest = max(map(len, tokenizer.get_vocab()))
    if is_default["block_size"] and sum(map(len, corpus.train)) <= config.block_size * longest:
        num_tokens = len(encode(tokenizer, corpus.train))
        if num_tokens <= config.block_size:
            sizes["block_size"] = block_that_fits(num_tokens)
    smaller = {name: size for name, size in sizes.items() if size < getattr(config, name)}
    if not smaller:
        return config, tokenizer, None
    config = replace(config, **smaller)
    check(config)  # refuses ids beyond the smaller vocabulary
    said = " and ".join(f"{name}={size} instead of {SPECS[name].default}" for name, size in smaller.items())
    return config, tokenizer, f"{corpus.name} is a small text, so this run takes {said}."


def choose_judge(config: TrainConfig) -> tuple[TrainConfig, str | None]:
    """If the judge is given as a run's folder, use its newest checkpoint; resuming then keeps that one.

    Returns:
        The configuration, and what to say about it, if anything.
    """
    checkpoint = getattr(config, f"{SequenceScoringJudgeWeightModifier.prefix}checkpoint")
    folder = Path(checkpoint).expanduser()
    switches = (MASTER, SequenceScoringJudgeWeightModifier.enabled_key)
    is_wanted = config.is_language_model and all(getattr(config, name) for name in switches)
    if not (is_wanted and checkpoint) or (folder / "config.json").exists():
        return config, None
    if not checkpoints(folder):
        return config, None  # loading it says what is wrong
    found = newest_sound(folder, to_train=False)
    said = [f"judge_weight_checkpoint is {found.path}, the newest of {folder}.", *found.said]
    return replace(config, judge_weight_checkpoint=str(found.path)), " ".join(said)
