"""Do the balance loss and the bias even out the experts, and what does it cost?

Task: a Markov language of 100 tokens; an MLP of the last token whose hidden layer is a mixture of 8
experts, 2 for each token. The router starts out preferring a few experts.

Measured on held-out text: the maximal violation (how far the busiest expert is above its share: 0 at
balance, 3 if two experts get everything) and the negative log-likelihood.

Shows: both do, and neither costs likelihood here. The violation falls from {none: MaxVio} to {loss, weight
0.01: MaxVio} and {loss, weight 0.1: MaxVio} with the loss, and to {bias, rate 0.001: MaxVio} with the bias
at its default rate; ten times the rate leaves more, {bias, rate 0.01: MaxVio}. The likelihood is a little
better with balance than without in every seed: {none: nll} without, {loss, weight 0.1: nll} with the loss
at 0.1, {bias, rate 0.001: nll} with the bias.
"""

from __future__ import annotations

from typing import Any

import torch
from languages import Markov
from torch import Tensor, nn

import lossmith
from harness import compare, fit
from lossmith.analysis import expert_usage

V, E, K, D, STEPS = 100, 8, 2, 32, 250
LOSS, BIAS = {"mode": "loss"}, {"mode": "bias"}
ARMS: dict[str, dict[str, Any]] = {
    "none": {**LOSS, "weight": 0.0},
    "loss, weight 0.01": {**LOSS, "weight": 0.01},
    "loss, weight 0.1": {**LOSS, "weight": 0.1},
    "bias, rate 0.001": {**BIAS, "weight": 1.0},
    "bias, rate 0.01": {**BIAS, "weight": 1.0, "bias_update_rate": 0.01},
}


class Mixture(nn.Module):
    """ids [B, T] to logits, gate logits [N, E] and the chosen experts [N, k]."""

    def __init__(self, seed: int, balance: lossmith.MoEBalance) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.router = nn.Embedding(V, D), nn.Linear(D, E)
        self.up, self.down = nn.Parameter(torch.randn(E, D, D) / 6), nn.Parameter(torch.randn(E, D, D) / 6)
        self.unembedding = nn.Linear(D, V)
        self.balance = [balance]  # not a submodule: its bias belongs to the objective
        with torch.no_grad():
            self.router.bias.copy_(torch.linspace(1.5, -1.5, E))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.tokens(ids).flatten(0, 1)
        gate = self.router(x)
        chosen, scores = self.balance[0].select(gate)
        hidden = torch.einsum("nd,edh->neh", x, self.up).relu()
        outputs = torch.einsum("neh,ehd->ned", hidden, self.down)
        scores = scores / scores.sum(-1, keepdim=True)
        picked = outputs.gather(1, chosen[..., None].expand(-1, -1, D))
        x = x + (picked * scores[..., None]).sum(1)
        return self.unembedding(x).unflatten(0, ids.shape), gate, chosen


def trial(seed: int, settings: dict[str, Any]) -> dict[str, float]:
    options = dict(settings)
    weight = options.pop("weight")
    balance = lossmith.MoEBalance(num_experts=E, top_k=K, **options)
    language, model = Markov(V, seed), Mixture(seed, balance)
    loss_fn = lossmith.ComposedLoss(
        lossmith.CrossEntropyLoss(shift=True), components={"balance": lossmith.Weighted(balance, weight)}
    )
    text = language.sample(STEPS, 16, 16)

    def loss_of(step: int) -> Tensor:
        logits, gate, chosen = model(text[step])
        return loss_fn(logits, text[step], gate_logits=gate, expert_indices=chosen)

    fit(model.parameters(), loss_of, STEPS)
    ids = language.sample(128, 32)
    with torch.no_grad():
        logits, _, chosen = model(ids)
    return {
        "MaxVio": expert_usage(chosen, E).max().item() * E - 1,
        "nll": lossmith.cross_entropy(logits, ids, shift=True).item(),
    }


if __name__ == "__main__":
    compare(__file__, ARMS, trial)
