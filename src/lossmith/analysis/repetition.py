"""Repetition of a generated text."""

from __future__ import annotations

from torch import Tensor


def seq_rep_n(tokens: Tensor, n: int = 4) -> float:
    """The share of n-grams that are copies of others: 0 if all differ, near 1 in a loop.

        seq-rep-n = 1 - (number of different n-grams) / (number of n-grams)

    Args:
        tokens: [T] ids.
        n: >= 1. A text shorter than n has no n-gram, and repeats nothing.

    Example:
        >>> import torch
        >>> from lossmith.analysis import seq_rep_n
        >>> seq_rep_n(torch.tensor([5, 6, 5, 6, 5]), n=2)
        0.5

    Source: Welleck et al., Neural Text Generation with Unlikelihood Training, 2020.
    """
    _check_length("n", n)
    ids = tokens.tolist()
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def rep_l(tokens: Tensor, length: int = 128, predicted: Tensor | None = None) -> float:
    """The share of tokens that occur among the ``length`` tokens before them.

        rep/l = mean over t >= 1 of [x_t in {x_(t-l), ..., x_(t-1)}]

    With ``predicted``, the paper's measure of a model on a text: whether its prediction for t, rather than
    x_t itself, occurs among the tokens before.

    Args:
        tokens: [T] ids. Fewer than two repeat nothing.
        length: l >= 1.
        predicted: [T] the ids with the largest logit, that of x_t at t.

    Example:
        >>> import torch
        >>> from lossmith.analysis import rep_l
        >>> rep_l(torch.tensor([1, 2, 1, 3]), length=2)
        0.3333333333333333

    Source: Welleck et al., Neural Text Generation with Unlikelihood Training, 2020.
    """
    _check_length("length", length)
    ids = tokens.tolist()
    asked = ids if predicted is None else predicted.tolist()
    if len(asked) != len(ids):
        raise ValueError(f"predicted must have as many ids as tokens, {len(ids)}; got {len(asked)}")
    found = [asked[t] in ids[max(0, t - length) : t] for t in range(1, len(ids))]
    return sum(found) / len(found) if found else 0.0


def _check_length(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be >= 1; got {value}")
