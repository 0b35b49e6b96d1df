"""Batches and options at random, and what every objective promises of them: a result, or a clear error.

A case is a handful of numbers and names that hypothesis draws, and a seed from which PyTorch draws the rest,
so that a case costs about a millisecond and still shrinks to few and simple ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import settings

# What tests of it are given; the profile `random` has five times as many.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 5000 if settings.default.derandomize else 25000))

INF = float("inf")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
IDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
VALUES = ("normal", "flat", "large", "offset", "some -inf", "a row of -inf", "certain")
SPOILT = ("nan", "inf", "-inf at a target")
LAYOUTS = ("as it is", "transposed", "every second", "part of more", "expanded")
MASKS = ("none", "some", "all", "first of each row", "alternating")


@dataclass(frozen=True)
class Batch:
    """Logits-like numbers [..., C] and targets [...], as drawn.

    Attributes:
        leaf: what the gradient is asked of.
        values: a view of it, in some layout.
        targets: ids, some of them to be ignored.
        how: the options ``ignore_index`` and ``shift`` that go with them.
        others: further inputs.
        is_spoilt: whether what the values hold has no finite loss.
    """

    leaf: torch.Tensor
    values: torch.Tensor
    targets: torch.Tensor
    how: dict[str, int]
    others: dict[str, torch.Tensor]
    is_spoilt: bool


SHAPES = st.sampled_from([(1, 1), (1, 4), (3, 1), (2, 5), (4, 3), (7,), (1,), (2, 1, 3)])


@st.composite
def batches(
    draw: Any, shapes: Any = SHAPES, sizes: Any = (1, 2, 3, 7, 40), kinds: Any = VALUES + SPOILT
) -> Batch:
    """Batches [..., C] of some kinds of values."""
    shape, size = draw(shapes), draw(st.sampled_from(sizes))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype, ids = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(IDS))
    kind, shift = draw(st.sampled_from(kinds)), draw(st.sampled_from([0, 0, 1, 2]))
    ignored = draw(st.sampled_from([-100, -1, 0, size - 1, 255]))
    ignored = 255 if ids == torch.uint8 and ignored < 0 else ignored
    targets = torch.randint(size, shape, generator=rng)
    targets = targets.masked_fill(_masked(draw(st.sampled_from(MASKS)), shape, rng), ignored).to(ids)
    values = _values(kind, size, predicted(targets.long(), ignored, shift), ignored, rng).to(dtype)
    leaf, view = _laid_out(draw(st.sampled_from(LAYOUTS)), values)
    others = {
        "mask": torch.rand(shape, generator=rng) < 0.7,
        "token_weight": torch.rand(shape, generator=rng) * draw(st.sampled_from([0.0, 1.0, 30.0])),
        "input_ids": torch.randint(size, shape, generator=rng),
        "segment_ids": torch.randint(2, shape, generator=rng).sort(-1).values,
    }
    wanted = draw(st.sets(st.sampled_from(sorted(others)), max_size=2))
    given = {n: others[n] for n in sorted(wanted)}
    return Batch(leaf, view, targets, {"ignore_index": ignored, "shift": shift}, given, kind in SPOILT)


def predicted(targets: torch.Tensor, ignored: int, shift: int) -> torch.Tensor:
    """What each position predicts."""
    if not shift:
        return targets
    moved = torch.full_like(targets, ignored)
    moved[..., :-shift] = targets[..., shift:]
    return moved


def _masked(kind: str, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    masked = torch.zeros(shape, dtype=torch.bool)
    if kind == "some":
        return torch.rand(shape, generator=rng) < 0.3
    if kind == "first of each row":
        masked[..., 0] = True
    elif kind == "alternating":
        masked[..., ::2] = True
    return masked | (kind == "all")


def _values(kind: str, size: int, targets: torch.Tensor, ignored: int, rng: torch.Generator) -> torch.Tensor:
    shape = (*targets.shape, size)
    values = torch.randn(shape, generator=rng)
    valid = targets != ignored
    at = targets.clamp(0, size - 1).unsqueeze(-1)
    if kind == "flat":
        values.zero_()
    elif kind in ("large", "offset"):
        values = values * 300 if kind == "large" else values + 3e4
    elif kind in ("some -inf", "a row of -inf"):
        hidden = torch.rand(shape, generator=rng) < (0.4 if kind == "some -inf" else 2)
        values = values.masked_fill(hidden.scatter(-1, at, False), -INF)  # the target's logit stays
    elif kind == "certain":
        values.scatter_(-1, at, 60.0)
    elif kind in ("nan", "inf"):
        values[torch.rand(shape, generator=rng) < 0.3] = torch.nan if kind == "nan" else INF
    elif kind == "-inf at a target":
        values.scatter_(-1, at, -INF)
    spoilt = torch.tensor([torch.nan, INF, -INF])[torch.randint(3, shape, generator=rng)]
    return torch.where(valid.unsqueeze(-1), values, spoilt)  # what is ignored may be anything


def _laid_out(layout: str, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A leaf with a gradient, and a view of it that equals ``values``."""
    if layout == "transposed" and values.dim() > 1:
        leaf = values.transpose(0, -1).contiguous().requires_grad_()
        return leaf, leaf.transpose(0, -1)
    if layout == "every second":
        leaf = values.repeat_interleave(2, -1).requires_grad_()
        return leaf, leaf[..., ::2]
    if layout == "part of more":
        leaf = torch.cat([values, values], -1).requires_grad_()
        return leaf, leaf[..., : values.shape[-1]]
    if layout == "expanded":
        leaf = values.clone().requires_grad_()
        return leaf, leaf.unsqueeze(0).expand(1, *values.shape)[0]
    leaf = values.clone().requires_grad_()
    return leaf, leaf


def options(**choices: Any) -> Any:
    """Some of the options, each with one of its values."""
    return st.fixed_dictionaries(
        {}, optional={name: st.sampled_from(given) for name, given in choices.items()}
    )


def judged(make: Callable[[], torch.Tensor], batch: Batch, *more: torch.Tensor) -> str:
    """What came of a case: ``refused``, with a message; ``spoilt``, which only what has no finite loss may
    be; or ``finite``, and so are its gradients.

    Args:
        make: computes the result.
        batch: what of; ``more`` are further tensors with a gradient.
    """
    try:
        result = make()
    except (TypeError, ValueError) as error:
        return "refused" if len(str(error)) > 20 else "refused without a word"
    if not result.isfinite().all():
        assert batch.is_spoilt, f"{result} of a batch whose loss is finite"
        return "spoilt"
    leaves = [leaf for leaf in (batch.leaf, *more) if leaf.requires_grad]
    found = torch.autograd.grad(result.sum(), leaves, allow_unused=True) if result.requires_grad else ()
    for gradient in found:
        assert gradient is None or batch.is_spoilt or gradient.isfinite().all(), f"gradient {gradient}"
    return "finite"
