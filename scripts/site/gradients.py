#!/usr/bin/env python3
"""Draw docs/images/gradients.svg: what every loss does to a token, computed by lossmith itself.

    python scripts/site/gradients.py

Each panel is one loss. Its tokens differ only in the probability p of the target. Drawn are the gradients of
a token's loss with respect to the target's logit and to that of the best wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import lossmith

NUM_CLASSES, NUM_TOKENS = 50, 99
TARGET, BEST_WRONG = 0, 1
OUTPUT = Path(__file__).resolve().parents[2] / "docs" / "images" / "gradients.svg"

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(**options: float) -> Loss:
    return lambda logits, targets: lossmith.cross_entropy(logits, targets, reduction="sum", **options)  # type: ignore[call-overload]


def sum_of(criterion: lossmith.Objective, **inputs: Tensor) -> Loss:
    return lambda logits, targets: criterion(logits, targets, denominator=1, **inputs)


def beside(component: lossmith.Component, weight: float, **inputs: Tensor) -> Loss:
    """Cross-entropy and one component."""
    parts = {"part": lossmith.Weighted(component, weight)}
    return sum_of(lossmith.ComposedLoss(lossmith.CrossEntropyLoss(), components=parts), **inputs)


READ = torch.full((1, NUM_TOKENS), BEST_WRONG)  # so the best wrong answer would repeat what was just read
LOSSES: dict[str, Loss] = {
    "cross-entropy": cross_entropy(),
    "label smoothing 0.1": cross_entropy(label_smoothing=0.1),
    "temperature 2": cross_entropy(temperature=2.0),
    "softcap 5": cross_entropy(softcap=5.0),
    "focal, γ = 2, in its place": cross_entropy(focal_gamma=2.0),
    "focal, added at 0.2": beside(lossmith.Focal(gamma=2.0), 0.2),
    "z-loss 0.01": cross_entropy(z_loss=0.01),
    "confidence penalty 0.3": cross_entropy(confidence_penalty=0.3),
    "NVAMP": sum_of(lossmith.NVAMPLoss()),
    "weighted by confidence": sum_of(lossmith.AdaptiveCrossEntropyLoss()),
    "repetition penalty 0.5": beside(lossmith.ImmediateRepetition(threshold=1), 0.5, input_ids=READ),
    "early end 0.5": beside(lossmith.EarlyEOS(BEST_WRONG, min_length=NUM_TOKENS), 0.5),
}


def tokens() -> tuple[Tensor, Tensor]:
    """Logits [1, N, V] with the target's probability from 0.01 to 0.99, and targets [1, N]."""
    generator = torch.Generator().manual_seed(0)
    wrong = (
        torch.randn(NUM_CLASSES - 1, generator=generator, dtype=torch.float64).sort(descending=True).values
    )
    wrong[0] += 2.0  # a best wrong answer that stands out
    probability = torch.linspace(0.01, 0.99, NUM_TOKENS, dtype=torch.float64)
    target = torch.logit(probability) + wrong.logsumexp(0)
    rows = torch.cat([target.unsqueeze(-1), wrong.expand(NUM_TOKENS, -1)], -1)
    return rows.unsqueeze(0), torch.full((1, NUM_TOKENS), TARGET)


def gradients(loss: Loss) -> Tensor:
    """[N, V] of the loss of every token."""
    logits, targets = tokens()
    logits.requires_grad_()
    return torch.autograd.grad(loss(logits, targets), logits)[0].squeeze(0)


# ── the picture ───────────────────────────────────────────────────────────────────────────────────

WIDTH, HEIGHT, GAP, TOP, COLUMNS = 200, 130, 26, 40, 4
LIMIT = 1.5
BLUE, ORANGE = "#3f7ad6", "#e0702a"


def line(values: Tensor, x: float, y: float, style: str) -> str:
    points = " ".join(
        f"{x + WIDTH * k / (len(values) - 1):.1f},{y + HEIGHT * (LIMIT - value) / (2 * LIMIT):.1f}"
        for k, value in enumerate(values.clamp(-LIMIT, LIMIT).tolist())
    )
    return f'<polyline points="{points}" fill="none" {style}/>'


def panel(name: str, loss: Loss, plain: Tensor, x: float, y: float) -> str:
    found = gradients(loss)
    faint = 'stroke="currentColor" stroke-opacity=".3"'
    dashed, thick = 'stroke-opacity=".55" stroke-dasharray="3 3"', 'stroke-width="2.2"'
    return "\n".join(
        [
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="none" {faint}/>',
            f'<path d="M{x} {y + HEIGHT / 2}h{WIDTH}" {faint}/>',
            f'<text x="{x}" y="{y - 7}">{name}</text>',
            line(plain[:, TARGET], x, y, f'stroke="{BLUE}" {dashed}'),
            line(plain[:, BEST_WRONG], x, y, f'stroke="{ORANGE}" {dashed}'),
            line(found[:, TARGET], x, y, f'stroke="{BLUE}" {thick}'),
            line(found[:, BEST_WRONG], x, y, f'stroke="{ORANGE}" {thick}'),
        ]
    )


def key(x: float, style: str, text: str) -> str:
    """A line of the key, and what it stands for."""
    return f'<path d="M{x} 20h24" {style}/><text x="{x + 30}" y="25">{text}</text>'


HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"
 aria-labelledby="gradients-title" font-family="system-ui, sans-serif" font-size="14" fill="currentColor">
<title id="gradients-title">The gradient of every loss with respect to the target's logit and the best wrong
 answer's, over the target's probability.</title>
<style id="alone">svg { color: #24292f; background: #fff }
@media (prefers-color-scheme: dark) { svg { color: #e6edf3; background: #0d1117 } }</style>
"""


def picture() -> str:
    plain = gradients(cross_entropy())
    rows = -(-len(LOSSES) // COLUMNS)
    width, height = COLUMNS * (WIDTH + GAP) + 40, TOP + rows * (HEIGHT + 44) + 10
    across = "plain cross-entropy; across: the target's probability, 0 to 1"
    keys = [
        key(36, f'stroke="{BLUE}" stroke-width="2.2"', "∂L/∂z of the target"),
        key(226, f'stroke="{ORANGE}" stroke-width="2.2"', "of the best wrong answer"),
        key(456, 'stroke="currentColor" stroke-dasharray="3 3"', across),
    ]
    labels = [
        f'<text x="32" y="{TOP + 20 + place}" font-size="11" text-anchor="end">{label}</text>'
        for place, label in ((8, f"{LIMIT}"), (HEIGHT / 2 + 4, "0"), (HEIGHT, f"−{LIMIT}"))
    ]
    panels = [
        panel(name, loss, plain, 36 + (k % COLUMNS) * (WIDTH + GAP), TOP + 20 + k // COLUMNS * (HEIGHT + 44))
        for k, (name, loss) in enumerate(LOSSES.items())
    ]
    head = HEAD.replace("{width}", f"{width}").replace("{height}", f"{height}")
    return head + "\n".join([*keys, *labels, *panels]) + "\n</svg>\n"


if __name__ == "__main__":
    OUTPUT.write_text(picture(), encoding="utf-8")
    print(OUTPUT)
