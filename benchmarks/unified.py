"""UnifiedLoss on given logits, all on that needs only logits, against cross-entropy; the candidate search.

    python benchmarks/unified.py [--rounds 15] [--device cpu] [--csv FILE]

``naive`` writes the same loss down over the whole vocabulary, with the n-gram search in PyTorch operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import lossmith
from harness import Step, against_first, options, over_dtypes, write_csv
from lossmith.equation.batch import align
from lossmith.terms.candidates import early_eos_candidates, immediate_candidates, ngram_candidates

BATCH, LENGTH, NUM_CLASSES, EOS = 8, 128, 50257, 50256
OPTIONS = {
    "label_smoothing": 0.1,
    "z_loss": 1e-4,
    "use_ngram_penalty": True,
    "use_immediate_repetition_penalty": True,
    "eos_token_id": EOS,
    "use_focal_loss": True,
    "use_auxiliary_loss": True,
}
# The search alone: [B, T], as long as a training batch has it.
SEARCH = (8, 1024)


def plain(logits: Tensor, targets: Tensor, input_ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def all_candidates(targets: Tensor, input_ids: Tensor) -> list[tuple[float, Tensor]]:
    batch = align(targets, input_ids=input_ids)
    return [
        (0.1, ngram_candidates(batch, ngram_size=4, window=50)),
        (0.5, immediate_candidates(batch, threshold=2)),
        (0.05, early_eos_candidates(batch, eos_token_id=EOS, min_length=20)),
    ]


def naive(logits: Tensor, targets: Tensor, input_ids: Tensor) -> Tensor:
    """The same, each loss over the vocabulary for itself."""
    z, y = logits.flatten(0, 1), targets.flatten()
    loss = F.cross_entropy(z, y, label_smoothing=0.1) + 1e-4 * z.logsumexp(-1).square().mean()
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    p_y = p.gather(1, y[:, None]).squeeze(1)
    loss = loss + 0.2 * ((1 - p_y) ** 2 * -log_p.gather(1, y[:, None]).squeeze(1)).mean()
    loss = loss + 0.1 * (p * log_p).sum(-1).mean()
    for weight, ids in all_candidates(targets, input_ids):
        at = p.gather(1, ids.clamp(min=0))
        loss = loss - weight * torch.where(ids >= 0, torch.log1p(-at), 0.0).sum() / len(y)
    return loss


CONTENDERS = {
    "F.cross_entropy": plain,
    "naive, all": naive,
    "lossmith.UnifiedLoss": lossmith.UnifiedLoss(NUM_CLASSES),
    "lossmith.UnifiedLoss, all": lossmith.UnifiedLoss(NUM_CLASSES, **OPTIONS),
    "lossmith.UnifiedLoss, all, T=1.1": lossmith.UnifiedLoss(NUM_CLASSES, initial_temperature=1.1, **OPTIONS),
    "lossmith.NVAMPLoss": lossmith.NVAMPLoss(),
}


def make_step(name: str, dtype: str, device: str) -> Step:
    """One forward and backward of a contender on fixed random logits of a repetitive text."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, LENGTH, NUM_CLASSES, generator=generator)
    text = torch.randint(20, (BATCH, LENGTH + 1), generator=generator).to(device)
    logits = logits.to(device, getattr(torch, dtype)).requires_grad_()
    loss = CONTENDERS[name]

    def step() -> None:
        logits.grad = None
        if isinstance(loss, lossmith.NVAMPLoss):
            loss(logits, text[:, 1:]).backward()
        else:
            loss(logits, text[:, 1:], input_ids=text[:, :-1]).backward()

    return step


def make_search(name: str, device: str) -> Step:
    """The n-gram search (n = 4, w = 50), or cross-entropy on as many tokens."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(20, (SEARCH[0], SEARCH[1] + 1), generator=generator).to(device)
    if name == "n-gram search":
        batch = align(text[:, 1:], input_ids=text[:, :-1])
        return lambda: ngram_candidates(batch, ngram_size=4, window=50)
    logits = torch.randn(SEARCH[0] * SEARCH[1], NUM_CLASSES, generator=generator).to(device).requires_grad_()

    def step() -> None:
        logits.grad = None
        F.cross_entropy(logits, text[:, 1:].flatten()).backward()

    return step


def main() -> None:
    chosen = options(__doc__.splitlines()[0])
    rows = over_dtypes([BATCH, LENGTH, NUM_CLASSES], CONTENDERS, make_step, chosen)
    title = f"tokens {list(SEARCH)}, V={NUM_CLASSES}; the search, for n=4 and w=50, forward alone"
    few = max(3, chosen.rounds // 3)
    found = against_first(
        title,
        ("F.cross_entropy", "n-gram search"),
        make_search,
        chosen.device,
        rounds=few,
        device=chosen.device,
    )
    rows += [[f"search {list(SEARCH)}", *row] for row in found]
    write_csv(chosen, ["case", "name", "ms", "x_f_cross_entropy", "extra_mib"], rows)


if __name__ == "__main__":
    main()
