"""Does a judge that knows which samples the model writes wrong send the training there?

Task: a masked language model (an MLP of two tokens to either side) on two Markov languages of 40 tokens
each. Rows of the second language are a tenth of the text, so the model writes them worse. The judge scores
what the model writes at the 8 masked positions of a row by the languages' own probabilities: the share of
impossible pairs of tokens.

Measured on held-out rows: the negative log-likelihood of masked tokens of the frequent and of the rare
language, and the mean factor of the rare rows over that of the frequent ones after training. "planted" is a
judge that always finds the rare language wrong (1) and the frequent one half as wrong.

Shows: yes, at the default exponent. The planted judge doubles the rare rows' weight and lowers their loss
from {off: nll, rare} to {planted, exponent 1: nll, rare} nats, at a small price for the frequent ones
({off: nll, frequent} to {planted, exponent 1: nll, frequent}). The judge that reads what the model writes
finds the rare rows {judge, exponent 1: factor, rare / frequent} times as wrong without being told, and
lowers theirs to {judge, exponent 1: nll, rare} ({judge, exponent 1: nll, frequent} for the frequent ones).
Exponent 3 gains less and costs more ({judge, exponent 3: nll, rare} and {judge, exponent 3: nll,
frequent}). Over all rows the planted judge gains a little (1.35 against 1.37 nats without), and the one
that reads costs (1.42).
"""

from __future__ import annotations

from typing import Any

import torch
from languages import Markov
from models import WindowMLP

import lossmith
from harness import compare, fit

V, MASK, STEPS, BATCH, T, NUM = 40, 80, 250, 40, 24, 8
ARMS: dict[str, dict[str, Any]] = {
    "off": {"exponent": 0.0},
    "planted, exponent 1": {"planted": True},
    "planted, exponent 3": {"planted": True, "exponent": 3.0, "max_factor": 100.0},
    "judge, exponent 1": {},
    "judge, exponent 3": {"exponent": 3.0, "max_factor": 100.0, "min_factor": 0.001},
}


def rows(languages: list[Markov], num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [num, BATCH, T]; the last tenth of every batch is of the second language."""
    few = BATCH // 10
    text = torch.cat([languages[0].sample(num, BATCH - few, T), languages[1].sample(num, few, T) + V], 1)
    rank = torch.rand(text.shape, generator=languages[0].rng).argsort(-1).argsort(-1)
    return text.masked_fill(rank < NUM, MASK), text.masked_fill(rank >= NUM, -100)


def judge_of(languages: list[Markov], planted: bool) -> Any:
    possible = torch.block_diag(*(language.following > 0 for language in languages)).bool()

    def judge(ids: torch.Tensor) -> torch.Tensor:
        if planted:
            return torch.where((ids >= V).sum(-1) > T // 2, 1.0, 0.5)
        return (~possible[ids[:, :-1], ids[:, 1:]]).float().mean(-1)

    return judge


def trial(seed: int, parameters: dict[str, Any]) -> dict[str, float]:
    languages = [Markov(V, seed, branches=6), Markov(V, seed + 100, branches=6)]
    model = WindowMLP(2 * V + 1, seed, k=3, ahead=2, num_out=2 * V)
    settings = dict(parameters)
    judge = judge_of(languages, settings.pop("planted", False))
    modifier = lossmith.SequenceScoringJudgeWeightModifier({"judge": judge, **settings})
    pipeline = lossmith.LossModifierPipeline(modifier, reduction="sequence_mean")
    inputs, targets = rows(languages, STEPS)
    torch.manual_seed(seed)  # what the model writes is sampled

    def loss_of(step: int) -> torch.Tensor:
        return pipeline(model(inputs[step]), targets[step], input_ids=inputs[step])

    fit(model.parameters(), loss_of, STEPS)
    inputs, targets = (x.flatten(0, 1) for x in rows(languages, 30))
    is_rare = torch.arange(BATCH).repeat(30) >= BATCH - BATCH // 10
    with torch.no_grad():
        logits = model(inputs)
        nll = lossmith.cross_entropy(logits, targets, reduction="none").sum(-1) / NUM
        ones = torch.ones(targets.shape)
        factor = pipeline.modify_loss(
            logits, targets, input_ids=inputs, per_position_loss=ones, reduction="none"
        ).amax(-1)
    return {
        "nll, frequent": nll[~is_rare].mean().item(),
        "nll, rare": nll[is_rare].mean().item(),
        "factor, rare / frequent": (factor[is_rare].mean() / factor[~is_rare].mean()).item(),
    }


if __name__ == "__main__":
    compare(__file__, ARMS, trial)
