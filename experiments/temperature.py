"""What do a fixed and an adaptive temperature do to a model that is then used at temperature 1?

Task: an MLP of the last token on a Markov language of 100 tokens.

Measured on held-out text at temperature 1: the negative log-likelihood and the entropy of the predictions,
which for a calibrated model are equal; the same likelihood at the temperature of training; and that
temperature at the end.

Shows: a model trained at T is to be used at T. At temperature 1, one trained at 0.7 is too flat (entropy
{fixed 0.7: entropy} against {off: entropy}) and one trained at 1.5 too sharp ({fixed 1.5: entropy}), and
both are worse ({fixed 0.7: nll} and {fixed 1.5: nll} nats against {off: nll}). At its own temperature 0.7
is a little better than no temperature ({fixed 0.7: nll at T}). The adaptive temperature rises to {adaptive:
T}, since the loss still varies, and harms most ({adaptive: nll}).
"""

from __future__ import annotations

from typing import Any

import torch
from languages import Markov
from models import WindowMLP

import lossmith
from harness import compare, fit

V, STEPS = 100, 300
ARMS: dict[str, dict[str, Any]] = {
    "off": {},
    "fixed 0.7": {"initial_temperature": 0.7},
    "fixed 1.5": {"initial_temperature": 1.5},
    "adaptive": {"adaptive_temperature": True},
}


def trial(seed: int, options: dict[str, Any]) -> dict[str, float]:
    language, model = Markov(V, seed), WindowMLP(V, seed)
    loss_fn = lossmith.UnifiedLoss(V, shift=True, **options)
    text = language.sample(STEPS, 16, 32)
    fit(model.parameters(), lambda step: loss_fn(model(text[step]), text[step]), STEPS)
    ids = language.sample(256, 32)
    with torch.no_grad():
        logits = model(ids)[:, :-1]
    stats = lossmith.token_stats(logits, ids[:, 1:])
    end = loss_fn.get_loss_statistics().get("temperature", options.get("initial_temperature", 1.0))
    return {
        "nll": stats.nll.mean().item(),
        "entropy": stats.entropy.mean().item(),
        "nll at T": lossmith.cross_entropy(logits / end, ids[:, 1:]).item(),
        "T": float(end),
    }


if __name__ == "__main__":
    compare(__file__, ARMS, trial)
