"""The loss-modifier pipeline on given logits, forward and backward, against plain cross-entropy.

    python benchmarks/modifiers.py [--rounds 15] [--device cpu] [--csv FILE]

``naive`` writes the entropy weighting, label smoothing and mask-ratio weighting down as one would.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import lossmith
from harness import Step, options, over_dtypes, write_csv

BATCH, LENGTH, NUM_CLASSES = 8, 128, 50257
KEYS = {
    "entropy": {"entropy_modifier_enabled": True, "entropy_modifier_threshold": 0.1},
    "smoothing": {"target_smoothing_enabled": True, "target_smoothing_factor": 0.1},
    "mask ratio": {"mask_ratio_weight_enabled": True},
    "metrics": {"metrics_collector_enabled": True},
}
ALL = {key: value for keys in KEYS.values() for key, value in keys.items()}


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def naive(logits: Tensor, targets: Tensor) -> Tensor:
    """Entropy weights, smoothing and mask-ratio weights, over the whole vocabulary each."""
    valid = targets != -100
    ids = targets.clamp(min=0).unsqueeze(-1)
    with torch.no_grad():
        p = logits.softmax(-1)
        wrong = p.scatter(-1, ids, 0.0)
        q = wrong / wrong.sum(-1, keepdim=True).clamp(min=1e-8)
        entropy = -(q * (q + 1e-8).log()).sum(-1) / (q > 1e-8).sum(-1).clamp(min=2).log()
        per_row = (entropy * valid).sum(-1) / valid.sum(-1)
        weight = 1 / (per_row.clamp(min=0.1) + 1e-8)
        weight = weight * len(weight) / weight.sum()
        weight = weight * (valid.float().mean(-1) + 1e-8) ** -0.5
    loss = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1, reduction="none"
    ).view_as(targets)
    return (weight * (loss * valid).sum(-1) / valid.sum(-1)).mean()


def pipeline(keys: dict) -> lossmith.LossModifierPipeline:
    return lossmith.create_loss_modifier_pipeline({"loss_modifiers_enabled": True, **keys})


CONTENDERS = {
    "F.cross_entropy": lambda: plain,
    "naive": lambda: naive,
    "lossmith, nothing enabled": lambda: pipeline({}).modify_loss,
    **{f"lossmith, {name}": (lambda keys=keys: pipeline(keys).modify_loss) for name, keys in KEYS.items()},
    "lossmith, all four": lambda: pipeline(ALL).modify_loss,
}


def make_step(name: str, dtype: str, device: str) -> Step:
    """One forward and backward of a contender on fixed random logits, a quarter of the targets masked."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, LENGTH, NUM_CLASSES, generator=generator)
    targets = torch.randint(NUM_CLASSES, (BATCH, LENGTH), generator=generator)
    lengths = torch.linspace(LENGTH // 2, LENGTH, BATCH).long()
    targets = targets.masked_fill(torch.arange(LENGTH) >= lengths[:, None], -100).to(device)
    logits = logits.to(device, getattr(torch, dtype)).requires_grad_()
    loss = CONTENDERS[name]()

    def step() -> None:
        logits.grad = None
        loss(logits, targets).backward()

    return step


def main() -> None:
    chosen = options(__doc__.splitlines()[0])
    rows = over_dtypes([BATCH, LENGTH, NUM_CLASSES], CONTENDERS, make_step, chosen)
    write_csv(chosen, ["dtype", "name", "ms", "x_f_cross_entropy", "extra_mib"], rows)


if __name__ == "__main__":
    main()
