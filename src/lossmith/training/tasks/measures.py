"""The figures of a run in words, and the loss of a model that knows nothing."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A value in a row of the log, its format, such as `loss {:.3f}`, and what `null` stands for."""

    name: str
    words: str
    no_number: float = math.nan

    def of(self, row: dict[str, Any]) -> str:
        """Its value in a row, in words."""
        return self.words.format(self.no_number if row[self.name] is None else row[self.name])


PERPLEXITY = Figure("perplexity", "perplexity {:,.1f}", no_number=math.inf)
ACCURACY = Figure("accuracy", "accuracy {:.1%}")
SPEED = Figure("tokens_per_second", "{:,.0f} tokens/s")


def perplexity(mean: float) -> float:
    """The exponential of a mean negative log-likelihood; infinite where that overflows."""
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class KnowingNothing:
    """The loss of a model that knows nothing.

    Attributes:
        loss: its loss.
        said: the same in words, such as `a uniform guess costs log 2048 = 7.625`.
        margin: an untrained model further away than this hints at a mistake.
    """

    loss: float
    said: str
    margin: float


def uniform_guess(num_classes: int, margin: float) -> KnowingNothing:
    """The loss of giving each class the same probability."""
    loss = math.log(num_classes)
    return KnowingNothing(loss, f"a uniform guess costs log {num_classes} = {loss:.3f}", margin)
