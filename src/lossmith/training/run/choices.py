"""What a run chooses where it could as well refuse, each with a sentence that says so.

Only defaults give way to what is there; what somebody asked for is had, or refused.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from lossmith.modifiers.config import MASTER
from lossmith.modifiers.judge import SequenceScoringJudgeWeightModifier
from lossmith.training.config.keys import SPECS, TrainConfig
from lossmith.training.config.rules import check
from lossmith.training.data.blocks import block_that_fits
from lossmith.training.data.corpus import Corpus
from lossmith.training.data.tokenizer import encode, train_tokenizer
from lossmith.training.run.checkpoints import checkpoints


def choose_sizes(
    config: TrainConfig, corpus: Corpus
) -> tuple[TrainConfig, PreTrainedTokenizerFast, str | None]:
    """A new run's configuration, in which `vocab_size` and `block_size` are smaller where they are the
    defaults and the text is too small for them; the tokenizer; what to say of it, or None. A UserError where
    the text is too small for a size that was asked for."""
    is_default = {name: name not in config.changed([name]) for name in ("vocab_size", "block_size")}
    tokenizer = train_tokenizer(corpus, config.vocab_size, or_fewer=is_default["vocab_size"])
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer)}
    # In a text of this many characters there are more tokens than that, and counting them takes a while.
    longest = max(map(len, tokenizer.get_vocab()))
    if is_default["block_size"] and sum(map(len, corpus.train)) <= config.block_size * longest:
        num_tokens = len(encode(tokenizer, corpus.train))
        if num_tokens <= config.block_size:
            sizes["block_size"] = block_that_fits(num_tokens)
    smaller = {name: size for name, size in sizes.items() if size < getattr(config, name)}
    if not smaller:
        return config, tokenizer, None
    config = replace(config, **smaller)
    check(config)  # for ids of tokens that there are no more
    said = " and ".join(f"{name}={size} instead of {SPECS[name].default}" for name, size in smaller.items())
    return config, tokenizer, f"{corpus.name} is a small text, so this run takes {said}."


def choose_judge(config: TrainConfig) -> tuple[TrainConfig, str | None]:
    """The configuration with the newest checkpoint where the judge is named by its run's folder, so that a
    resumed run has the same one; what to say of it, or None."""
    checkpoint = getattr(config, f"{SequenceScoringJudgeWeightModifier.prefix}checkpoint")
    folder = Path(checkpoint).expanduser()
    switches = (MASTER, SequenceScoringJudgeWeightModifier.enabled_key)
    is_wanted = config.is_language_model and all(getattr(config, name) for name in switches)
    if not (is_wanted and checkpoint) or (folder / "config.json").exists():
        return config, None
    found = checkpoints(folder)
    if not found:
        return config, None  # what is wrong is said where it is loaded
    newest = found[-1][1]
    return (
        replace(config, judge_weight_checkpoint=str(newest)),
        f"judge_weight_checkpoint is {newest}, the newest of {folder}.",
    )
