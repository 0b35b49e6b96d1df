"""Does the z-loss keep the normaliser near 1, at an equal loss?

Task: an MLP of the last token on a Markov language of 300 tokens, at a high learning rate. Each token has
only 8 successors, so the logits of all others fall, and nothing in cross-entropy says where logsumexp
should be.

Measured on held-out text: the mean of |logsumexp|, and the negative log-likelihood.

Tried: on the first seed, 300 steps, where 1e-3 left 8.98 of 9.62; and a start with all logits raised by 15,
which 1e-2 halved in 250 steps at a worse likelihood and smaller weights left alone.

Shows: without it logsumexp is {off: |logsumexp|} on average. A weight of 1e-2 brings it to {z_loss=1e-2:
|logsumexp|} at nearly the same likelihood ({z_loss=1e-2: nll} against {off: nll}). In a run of 800 steps
the customary 1e-4 hardly moves it ({z_loss=1e-4: |logsumexp|}), and 1e-3 moves it a little ({z_loss=1e-3:
|logsumexp|}).
"""

from __future__ import annotations

import torch
from languages import Markov
from models import WindowMLP

import lossmith
from harness import compare, fit

V, STEPS = 300, 800
ARMS = {"off": 0.0, "z_loss=1e-4": 1e-4, "z_loss=1e-3": 1e-3, "z_loss=1e-2": 1e-2}


def trial(seed: int, z_loss: float) -> dict[str, float]:
    language, model = Markov(V, seed), WindowMLP(V, seed)
    loss_fn = lossmith.CrossEntropyLoss(shift=True, z_loss=z_loss)
    text = language.sample(STEPS, 16, 32)

    def loss_of(step: int) -> torch.Tensor:
        ids = text[step]
        return loss_fn(model(ids), ids)

    fit(model.parameters(), loss_of, STEPS, lr=1e-2)
    with torch.no_grad():
        ids = language.sample(64, 32)
        logits = model(ids)[:, :-1]
    return {
        "|logsumexp|": logits.logsumexp(-1).abs().mean().item(),
        "nll": lossmith.cross_entropy(logits, ids[:, 1:]).item(),
    }


if __name__ == "__main__":
    compare(__file__, ARMS, trial)
