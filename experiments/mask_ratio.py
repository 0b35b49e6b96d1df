"""Do rows with few supervised tokens gain from the mask-ratio weight, and who pays?

Task: answers of different lengths after a key, read by an MLP of the last two tokens. Half of the rows are
long, 30 supervised tokens of a Markov language; half are short, 2 supervised tokens that only the key says.
Mean over tokens, the short rows are a sixteenth of the loss.

Measured on held-out rows: the negative log-likelihood of the tokens of short rows, and of long ones.

Shows: the mean over samples, which the modifier brings with it, makes all of the gain. The short rows go
from {off, mean: nll, short rows} to {off, sequence_mean: nll, short rows} nats without any weight, and to
{power 0.5: nll, short rows} with the default power, which long rows pay for ({off, sequence_mean: nll, long
rows} without, {power 0.5: nll, long rows} with it). Power 1 gains a little more at a still higher price.
With `reduction="mean"` the default power is a compromise: {power 0.5, mean: nll, short rows} and {power
0.5, mean: nll, long rows}.
"""

from __future__ import annotations

from typing import Any

import torch
from languages import Markov
from models import WindowMLP

import lossmith
from harness import compare, fit

V, KEYS, STEPS, BATCH, T = 60, 200, 200, 32, 31
RATIO = {"mask_ratio_weight_enabled": True, "loss_modifiers_enabled": True}
ARMS: dict[str, dict[str, Any]] = {
    "off, mean": {"reduction": "mean"},
    "off, sequence_mean": {"reduction": "sequence_mean"},
    "power 0.5, mean": {**RATIO, "reduction": "mean"},
    "power 0.5": RATIO,
    "power 1": {**RATIO, "mask_ratio_weight_power": 1.0, "mask_ratio_weight_max_weight": 20.0},
}


def rows(language: Markov, answers: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and aligned targets [steps, B, T]. Even rows are long; odd ones are a key and its answer."""
    ids = language.sample(steps, BATCH, T)
    keys = torch.randint(KEYS, (steps, BATCH // 2), generator=language.rng)
    ids[:, 1::2, 0] = keys + V
    ids[:, 1::2, 1:3] = answers[keys]
    targets = ids[..., 1:].clone()
    targets[:, 1::2, 2:] = -100
    return ids[..., :-1], targets


def trial(seed: int, options: dict[str, Any]) -> dict[str, float]:
    language, model = Markov(V, seed), WindowMLP(V + KEYS, seed, k=2)
    answers = torch.randint(V, (KEYS, 2), generator=language.rng)
    inputs, targets = rows(language, answers, STEPS)
    settings = dict(options)
    pipeline = lossmith.create_loss_modifier_pipeline(settings, reduction=settings.pop("reduction", "auto"))
    fit(model.parameters(), lambda step: pipeline(model(inputs[step]), targets[step]), STEPS)
    held_out, wanted = rows(language, answers, 16)
    with torch.no_grad():
        nll = lossmith.cross_entropy(model(held_out.flatten(0, 1)), wanted.flatten(0, 1), reduction="none")
    return {"nll, short rows": nll[1::2, :2].mean().item(), "nll, long rows": nll[::2].mean().item()}


if __name__ == "__main__":
    compare(__file__, ARMS, trial)
