"""Do the variance and the correlation factor help a cramped sequence scorer?

Task: predict the share of replaced tokens, y in [0, 1], of a sequence of 16 from the mean of small
embeddings and a sigmoid that starts nearly flat, so that predictions begin at a constant; training is
short, with plain SGD, as Adam divides a constant factor out, and with Adam.

Measured on held-out sequences: the variance of the predictions over that of the targets, Pearson's r, and
the mean squared error; under SGD, and the ratio and the error also under Adam.

Shows: under SGD, as much as a larger learning rate does, and under Adam nothing, or a little harm. With SGD
the variance factor raises the variance ratio from {off: variance ratio} to {variance: variance ratio} and
lowers the error from {off: MSE} to {variance: MSE}, the correlation factor less ({correlation: MSE}); twice
the learning rate without any factor does the same ({off, learning rate x 2: MSE}). With Adam, which divides
out how large a loss is, the factors do not help ({off: MSE, Adam} without, {variance: MSE, Adam} and
{correlation: MSE, Adam} with them).
"""

from __future__ import annotations

import torch
from torch import nn

import lossmith
from harness import compare

V, T, STEPS, BATCH = 40, 16, 400, 64
VARIANCE = {"sequence_variance_enabled": True}
CORRELATION = {"sequence_correlation_enabled": True}
ARMS: dict[str, dict[str, object]] = {
    "off": {},
    "variance": VARIANCE,
    "correlation": CORRELATION,
    "both": {**VARIANCE, **CORRELATION},
    "off, learning rate x 2": {"rate": 2.0},
}


class Scorer(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.out = nn.Embedding(V, 8), nn.Linear(8, 1)
        with torch.no_grad():
            self.tokens.weight.mul_(0.3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.tokens(ids).mean(1))[:, 0].sigmoid()


def sample(num: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of ids below V/2, a share of which are replaced by ids above; and that share, with noise."""
    share = torch.rand(num, generator=rng)
    ids = torch.randint(V // 2, (num, T), generator=rng)
    is_replaced = torch.rand(num, T, generator=rng) < share[:, None]
    noise = 0.1 * torch.randn(num, generator=rng)
    return ids + (V // 2) * is_replaced, (share + noise).clamp(0, 1)


def trained(
    seed: int, options: dict[str, object], kind: type[torch.optim.Optimizer], rate: float
) -> list[float]:
    rng, model = torch.Generator().manual_seed(seed), Scorer(seed)
    keys = {"loss_modifiers_enabled": True, **options}
    rate *= float(str(keys.pop("rate", 1.0)))
    pipeline = lossmith.create_loss_modifier_pipeline(keys, model_mode="sequence_scorer")
    optimizer = kind(model.parameters(), lr=rate)  # type: ignore[call-arg]
    for _ in range(STEPS):
        ids, wanted = sample(BATCH, rng)
        predicted = model(ids)
        error = (predicted - wanted).square().mean()
        optimizer.zero_grad()
        pipeline.modify_loss(predicted, wanted, error).backward()
        optimizer.step()
    ids, wanted = sample(4096, rng)
    with torch.no_grad():
        predicted = model(ids)
    r = torch.corrcoef(torch.stack([predicted, wanted]))[0, 1]
    error = (predicted - wanted).square().mean()
    return [(predicted.var() / wanted.var()).item(), r.item(), error.item()]


def trial(seed: int, options: dict[str, object]) -> dict[str, float]:
    ratio, r, error = trained(seed, options, torch.optim.SGD, 0.5)
    adam = trained(seed, options, torch.optim.Adam, 1e-3)
    return {
        "variance ratio": ratio,
        "Pearson's r": r,
        "MSE": error,
        "variance ratio, Adam": adam[0],
        "MSE, Adam": adam[2],
    }


if __name__ == "__main__":
    compare(__file__, ARMS, trial)
