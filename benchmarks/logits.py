"""Losses on given logits, forward and backward: lossmith against PyTorch, eager and compiled.

    python benchmarks/logits.py [--rounds 9] [--no-memory] [--device cpu] [--csv FILE]

``clone`` reads and writes the logits once. ``naive`` and ``lossmith, all four`` compute the same
loss: label smoothing, z-loss, focal weighting and a confidence penalty.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import lossmith
from harness import Step, machine, peak_memory_mb, time_interleaved
from lossmith.engine.rows import native_rows

SHAPES = [(1024, 50257), (8192, 4096)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FOUR = {"label_smoothing": 0.1, "z_loss": 1e-4, "focal_gamma": 2.0, "confidence_penalty": 0.1}


def naive(logits: Tensor, targets: Tensor) -> Tensor:
    """The four terms as one writes them down."""
    logits = logits.float()
    log_p = F.log_softmax(logits, dim=-1)
    p = log_p.exp()
    p_target = p.gather(1, targets[:, None]).squeeze(1)
    smoothed = F.cross_entropy(logits, targets, label_smoothing=FOUR["label_smoothing"], reduction="none")
    focal = (1 - p_target) ** FOUR["focal_gamma"] * smoothed
    z_loss = FOUR["z_loss"] * torch.logsumexp(logits, dim=-1) ** 2
    entropy = -(p * log_p).sum(-1)
    return (focal + z_loss - FOUR["confidence_penalty"] * entropy).mean()


def ours(logits: Tensor, targets: Tensor) -> Tensor:
    return lossmith.cross_entropy(logits, targets, **FOUR)


def without_kernels(step: Step) -> Step:
    """The step as it is on a machine without a C++ compiler."""

    def run() -> None:
        with mock.patch.object(native_rows, "takes", return_value=False):
            step()

    return run


CONTENDERS = {
    "clone": None,
    "F.cross_entropy": F.cross_entropy,
    "F.cross_entropy compiled": F.cross_entropy,
    "naive, all four": naive,
    "naive, all four, compiled": naive,
    "lossmith": lossmith.cross_entropy,
    "lossmith, all four": ours,
    "lossmith, no compiler": lossmith.cross_entropy,
    "lossmith, no compiler, all four": ours,
}


def make_step(name: str, num_tokens: int, num_classes: int, dtype: str, device: str) -> Step:
    """One forward and backward of a contender on fixed random logits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_tokens, num_classes, generator=generator).to(device, DTYPES[dtype])
    targets = torch.randint(num_classes, (num_tokens,), generator=generator).to(device)
    loss = CONTENDERS[name]
    if loss is None:
        return lambda: logits.clone()
    if name.endswith("compiled"):
        torch._dynamo.reset()
        loss = torch.compile(loss, fullgraph=True)
    logits.requires_grad_()

    def step() -> None:
        logits.grad = None
        loss(logits, targets).backward()

    return without_kernels(step) if "no compiler" in name else step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--csv", help="also write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(options.device))
    rows = []
    for num_tokens, num_classes in SHAPES:
        for dtype in DTYPES:
            case = (num_tokens, num_classes, dtype, options.device)
            steps = {name: make_step(name, *case) for name in CONTENDERS}
            seconds = time_interleaved(steps, rounds=options.rounds, device=options.device)
            del steps
            plain, composed = seconds["F.cross_entropy"], seconds["naive, all four"]
            print(f"\nN={num_tokens}, V={num_classes}, {dtype}: forward and backward")
            print(f"  {'':32}{'ms':>9}{'x F.ce':>9}{'x naive':>9}{'extra MiB':>11}")
            for name, value in seconds.items():
                memory = None
                if not options.no_memory:
                    memory = peak_memory_mb(make_step, name, *case, device=options.device)
                shown = "" if memory is None else f"{memory:11.0f}"
                print(f"  {name:32}{value * 1e3:9.1f}{value / plain:9.2f}{value / composed:9.3f}{shown}")
                rows.append(
                    [
                        num_tokens,
                        num_classes,
                        dtype,
                        name,
                        value * 1e3,
                        value / plain,
                        value / composed,
                        memory,
                    ]
                )
    if options.csv:
        Path(options.csv).parent.mkdir(parents=True, exist_ok=True)
        with open(options.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["# " + machine(options.device)])
            writer.writerow(
                [
                    "num_tokens",
                    "num_classes",
                    "dtype",
                    "name",
                    "ms",
                    "x_f_cross_entropy",
                    "x_naive",
                    "extra_mib",
                ]
            )
            writer.writerows(rows)


if __name__ == "__main__":
    main()
