"""The loss-modifier pipeline on given logits, forward and backward, against plain cross-entropy.

    python benchmarks/modifiers.py [--rounds 15] [--device cpu] [--csv FILE]

``naive`` writes the entropy weighting, label smoothing and mask-ratio weighting down as one would.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import lossmith
from harness import Step, machine, peak_memory_mb, time_interleaved

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", help="also write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(options.device))
    rows = []
    for dtype in ("float32", "bfloat16"):
        steps = {name: make_step(name, dtype, options.device) for name in CONTENDERS}
        seconds = time_interleaved(steps, rounds=options.rounds, device=options.device)
        del steps
        print(f"\nlogits [{BATCH}, {LENGTH}, {NUM_CLASSES}], {dtype}: forward and backward")
        print(f"  {'':28}{'ms':>9}{'x F.ce':>9}{'extra MiB':>11}")
        for name, value in seconds.items():
            memory = peak_memory_mb(make_step, name, dtype, options.device, device=options.device)
            ratio = value / seconds["F.cross_entropy"]
            print(f"  {name:28}{value * 1e3:9.1f}{ratio:9.2f}{memory:11.0f}")
            rows.append([dtype, name, value * 1e3, ratio, memory])
    if options.csv:
        Path(options.csv).parent.mkdir(parents=True, exist_ok=True)
        with open(options.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["# " + machine(options.device)])
            writer.writerow(["dtype", "name", "ms", "x_f_cross_entropy", "extra_mib"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
