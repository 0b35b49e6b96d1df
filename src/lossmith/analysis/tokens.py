"""Per-token losses: a table of what one sweep says of every token, and means of its columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lossmith.engine.statistics.stats import TokenStats

READ = ("nll", "entropy", "top_prob", "correct", "predicted")


@dataclass(frozen=True)
class TokenTable:
    """What is known of every supervised token, as columns [N] on the CPU.

    Attributes:
        sequence: which sequence the token belongs to.
        position: its place among the targets of that sequence, from 0.
        target: its id.
        predicted: the most probable id.
        correct: whether that is the target (bool).
        nll: -log p of the target, in nats, at temperature 1.
        entropy: -sum_i p_i log p_i, in nats.
        confidence: the largest probability, max_i p_i.
    """

    sequence: Tensor
    position: Tensor
    target: Tensor
    predicted: Tensor
    correct: Tensor
    nll: Tensor
    entropy: Tensor
    confidence: Tensor

    def __len__(self) -> int:
        return len(self.nll)


def token_table(stats: TokenStats, first_sequence: int = 0) -> TokenTable:
    """The supervised tokens of a batch, from one sweep over the vocabulary.

    Args:
        stats: of targets [B, T], as :func:`lossmith.token_stats` gives them.
        first_sequence: the number of the batch's first sequence.

    Raises:
        ValueError: the targets are not [B, T].

    Example:
        >>> import torch, lossmith
        >>> from lossmith.analysis import token_table
        >>> stats = lossmith.token_stats(torch.zeros(1, 3, 10), torch.tensor([[4, -100, 7]]))
        >>> table = token_table(stats)
        >>> table.position.tolist(), [round(nll, 3) for nll in table.nll.tolist()]
        ([0, 2], [2.303, 2.303])
    """
    if stats.targets.dim() != 2:
        raise ValueError(f"stats must be of targets [B, T]; got {list(stats.targets.shape)}")
    with torch.no_grad():
        plain = stats.unscaled.compute(*READ)
        valid = stats.is_valid
        sequence, position = valid.nonzero().unbind(1)
        columns = (plain.predicted, plain.correct, plain.nll, plain.entropy, plain.top_prob)
        found = (sequence + first_sequence, position, stats.targets[valid], *(c[valid] for c in columns))
        return TokenTable(*(column.cpu() for column in found))


def joined(tables: Iterable[TokenTable]) -> TokenTable:
    """The tables of several batches as one.

    Raises:
        ValueError: there is none.
    """
    tables = list(tables)
    if not tables:
        raise ValueError("there is no table to join; expected those of at least one batch")
    return TokenTable(*(torch.cat([getattr(t, field.name) for t in tables]) for field in fields(TokenTable)))


def hardest(nll: Tensor, num: int) -> Tensor:
    """The tokens with the largest losses, largest first, as indices [min(num, N)].

    Args:
        nll: [N].
        num: how many.

    Example:
        >>> import torch
        >>> from lossmith.analysis import hardest
        >>> hardest(torch.tensor([1.0, 9.0, 4.0]), 2).tolist()
        [1, 2]
    """
    return nll.topk(min(num, len(nll))).indices


@dataclass(frozen=True)
class Bands:
    """Mean losses of bands of tokens; a band without tokens is left out.

    Attributes:
        labels: what each band holds, such as ``10-99``.
        loss: the mean loss of its tokens.
        num_tokens: how many they are.
    """

    labels: list[str]
    loss: list[float]
    num_tokens: list[int]


def loss_by_position(nll: Tensor, position: Tensor, max_bands: int = 32) -> Bands:
    """The mean loss at each position of a sequence: how much context helps.

        L[k] = mean of nll over the tokens with k w <= position < (k + 1) w,   w = ceil(T / max_bands)

    Args:
        nll, position: [N].
        max_bands: positions are averaged w at a time, so that there are no more bands than this.

    Example:
        >>> import torch
        >>> from lossmith.analysis import loss_by_position
        >>> loss_by_position(torch.tensor([4.0, 2.0, 6.0]), torch.tensor([0, 1, 0]))
        Bands(labels=['0', '1'], loss=[5.0, 2.0], num_tokens=[2, 1])

    Source: Kaplan et al., Scaling Laws for Neural Language Models, 2020 (section 3.2.2 and appendix D.5).
    """
    longest = int(position.max()) + 1 if len(position) else 1
    width = -(-longest // max_bands)
    ends = [min(first + width, longest) - 1 for first in range(0, longest, width)]
    labels = [str(end) if width == 1 else f"{k * width}-{end}" for k, end in enumerate(ends)]
    return _banded(nll, position // width, labels)


def loss_by_frequency(nll: Tensor, target: Tensor, counts: Tensor) -> Bands:
    """The mean loss of tokens that were seen 0 times, 1 to 9 times, 10 to 99 times, and so on.

    Args:
        nll, target: [N].
        counts: [V] how often each id occurs, for example in the training text.

    Example:
        >>> import torch
        >>> from lossmith.analysis import loss_by_frequency
        >>> nll, target = torch.tensor([1.0, 5.0, 3.0]), torch.tensor([0, 1, 2])
        >>> loss_by_frequency(nll, target, counts=torch.tensor([40, 0, 11]))
        Bands(labels=['0', '10-99'], loss=[5.0, 2.0], num_tokens=[1, 2])
    """
    digits = torch.tensor([len(str(count)) if count else 0 for count in counts.tolist()])
    labels = ["0", *(f"{10**k}-{10 ** (k + 1) - 1}" for k in range(int(digits.max())))]
    return _banded(nll, digits[target], labels)


def _banded(nll: Tensor, band: Tensor, labels: list[str]) -> Bands:
    num = torch.bincount(band, minlength=len(labels))
    total = torch.bincount(band, weights=nll.double(), minlength=len(labels))
    kept = num.nonzero().flatten()
    mean = total[kept] / num[kept]
    return Bands([labels[k] for k in kept.tolist()], mean.tolist(), num[kept].tolist())
