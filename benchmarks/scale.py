"""What a head costs each of many ranks, from the plan that would run there.

    python benchmarks/scale.py    # writes the tables of docs/scale.md

A step of a global batch of tokens is split in one of four ways. Memory is what the head takes of a rank: its
weight and hidden states, the gradients of both, and ``Plan.peak_bytes`` besides. Sent is what a rank passes
to collectives. Nothing is computed: tensors are on the meta device, whose plans are those of an accelerator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import lossmith

V, D, N = 262144, 8192, 2**19
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- scale -->", "<!-- end of scale -->"
GATHERED = 3  # numbers of a token that cross-entropy gathers from each rank, in fp64


@dataclass(frozen=True)
class Cost:
    """What a step costs each rank.

    Attributes:
        plan: how the rank sweeps its part.
        weight_bytes: of the head's weight, between steps.
        memory_bytes: at the peak of the loss, the weight included.
        sent_bytes: tensors that it passes to collectives, each once.
    """

    plan: lossmith.Plan
    weight_bytes: int
    memory_bytes: int
    sent_bytes: int


def plan_of(
    num_tokens: int, num_classes: int, size: int, dtype: torch.dtype, device: str, strategy: str
) -> lossmith.Plan:
    """The plan of a rank that has these."""
    hidden = torch.empty(num_tokens, size, dtype=dtype, device=device).requires_grad_()
    weight = torch.empty(num_classes, size, dtype=dtype, device=device).requires_grad_()
    targets = torch.zeros(num_tokens, dtype=torch.long, device=device)
    return lossmith.linear_cross_entropy.explain(hidden, weight, targets, strategy=strategy)


def cost(
    split: str,
    ranks: int,
    num_tokens: int = N,
    num_classes: int = V,
    size: int = D,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "meta",
) -> Cost:
    """What a step of cross-entropy costs each of so many ranks.

    Args:
        split: ``replicated``: each rank has some rows of the batch and the whole weight (DDP). ``sequence``:
            some positions of every row, and the whole weight. ``gathered``: as ``replicated``, but the weight
            is in parts between steps and gathered for the loss (FSDP, ZeRO-3). ``vocabulary``: all tokens,
            and some rows of the weight.
        ranks: how many.
        num_tokens, num_classes, size, dtype, device: of the whole step.
    """
    itemsize = dtype.itemsize
    by_class = split == "vocabulary"
    own_tokens = num_tokens if by_class else -(-num_tokens // ranks)
    own_classes = -(-num_classes // ranks) if by_class else num_classes
    strategy = "two_sweep" if by_class and ranks > 1 else "one_sweep"
    plan = plan_of(own_tokens, own_classes, size, dtype, device, strategy)
    weight, hidden = own_classes * size * itemsize, own_tokens * size * itemsize
    memory, sent, kept = 2 * weight + 2 * hidden + plan.peak_bytes, 0, weight
    if ranks > 1:
        if by_class:
            statistics = num_tokens * GATHERED * 8
            memory += ranks * statistics
            sent = statistics + hidden
        elif split == "gathered":
            kept = -(-weight // ranks)
            memory += 2 * kept  # its part of the weight, and of the gradient
            sent = kept + weight  # its part to all, and a whole gradient of which each keeps a part
        else:
            sent = weight
            if split == "sequence":  # the targets are gathered, too, and shifted and counted as whole rows
                numbers = (GATHERED + 1) * 8
                memory += num_tokens * numbers
                sent += own_tokens * numbers
    return Cost(plan, kept, memory, sent)


# ── the page ──────────────────────────────────────────────────────────────────────────────────────

SPLITS = {
    "replicated": "Batch split, weight replicated (DistributedDataParallel)",
    "sequence": "Sequence split, weight replicated",
    "gathered": "Batch split, weight gathered for the loss (FSDP2, ZeRO-3)",
    "vocabulary": "Vocabulary split",
}


def table(split: str) -> Iterator[str]:
    """The costs of a split, in Markdown."""
    head = ("ranks", "tokens", "classes", "sweep", "chunks", "PFLOP", "weight kept", "peak", "sent")
    yield f"| {' | '.join(head)} |"
    yield f"|{' ---: |' * len(head)}"
    for ranks in RANKS:
        found = cost(split, ranks)
        plan = found.plan
        cells = (
            *(ranks, f"{plan.num_tokens:,}", f"{plan.num_classes:,}"),
            *({"one_sweep": 1, "two_sweep": 2}[plan.strategy], plan.num_chunks),
            f"{plan.num_flops / 1e15:.3g}",
            *(f"{size / 2**30:.3g}" for size in (found.weight_bytes, found.memory_bytes, found.sent_bytes)),
        )
        yield f"| {' | '.join(map(str, cells))} |"


def tables() -> str:
    """All of them."""
    return "\n\n".join(f"### {title}\n\n" + "\n".join(table(split)) for split, title in SPLITS.items())


def page_with_tables(page: str) -> str:
    """The page with the tables in their place."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text()))
