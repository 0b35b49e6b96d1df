"""Does the focal loss help rare tokens?

Task: a Markov language of 200 tokens, some of them far more common than others; an MLP reads the last token
and is trained briefly.

Measured on held-out text: the negative log-likelihood of all tokens, of the rare ones (the least frequent
that make up a tenth of the text) and of the frequent ones (the most frequent that make up half of it).

Shows: next to nothing. With gamma 2 in place of cross-entropy rare tokens go from {off: nll, rare} to
{replace, gamma 2: nll, rare} nats and frequent ones from {off: nll, frequent} to {replace, gamma 2: nll,
frequent}, less than the seeds differ; added to cross-entropy it changes nothing at weight 0.2 and costs a
little at weight 1.
"""

from __future__ import annotations

from typing import Any

import torch
from languages import Markov
from models import WindowMLP

import lossmith
from harness import compare, fit

V, STEPS = 200, 300
ARMS: dict[str, dict[str, Any]] = {
    "off": {},
    "add, weight 0.2": {"use_focal_loss": True},
    "add, weight 1": {"use_focal_loss": True, "focal_weight": 1.0},
    "replace, gamma 1": {"use_focal_loss": True, "focal_mode": "replace", "focal_gamma": 1.0},
    "replace, gamma 2": {"use_focal_loss": True, "focal_mode": "replace"},
}


def trial(seed: int, options: dict[str, Any]) -> dict[str, float]:
    language, model = Markov(V, seed, zipf=1.0), WindowMLP(V, seed)
    loss_fn = lossmith.UnifiedLoss(V, shift=True, **options)
    text = language.sample(STEPS, 16, 32)

    def loss_of(step: int) -> torch.Tensor:
        ids = text[step]
        return loss_fn(model(ids), ids)

    fit(model.parameters(), loss_of, STEPS)
    ids = language.sample(256, 32)
    with torch.no_grad():
        nll = lossmith.cross_entropy(model(ids)[:, :-1], ids[:, 1:], reduction="none")
    order = language.stationary.argsort()
    below = torch.empty(V, dtype=torch.float64)
    below[order] = language.stationary[order].cumsum(0)
    share = below[ids[:, 1:]]
    return {
        "nll": nll.mean().item(),
        "nll, rare": nll[share <= 0.1].mean().item(),
        "nll, frequent": nll[share > 0.5].mean().item(),
    }


if __name__ == "__main__":
    compare(__file__, ARMS, trial)
