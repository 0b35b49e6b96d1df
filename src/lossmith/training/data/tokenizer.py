"""Text to tokens: a byte-level BPE, trained on the text itself."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lossmith.training.data.corpus import Corpus
from lossmith.training.errors import UserError
from lossmith.training.untrusted import MIB, read_json

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
CLS = "<|cls|>"
# Every mode has all three, so that a scorer can judge any model of the same text.
SPECIAL_TOKENS = (END_OF_TEXT, MASK, CLS)
LARGEST_TOKENIZER = 256 * MIB
# The parts of a tokenizer; others may take a regular expression that never ends, or cut and fill.
KINDS = {
    "model": ("BPE",), "pre_tokenizer": ("ByteLevel",), "decoder": ("ByteLevel",), "normalizer": (None,),
    "post_processor": (None, "TemplateProcessing"), "truncation": (None,), "padding": (None,),
}  # fmt: skip


def train_tokenizer(corpus: Corpus, vocab_size: int, *, or_fewer: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which can encode any text, on the training split."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus.train, trainer)
    if bpe.get_vocab_size() < vocab_size and not or_fewer:
        raise UserError(
            f"vocab_size={vocab_size} is too large for {corpus.name}: its training text gives only "
            f"{bpe.get_vocab_size()} pieces. Pass --vocab_size={bpe.get_vocab_size()} or less, or more text."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,  # no padding token: its embedding would get no gradient
        mask_token=MASK,
        cls_token=CLS,
        clean_up_tokenization_spaces=False,
    )


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer as `train_tokenizer` makes them, from its file.

    Raises:
        ValueError: it has other parts, or its pieces are not numbered from 0; the library raises more.
    """
    said: dict[str, Any] = read_json(path, LARGEST_TOKENIZER)
    for part, kinds in KINDS.items():
        if (None if said[part] is None else said[part]["type"]) not in kinds:
            raise ValueError(f"{part} is not {kinds[0]}")
    if (said["post_processor"] or {}).get("special_tokens"):
        raise ValueError("it adds tokens")
    tokenizer = Tokenizer.from_file(str(path))
    numbers = sorted(tokenizer.get_vocab().values())
    if numbers != [*range(len(numbers))]:
        raise ValueError("pieces are not numbered from 0")
    return tokenizer


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of a special token."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int), f"the tokenizer has no {token}"
    return found


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents as token ids [N], each after an end-of-text token that predicts its first one."""
    start = token_id(tokenizer, END_OF_TEXT)
    bpe = tokenizer.backend_tokenizer
    before = bpe.encode_special_tokens
    # "<|endoftext|>" spelled out in a text is 13 ordinary characters.
    bpe.encode_special_tokens = True
    try:
        rows = bpe.encode_batch(documents)
    finally:
        bpe.encode_special_tokens = before
    ids = [token for row in rows for token in (start, *row.ids)]
    return torch.tensor(ids, dtype=torch.long)


def bytes_per_token(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The number of UTF-8 bytes of each token, [V]; 0 for special tokens."""
    # A byte-level vocabulary spells each byte as one character.
    vocabulary = tokenizer.get_vocab()
    sizes = torch.zeros(len(vocabulary), dtype=torch.long)
    for piece, token in vocabulary.items():
        sizes[token] = 0 if piece in SPECIAL_TOKENS else len(piece)
    return sizes
