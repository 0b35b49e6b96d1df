"""What the components of a loss should cost, by definition: loops over tokens, pairs and experts.

Nothing here imports lossmith.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE = -100

Sets = list[list[set[int]]]  # ids of each position of each row


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def scale_of(targets: Tensor, reduction: str = "mean") -> Tensor:
    """[B, T] what the loss of each token is multiplied by."""
    valid = (targets != IGNORE).double()
    return valid if reduction == "sum" else valid / valid.sum()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.norm() * b.norm())


# ── confidence ────────────────────────────────────────────────────────────────────────────────────


def confidence_weight(c: Tensor, tau: float = 0.7, low: float = 0.5, high: float = 1.5) -> Tensor:
    """Linear from (0, low) to (tau, 1) to (1, high)."""
    return torch.where(c <= tau, low + (1 - low) * c / tau, 1 + (high - 1) * (c - tau) / (1 - tau))


def calibration(logits: Tensor, targets: Tensor, scores: Tensor) -> Tensor:
    """[B, T] binary cross-entropy of the scores against "the most likely token is the target"."""
    return -torch.where(logits.argmax(-1) == targets, scores.log(), (1 - scores).log())


# ── tokens further ahead ──────────────────────────────────────────────────────────────────────────


def further_ahead(
    heads: Sequence[Tensor],
    targets: Tensor,
    scale: Tensor,
    segments: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """1/K sum_k sum_t scale[t+k] w[t] nll of y[t+k] under head k at t."""
    num_rows, length = targets.shape
    total = zero()
    for k, logits in enumerate(heads, start=1):
        log_p = logits.log_softmax(-1)
        for b in range(num_rows):
            for t in range(length - k):
                y = targets[b, t + k]
                together = segments is None or segments[b, t] == segments[b, t + k]
                if y != IGNORE and together:
                    w = 1.0 if weight is None else weight[b, t]
                    total = total - w * scale[b, t + k] * log_p[b, t, y]
    return total / len(heads)


# ── what should not come next ─────────────────────────────────────────────────────────────────────


def contexts(targets: Sequence[int], inputs: Sequence[int] | None, ahead: int = 1) -> list[int | None]:
    """x[0..T-1]: what is read at each position, the input or the target ``ahead`` before; None if unknown."""
    if inputs is not None:
        return list(inputs)
    before = [None if y == IGNORE else y for y in targets]
    return [*[None] * ahead, *before][: len(targets)]


def repeating(x: Sequence[int | None], segments: Sequence[int], n: int, w: int) -> list[set[int]]:
    """{ x[j+n-1] : max(0, m-w) <= j <= m-n, x[j..j+n-2] = x[m-n+1..m-1] }, m = t + 1, of each position t."""
    found = []
    for t in range(len(x)):
        m, here = t + 1, set()
        for j in range(max(0, m - w), m - n + 1):
            block, tail = range(j, j + n), range(m - n + 1, m)
            known = all(x[i] is not None for i in (*block, *tail))
            together = all(segments[i] == segments[t] for i in (*block, *tail))
            if known and together and all(x[j + i] == x[m - n + 1 + i] for i in range(n - 1)):
                here.add(x[j + n - 1])
        found.append(here)
    return found


def repeated(x: Sequence[int | None], segments: Sequence[int], threshold: int) -> list[set[int]]:
    """{ x[t] } where ``threshold`` equal tokens end at t."""
    found = []
    for t in range(len(x)):
        run = range(t - threshold + 1, t + 1)
        is_run = run[0] >= 0 and all(
            x[i] is not None and x[i] == x[t] and segments[i] == segments[t] for i in run
        )
        found.append({x[t]} if is_run else set())
    return found


def too_early(targets: Sequence[int], segments: Sequence[int], eos: int, length: int) -> list[set[int]]:
    """{ eos } before so many supervised tokens of the document."""
    found = []
    for t in range(len(targets)):
        start = t
        while start > 0 and segments[start - 1] == segments[t]:
            start -= 1
        found.append({eos} if sum(y != IGNORE for y in targets[start:t]) < length else set())
    return found


def without_targets(sets: list[set[int]], targets: Sequence[int]) -> list[set[int]]:
    """The sets without the target, and none where there is no target."""
    return [set() if y == IGNORE else found - {y} for found, y in zip(sets, targets, strict=True)]


def unlikelihood(logits: Tensor, scale: Tensor, sets: Sets) -> Tensor:
    """sum_t scale[t] sum over c in C[t] of -log(1 - p_c)."""
    p, total = logits.softmax(-1), zero()
    for b, row in enumerate(sets):
        for t, ids in enumerate(row):
            for c in ids:
                total = total - scale[b, t] * (1 - p[b, t, c]).log()
    return total


# ── routers and experts ───────────────────────────────────────────────────────────────────────────


def balance(
    z: Tensor, indices: Sequence[Sequence[int]], pi: Sequence[float], mask: Tensor | None = None
) -> Tensor:
    """sum_e f_e P_e / pi_e of z [N, E] and the experts that each token chose."""
    tokens = [t for t in range(len(z)) if mask is None or mask.reshape(-1)[t]]
    k = len(indices[0])
    loss = zero()
    for e in range(z.shape[-1]):
        f = sum(int(c) == e for t in tokens for c in indices[t]) / (len(tokens) * k)
        p = sum(z[t, e].exp() / sum(z[t, i].exp() for i in range(z.shape[-1])) for t in tokens) / len(tokens)
        loss = loss + f * p / pi[e]
    return loss


def top_experts(z: Tensor, k: int) -> list[list[int]]:
    return [sorted(range(z.shape[-1]), key=lambda e: -row[e].item())[:k] for row in z]


def router_z(z: Tensor) -> Tensor:
    """mean_t logsumexp(z_t)^2 of z [..., E]."""
    return (z.exp().sum(-1).log() ** 2).mean()


def diversity(outputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean_t 2 / (E (E - 1)) sum_{i < j} cos(o_ti, o_tj)^2 of outputs [..., E, D]."""
    rows = outputs.reshape(-1, *outputs.shape[-2:])
    tokens = [t for t in range(len(rows)) if mask is None or mask.reshape(-1)[t]]
    total = zero()
    for t in tokens:
        found = [cosine(a, b) for i, a in enumerate(rows[t]) for j, b in enumerate(rows[t]) if i < j]
        total = total + sum(c**2 for c in found) / len(found) / len(tokens)
    return total


# ── contrast ──────────────────────────────────────────────────────────────────────────────────────


def info_nce(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """-1/2B sum_i ( log softmax_j(s_ij)[i] + log softmax_j(s_ji)[i] ), s of cosines."""
    loss = zero()
    for first, second in ((a, b), (b, a)):
        for i in range(len(first)):
            scores = [(cosine(first[i], second[j]) / temperature).exp() for j in range(len(second))]
            loss = loss - (scores[i] / sum(scores)).log() / (2 * len(first))
    return loss


def token_contrast(hidden: Tensor, margin: float, mask: Tensor | None = None) -> Tensor:
    """mean over rows of mean over ordered pairs i != j of max(0, margin - cos_ii + cos_ij)."""
    rows = []
    for b in range(len(hidden)):
        tokens = [t for t in range(hidden.shape[1]) if mask is None or mask[b, t]]
        pairs = [(i, j) for i in tokens for j in tokens if i != j]
        if pairs:
            costs = [torch.relu(margin - 1 + cosine(hidden[b, i], hidden[b, j])) for i, j in pairs]
            rows.append(sum(costs) / len(pairs))
    return sum(rows) / len(rows)
