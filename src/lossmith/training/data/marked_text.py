"""Text with tokens marked by colours and by signs, which a pipe shows too."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerFast

NEW_LINE, SHOWN_AS = "\n", "↵"  # inside a mark


@dataclass(frozen=True)
class Mark:
    """The signs around a token, its style, and their meaning."""

    before: str
    after: str
    style: str
    meaning: str


def marked_text(
    tokenizer: PreTrainedTokenizerFast,
    tokens: Sequence[int],
    marks: Sequence[Mark | None],
    legend: Sequence[Mark],
) -> Text:
    """The text of the tokens with marks around runs of them, and a legend that counts the marks."""
    text = Text()
    for mark, group in groupby(zip(marks, tokens, strict=True), key=lambda pair: pair[0]):
        ids = [token for _, token in group]
        words = str(tokenizer.decode(ids, skip_special_tokens=mark is None))
        if mark is None:
            text.append(words)
        else:
            text.append(f"{mark.before}{words.replace(NEW_LINE, SHOWN_AS)}{mark.after}", style=mark.style)
    text.rstrip()
    text.append("\n\n")
    for mark in legend:
        text.append(f"{mark.before}{mark.meaning}{mark.after}", style=mark.style)
        text.append(f" {marks.count(mark)}   ")
    return text
