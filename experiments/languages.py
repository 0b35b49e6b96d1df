"""Artificial languages whose probabilities are known."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Markov:
    """Each token is followed by one of `branches` others, with probabilities that fall as 1 / rank.

    Attributes:
        following: [V, V] the probability of the next token.
        stationary: [V] how frequent each token is.
        entropy: nats per token: the negative log-likelihood of a perfect model.
    """

    def __init__(self, vocab_size: int, seed: int, branches: int = 8, zipf: float = 0.0) -> None:
        """`zipf`: a token's chance to be chosen as a successor falls as rank ** -zipf."""
        self.rng = torch.Generator().manual_seed(1000 + seed)
        popular = torch.arange(1, vocab_size + 1).double() ** -zipf
        chosen = torch.multinomial(popular.expand(vocab_size, -1), branches, generator=self.rng)
        falling = 1 / torch.arange(1, branches + 1).double()
        self.following = torch.zeros(vocab_size, vocab_size, dtype=torch.float64)
        self.following.scatter_(1, chosen, (falling / falling.sum()).expand(vocab_size, -1))
        self.stationary = torch.full((vocab_size,), 1 / vocab_size, dtype=torch.float64)
        for _ in range(200):
            self.stationary = self.stationary @ self.following
        inside = torch.special.entr(self.following).sum(1)
        self.entropy = (self.stationary * inside).sum().item()

    def sample(self, *shape: int) -> Tensor:
        """[..., T] ids; every call continues the generator."""
        *rows, length = shape
        ids = torch.empty(math.prod(rows), length, dtype=torch.long)
        drawn = torch.rand(ids.shape, generator=self.rng, dtype=torch.float64)
        start, following = (p.cumsum(-1) for p in (self.stationary, self.following))
        ids[:, 0] = torch.searchsorted(start, drawn[:, 0].contiguous())
        for t in range(1, length):
            ids[:, t] = torch.searchsorted(following[ids[:, t - 1]], drawn[:, t, None].contiguous())[:, 0]
        return ids.clamp(max=len(start) - 1).view(shape)
