"""Batches and options at random, and what every objective promises of them: a result, or a clear error.

A case is a string of bytes, one for each choice, and zero is the simplest of each: hypothesis draws the
bytes of several cases at once, which costs it little, and shrinks them to one case with few options and a
small batch.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, note, settings

# What tests of it are given; the profile `random` has five times as many.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 5000 if settings.default.derandomize else 25000))
CASES = 10  # are drawn at once
BYTES = 96  # are enough for the choices of a case

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


class Choices:
    """The choices of a case, in the order in which they are made."""

    def __init__(self, drawn: bytes) -> None:
        self._drawn = iter(drawn)

    def share(self) -> float:
        """From 0 to 1."""
        return next(self._drawn) / 255

    def of(self, given: Sequence[Any]) -> Any:
        """One of them."""
        return given[next(self._drawn) % len(given)]

    def happens(self, share: float) -> bool:
        """Whether what happens this often does."""
        return next(self._drawn) >= 256 * (1 - share)

    def seed(self) -> int:
        """For what is not chosen one by one."""
        return next(self._drawn) << 16 | next(self._drawn) << 8 | next(self._drawn)


# Makes an argument of a test.
Chosen = Callable[[Choices], Any]


def fuzz(share: int = 1, **arguments: Chosen) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on this part of ``EXAMPLES``, with these arguments; the others are fixtures."""

    def run_on_cases(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(drawn: bytes, **fixtures: Any) -> None:
            for start in range(0, len(drawn), BYTES):
                choices = Choices(drawn[start : start + BYTES])
                case = {name: choose(choices) for name, choose in arguments.items()}
                try:
                    test(**fixtures, **case)
                except BaseException:
                    note(f"the case: {case}")
                    raise

        fixtures = [name for name in inspect.signature(test).parameters if name not in arguments]
        only = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter(name, only) for name in (*fixtures, "drawn")]
        run.__signature__ = inspect.Signature(parameters)
        cases = st.binary(min_size=BYTES * CASES, max_size=BYTES * CASES)
        return settings(max_examples=-(-EXAMPLES // share // CASES))(given(drawn=cases)(run))

    return run_on_cases


def one_of(*given: Any) -> Chosen:
    """One of these."""
    return lambda choices: choices.of(given)


SIZES = (1, 2, 3, 7, 40)
SHAPES = ((1, 1), (1, 4), (3, 1), (2, 5), (4, 3), (7,), (1,), (2, 1, 3))


def batches(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    sizes: Sequence[int] = SIZES,
    kinds: Sequence[str] = VALUES + SPOILT,
) -> Chosen:
    """Batches [..., C] of some kinds of values."""
    return lambda choices: _batch(choices, choices.of(shapes), choices.of(sizes), choices.of(kinds))


def _batch(choices: Choices, shape: tuple[int, ...], size: int, kind: str) -> Batch:
    dtype, rng = choices.of(DTYPES), torch.Generator().manual_seed(choices.seed())
    ids, shift = choices.of(IDS), choices.of([0, 0, 1, 2])
    ignored = choices.of([-100, -1, 0, size - 1, 255])
    ignored = 255 if ids == torch.uint8 and ignored < 0 else ignored
    targets = torch.randint(size, shape, generator=rng)
    targets = targets.masked_fill(_masked(choices.of(MASKS), shape, rng), ignored).to(ids)
    values = _values(kind, size, predicted(targets.long(), ignored, shift), ignored, rng).to(dtype)
    leaf, view = _laid_out(choices.of(LAYOUTS), values)
    further = {
        "mask": lambda: torch.rand(shape, generator=rng) < 0.7,
        "token_weight": lambda: torch.rand(shape, generator=rng) * choices.of([0.0, 1.0, 30.0]),
        "input_ids": lambda: torch.randint(size, shape, generator=rng),
        "segment_ids": lambda: torch.randint(2, shape, generator=rng).sort(-1).values,
    }
    others = {name: make() for name, make in further.items() if choices.happens(0.3)}
    return Batch(leaf, view, targets, {"ignore_index": ignored, "shift": shift}, others, kind in SPOILT)


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


def options(**given: Sequence[Any]) -> Chosen:
    """Some of the options, each with one of its values; now and then one with a value that is refused."""
    to_refuse = [name for name in given if name in REFUSED]

    def choose(choices: Choices) -> dict[str, Any]:
        share = choices.share()  # a few of them, or most
        found = {name: choices.of(values) for name, values in given.items() if choices.happens(share)}
        if to_refuse and choices.happens(0.1):
            name = choices.of(to_refuse)
            found[name] = choices.of(REFUSED[name])
        return found

    return choose


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
