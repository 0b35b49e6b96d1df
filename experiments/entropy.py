"""Which samples does the entropy modifier favour, and does `direction` flip it?

Task: rows of two groups, read by an MLP of the last token. In one group each token is followed by one of
two tokens (the wrong answer is concentrated: it is the other one); in the other, by any of forty (the wrong
answers are uniform). Both languages share the model, and training is short.

Measured on held-out rows: how far the negative log-likelihood of each group is above that of a perfect
model, and the mean weight of a row of the concentrated group over the second half of training.

Shows: the direction does what its name says, and flips. "concentrated" weighs the rows of the concentrated
group {concentrated, weight 1: weight, concentrated} and lowers their excess from {off: excess nll,
concentrated} to {concentrated, weight 1: excess nll, concentrated}; "uniform" weighs them {uniform, weight
1: weight, concentrated} and lowers the other group's from {off: excess nll, uniform} to {uniform, weight 1:
excess nll, uniform}. The group that is not favoured pays, and in the sum of both groups neither direction
gains.
"""

from __future__ import annotations

from typing import Any

import torch
from models import WindowMLP

import lossmith
from harness import compare, fit

V, STEPS, BATCH, T = 120, 150, 32, 24
ARMS: dict[str, dict[str, Any]] = {
    "off": {"use_for_weighting": False},
    "concentrated, weight 1": {},
    "uniform, weight 1": {"direction": "uniform"},
    "concentrated, weight 2": {"weight": 2.0},
    "uniform, weight 2": {"direction": "uniform", "weight": 2.0},
}


def followers(rng: torch.Generator, num: int) -> torch.Tensor:
    """[V, num] the tokens that may follow each token, all as likely as one another."""
    return torch.rand(V, V, generator=rng).argsort(-1)[:, :num]


def sample(following: torch.Tensor, rows: int, offset: int, rng: torch.Generator) -> torch.Tensor:
    """[rows, T] ids; those of the second group are known by their offset."""
    ids = torch.randint(V, (rows, T), generator=rng)
    for t in range(1, T):
        which = torch.randint(following.shape[1], (rows,), generator=rng)
        ids[:, t] = following[ids[:, t - 1], which]
    return ids + offset


def trial(seed: int, parameters: dict[str, Any]) -> dict[str, float]:
    rng, model = torch.Generator().manual_seed(seed), WindowMLP(2 * V, seed, width=32)
    groups = [(followers(rng, num), num) for num in (2, 40)]
    text = torch.cat([sample(f, STEPS * BATCH // 2, V * k, rng) for k, (f, _) in enumerate(groups)])
    text = text.view(2, STEPS, BATCH // 2, T)
    modifier = lossmith.EntropyModifier(parameters)
    pipeline = lossmith.LossModifierPipeline(
        modifier, base=lossmith.CrossEntropyLoss(shift=True), reduction="sequence_mean"
    )
    weights = []

    def loss_of(step: int) -> torch.Tensor:
        ids = text[:, step].flatten(0, 1)
        logits = model(ids)
        if step >= STEPS // 2:
            ones = torch.ones(BATCH, T)
            per_row = pipeline.modify_loss(logits, ids, per_position_loss=ones, reduction="none")
            weights.append(per_row[: BATCH // 2, 0].mean().item())
        return pipeline(logits, ids)

    fit(model.parameters(), loss_of, STEPS)
    found = {}
    for k, (name, (following, num)) in enumerate(zip(("concentrated", "uniform"), groups, strict=True)):
        ids = sample(following, 256, V * k, rng)
        with torch.no_grad():
            nll = lossmith.cross_entropy(model(ids), ids, shift=True).item()
        found[f"excess nll, {name}"] = nll - torch.tensor(num).log().item()
    return {**found, "weight, concentrated": sum(weights) / len(weights)}


if __name__ == "__main__":
    compare(__file__, ARMS, trial)
