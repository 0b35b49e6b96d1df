"""The small models of the experiments, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class Transformer(nn.Module):
    """ids [B, T] to logits [B, T, V]; `hidden` gives what the unembedding reads, [B, T, D]."""

    def __init__(
        self, vocab_size: int, seed: int, width: int = 64, length: int = 192, causal: bool = True
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4, causal) for _ in range(2)))
        self.norm, self.unembedding = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.norm(self.blocks(x))

    def forward(self, ids: Tensor) -> Tensor:
        return self.unembedding(self.hidden(ids))


class WindowMLP(nn.Module):
    """ids [B, T] to logits [B, T, V], from the last `k` tokens and the `ahead` tokens that follow."""

    def __init__(
        self,
        vocab_size: int,
        seed: int,
        k: int = 1,
        ahead: int = 0,
        width: int = 64,
        num_out: int | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.k, self.ahead, self.tokens = k, ahead, nn.Embedding(vocab_size, width)
        self.body = nn.Sequential(
            nn.Linear((k + ahead) * width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.unembedding = nn.Linear(width, vocab_size if num_out is None else num_out)

    def hidden(self, ids: Tensor) -> Tensor:
        padded = F.pad(self.tokens(ids), (0, 0, self.k - 1, self.ahead))
        seen = [padded[:, i : i + ids.shape[1]] for i in range(self.k + self.ahead)]
        return self.body(torch.cat(seen, -1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.unembedding(self.hidden(ids))
