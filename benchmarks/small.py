"""Small logits: what a call costs before there is anything to compute. Forward and backward, fp32, medians.

python benchmarks/small.py --csv benchmarks/results/small-cpu.csv
"""

from __future__ import annotations

import torch
from torch.nn import functional

import harness
import lossmith

SHAPES = ((8, 100), (64, 1000), (256, 1000), (512, 2048))
ALL_FOUR = {"label_smoothing": 0.1, "z_loss": 1e-4, "focal_gamma": 2.0, "confidence_penalty": 0.1}
CRITERIA = {
    "F.cross_entropy": functional.cross_entropy,
    "CrossEntropyLoss": lossmith.CrossEntropyLoss(),
    "CrossEntropyLoss, all four": lossmith.CrossEntropyLoss(**ALL_FOUR),
    "all four, temperature": lossmith.CrossEntropyLoss(temperature=0.9, **ALL_FOUR),
    "cross_entropy, the function": lossmith.cross_entropy,
    "NVAMPLoss": lossmith.NVAMPLoss(),
}


def make_step(name: str, num_tokens: int, num_classes: int) -> harness.Step:
    """Forward and backward of one criterion."""
    logits = torch.randn(num_tokens, num_classes, requires_grad=True)
    targets = torch.randint(num_classes, (num_tokens,))
    criterion = CRITERIA[name]

    def step() -> None:
        logits.grad = None
        criterion(logits, targets).backward()

    return step


def main() -> None:
    chosen = harness.options("what a call costs on small logits", rounds=1000)
    rows = []
    for shape in SHAPES:
        steps = {name: make_step(name, *shape) for name in CRITERIA}
        harness.time_interleaved(steps, rounds=50, device=chosen.device)
        seconds = harness.time_interleaved(steps, rounds=chosen.rounds, device=chosen.device)
        first = next(iter(seconds.values()))
        print(f"\nlogits {list(shape)}\n  {'':34}{'ms':>9}{'ratio':>9}")
        for name, value in seconds.items():
            print(f"  {name:34}{value * 1e3:9.3f}{value / first:9.2f}")
            rows.append([*shape, name, value * 1e3, value / first])
    harness.write_csv(chosen, ["N", "V", "criterion", "ms", "ratio"], rows)


if __name__ == "__main__":
    main()
