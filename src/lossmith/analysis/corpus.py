"""The loss of a whole text, in units that compare: nats, perplexity, bits per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CorpusLoss:
    """The loss of a text.

    Attributes:
        nll_sum: the summed negative log-likelihood of its tokens, in nats.
        num_tokens: how many tokens that is.
        num_bytes: how many UTF-8 bytes these tokens spell.

    Example:
        >>> from lossmith.analysis import CorpusLoss
        >>> found = CorpusLoss(nll_sum=20.0, num_tokens=10, num_bytes=25)
        >>> found.loss, round(found.perplexity, 3), round(found.bits_per_byte, 3)
        (2.0, 7.389, 1.154)
    """

    nll_sum: float
    num_tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """nats per token; NaN without tokens."""
        return self.nll_sum / self.num_tokens if self.num_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of that; infinite where it overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Unlike the others, comparable between vocabularies."""
        return bits_per_byte(self.nll_sum, self.num_bytes)


def bits_per_byte(nll_sum: float, num_bytes: int) -> float:
    """The bits that a model needs to encode a byte of a text; NaN without bytes.

        sum of nll / (log 2 * number of UTF-8 bytes)

    Example:
        >>> import math
        >>> from lossmith.analysis import bits_per_byte
        >>> bits_per_byte(8 * math.log(2), 4)
        2.0

    Source: Gao et al., The Pile, 2020.
    """
    return nll_sum / (math.log(2) * num_bytes) if num_bytes else math.nan


def initial_gap(loss: float, num_classes: int) -> float:
    """How far an untrained model's loss is from that of a uniform guess, in nats: about 0 if all is well.

        loss - log V

    Example:
        >>> from lossmith.analysis import initial_gap
        >>> round(initial_gap(7.7, 2048), 3)
        0.075

    Source: Karpathy, A Recipe for Training Neural Networks, 2019 ("verify loss @ init").
    """
    return loss - math.log(num_classes)
