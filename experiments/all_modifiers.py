"""Do all loss modifiers together harm a masked language model, which of them does it, and what does not?

Task: a masked language model (an MLP that reads two tokens to either side) on a Markov language of 60
tokens; a block of 32 tokens has 1 to 32 of them masked, each number as likely as the others. The judge is a
scorer that was trained on corrupted text.

Measured on held-out text: the unmodified negative log-likelihood of masked tokens, all of them and those of
blocks with at most 8 masked.

Tried: eight settings on the first seed before the last two of the table.

Shows: all at their defaults cost {all, defaults: nll} against {off: nll} nats. The mask-ratio weight ({mask
ratio: nll}) and the judge ({judge: nll}) do it, and together they do it twice ({mask ratio, judge: nll}):
both favour blocks with few masked tokens, on top of the mean over samples, which alone costs a little
({off, sequence_mean: nll}). Even blocks with few masked tokens are predicted worse. Smoothing and entropy
cost little. Weakening the limits is not enough ({all, weakened: nll}). With `reduction="mean"` the
mask-ratio weight harms nothing ({mask ratio, mean: nll}), and with weak parameters, too, all together do
not ({all, recommended: nll}); nor do they help.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from languages import Markov
from models import WindowMLP

import lossmith
from harness import compare, fit
from lossmith.modifiers.tokens.judge import expected_wrongness

V, MASK, STEPS, BATCH, T = 60, 60, 300, 32, 32
ENTROPY = {"entropy_modifier_enabled": True}
SMOOTHING = {"target_smoothing_enabled": True}
RATIO = {"mask_ratio_weight_enabled": True}
JUDGE = {"judge_weight_modifier_enabled": True}
ALL = {**ENTROPY, **SMOOTHING, **RATIO, **JUDGE}
WEAK = {
    **ALL,
    "judge_weight_exponent": 0.5,
    "judge_weight_max_factor": 1.5,
    "mask_ratio_weight_power": 0.25,
    "mask_ratio_weight_max": 2.0,
}
RECOMMENDED = {
    **ALL,
    "reduction": "mean",
    "judge_weight_exponent": 0.25,
    "judge_weight_max_factor": 1.5,
    "mask_ratio_weight_power": 0.25,
    "mask_ratio_weight_max": 2.0,
    "entropy_modifier_weight": 0.25,
    "target_smoothing_factor": 0.01,
}
ARMS: dict[str, dict[str, Any]] = {
    "off": {},
    "off, sequence_mean": {"reduction": "sequence_mean"},
    "entropy": ENTROPY,
    "smoothing": SMOOTHING,
    "mask ratio": RATIO,
    "judge": JUDGE,
    "mask ratio, judge": {**RATIO, **JUDGE},
    "all, defaults": ALL,
    "all, weakened": WEAK,
    "all, defaults, mean": {**ALL, "reduction": "mean"},
    "mask ratio, mean": {**RATIO, "reduction": "mean"},
    "all, recommended": RECOMMENDED,
}


def masked(text: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets: 1 to T tokens of every row are hidden, and those are predicted."""
    num = torch.randint(1, T + 1, (*text.shape[:-1], 1), generator=rng)
    hidden = torch.rand(text.shape, generator=rng).argsort(-1).argsort(-1) < num
    return text.masked_fill(hidden, MASK), text.masked_fill(~hidden, -100)


@lru_cache(1)
def trained_judge(seed: int) -> torch.nn.Module:
    """A scorer of text of which a share x was replaced: it learns y(x)."""
    language, model = Markov(V, seed), WindowMLP(V + 1, seed, k=3, ahead=2, num_out=1)
    text = language.sample(STEPS, BATCH, T)
    share = torch.rand(STEPS, BATCH, 1, generator=language.rng)
    is_replaced = torch.rand(text.shape, generator=language.rng) < share
    shown = torch.where(is_replaced, torch.randint(V, text.shape, generator=language.rng), text)
    wanted = expected_wrongness(share[..., 0])
    fit(
        model.parameters(),
        lambda step: (model(shown[step])[..., 0].mean(-1).sigmoid() - wanted[step]).square().mean(),
        STEPS,
    )
    return model


def trial(seed: int, options: dict[str, Any]) -> dict[str, float]:
    scorer = trained_judge(seed)
    language, model = Markov(V, seed), WindowMLP(V + 1, seed, k=3, ahead=2, num_out=V)
    inputs, targets = masked(language.sample(STEPS, BATCH, T), language.rng)
    settings = dict(options)
    reduction = settings.pop("reduction", "auto")
    pipeline = lossmith.create_loss_modifier_pipeline(
        {"loss_modifiers_enabled": True, **settings},
        reduction=reduction,
        judge=lambda ids: scorer(ids)[..., 0].mean(-1).sigmoid(),
    )

    def loss_of(step: int) -> torch.Tensor:
        return pipeline(model(inputs[step]), targets[step], input_ids=inputs[step])

    fit(model.parameters(), loss_of, STEPS)
    inputs, targets = masked(language.sample(512, T), language.rng)
    with torch.no_grad():
        nll = lossmith.cross_entropy(model(inputs), targets, reduction="none")
    is_target = targets != -100
    is_sparse = is_target & (is_target.sum(-1, keepdim=True) <= 8)
    return {"nll": nll[is_target].mean().item(), "nll, at most 8 masked": nll[is_sparse].mean().item()}


if __name__ == "__main__":
    compare(__file__, ARMS, trial)
