"""Does the early-EOS penalty lengthen texts that end too early?

Task: a causal transformer (2 layers, width 64) learns documents of a Markov language of 60 tokens that end
after 16 to 40 tokens. A fifth of the training documents are broken off: their end comes after 4 to 12
tokens.

Measured on 160 sampled texts: the mean length, the share that ends before the 16th token, and the share
that has not ended after 48; and the negative log-likelihood of held-out documents that are whole.

Shows: yes, at far larger weights than the default, which does nothing ({off: ends early} of the texts end
early without it, {defaults (length 20, weight 0.05): ends early} with it). Weight 1 leaves {length 16,
weight 1: ends early} and weight 10 {length 16, weight 10: ends early}; the mean length rises from {off:
length} to {length 16, weight 10: length}, that of whole documents being 28, texts still end, and the
likelihood of whole documents does not suffer ({off: nll, whole documents} and {length 16, weight 10: nll,
whole documents}).
"""

from __future__ import annotations

from typing import Any

import torch
from languages import Markov
from models import Transformer

import lossmith
from harness import compare, fit

V, EOS, BOS, STEPS, BATCH, LONGEST, EARLY = 60, 60, 61, 250, 16, 48, 16
ARMS: dict[str, dict[str, Any]] = {
    "off": {},
    "defaults (length 20, weight 0.05)": {"eos_token_id": EOS},
    "length 16, weight 1": {"eos_token_id": EOS, "min_sequence_length": 16, "eos_penalty_weight": 1.0},
    "length 16, weight 10": {"eos_token_id": EOS, "min_sequence_length": 16, "eos_penalty_weight": 10.0},
    "length 16, weight 100": {"eos_token_id": EOS, "min_sequence_length": 16, "eos_penalty_weight": 100.0},
}


def documents(language: Markov, num: int, broken: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and aligned targets [num, T]: BOS, text, EOS; what follows is no target."""
    text = language.sample(num, LONGEST)
    length = torch.randint(16, 41, (num, 1), generator=language.rng)
    short = torch.randint(4, 13, (num, 1), generator=language.rng)
    is_broken = torch.rand(num, 1, generator=language.rng) < broken
    length = torch.where(is_broken, short, length)
    position = torch.arange(LONGEST)
    targets = text.masked_fill(position == length, EOS).masked_fill(position > length, -100)
    inputs = torch.cat([torch.full((num, 1), BOS), text[:, :-1]], 1)
    return inputs, targets


def trial(seed: int, options: dict[str, Any]) -> dict[str, float]:
    language, model = Markov(V, seed), Transformer(V + 2, seed)
    loss_fn = lossmith.UnifiedLoss(V + 2, **options)
    inputs, targets = (x.view(STEPS, BATCH, -1) for x in documents(language, STEPS * BATCH, 0.2))

    def loss_of(step: int) -> torch.Tensor:
        return loss_fn(model(inputs[step]), targets[step], input_ids=inputs[step])

    fit(model.parameters(), loss_of, STEPS)
    held_out, wanted = documents(language, 128, 0.0)
    return measure(model, held_out, wanted, language.rng)


@torch.no_grad()
def measure(
    model: Transformer, held_out: torch.Tensor, wanted: torch.Tensor, rng: torch.Generator
) -> dict[str, float]:
    ids = torch.full((160, 1), BOS)
    for _ in range(LONGEST + 1):
        probabilities = model(ids)[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=rng)], 1)
    is_end = ids[:, 1:] == EOS
    length = torch.where(is_end.any(1), is_end.int().argmax(1), LONGEST + 1).double()
    return {
        "length": length.mean().item(),
        "ends early": (length < EARLY).double().mean().item(),
        "no end": (length > LONGEST).double().mean().item(),
        "nll, whole documents": lossmith.cross_entropy(model(held_out), wanted).item(),
    }


if __name__ == "__main__":
    compare(__file__, ARMS, trial)
