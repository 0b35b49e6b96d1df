"""Batches and options at random, and what every objective promises of them: a result, or a clear error.

Hypothesis draws shapes, values and dtypes, and seeds for the rest: a case costs a few milliseconds and still
shrinks to a small batch.
"""

from __future__ import annotations

import os
import random
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


SIZES = (1, 2, 3, 7, 40)
SHAPES = st.sampled_from([(1, 1), (1, 4), (3, 1), (2, 5), (4, 3), (7,), (1,), (2, 1, 3)])


# Drawn by hypothesis as one number; numbers of more bits it draws small for the most part.
SEEDS = st.integers(0, 2**24 - 1)


@st.composite
def batches(draw: Any, shapes: Any = SHAPES, sizes: Any = SIZES, kinds: Any = VALUES + SPOILT) -> Batch:
    """Batches [..., C] of some kinds of values."""
    shape, size = draw(shapes), draw(st.sampled_from(sizes))
    kind, dtype = draw(st.sampled_from(kinds)), draw(st.sampled_from(DTYPES))
    chosen = random.Random(draw(SEEDS))
    rng = torch.Generator().manual_seed(chosen.getrandbits(32))
    ids, shift = chosen.choice(IDS), chosen.choice([0, 0, 1, 2])
    ignored = chosen.choice([-100, -1, 0, size - 1, 255])
    ignored = 255 if ids == torch.uint8 and ignored < 0 else ignored
    targets = torch.randint(size, shape, generator=rng)
    targets = targets.masked_fill(_masked(chosen.choice(MASKS), shape, rng), ignored).to(ids)
    values = _values(kind, size, predicted(targets.long(), ignored, shift), ignored, rng).to(dtype)
    leaf, view = _laid_out(chosen.choice(LAYOUTS), values)
    others = {
        "mask": torch.rand(shape, generator=rng) < 0.7,
        "token_weight": torch.rand(shape, generator=rng) * chosen.choice([0.0, 1.0, 30.0]),
        "input_ids": torch.randint(size, shape, generator=rng),
        "segment_ids": torch.randint(2, shape, generator=rng).sort(-1).values,
    }
    given = {name: value for name, value in others.items() if chosen.random() < 0.3}
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


# Values that are refused, by the names of options.
REFUSED = {
    "temperature": (0.0, "1"),
    "softcap": (-1.0,),
    "reduction": ("average",),
    "empty": ("none",),
    "label_smoothing": (1.0,),
    "focal_gamma": (-1.0,),
    "denominator": (0, "7"),
    "memory_budget": (-1,),
    "top_k": (0,),
    "eps": (0.0,),
    "ngram_window_size": (0,),
    "eos_token_id": (-2, 50),
    "num_experts": (0,),
    "margin": (-1.0,),
    "entropy_modifier_direction": ("up",),
    "target_smoothing_factor": (1.5,),
}


def options(**choices: Any) -> Any:
    """Some of the options, each with one of its values; now and then one with a value that is refused."""

    def choose(seed: int) -> dict[str, Any]:
        chosen = random.Random(seed)
        share = chosen.random()  # a few of them, or most
        found = {name: chosen.choice(given) for name, given in choices.items() if chosen.random() < share}
        names = [name for name in choices if name in REFUSED]
        if names and chosen.random() < 0.1:
            name = chosen.choice(names)
            found[name] = chosen.choice(REFUSED[name])
        return found

    return SEEDS.map(choose)


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
    for leaf, gradient in zip(leaves, found, strict=False):
        fits = gradient is None or gradient.isfinite().all()
        assert fits or batch.is_spoilt or _is_beyond_dtype(gradient, leaf, make), f"gradient {gradient}"
    return "finite"


def _is_beyond_dtype(gradient: torch.Tensor, leaf: torch.Tensor, make: Callable[[], torch.Tensor]) -> bool:
    """Whether a gradient is infinite only where its dtype has no such number, as float16 none of 66,000."""
    smaller = torch.autograd.grad(make().sum() / 1024, leaf)[0].double() * 1024
    is_beyond = smaller.abs() > 0.99 * torch.finfo(leaf.dtype).max
    return bool((smaller.isfinite() & (is_beyond | gradient.isfinite())).all())
