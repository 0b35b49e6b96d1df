"""Heads, and a loss over one against the same loss of its logits, with gradients from a random upstream."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

IGNORE, B, T, D, V = -100, 3, 5, 4, 7
STRATEGIES = ("auto", "two_sweep")
# rows of logits held at a time; None is the default, all of them
ROWS = (1, 3, None)


@dataclass
class Head:
    """Leaves that require gradients."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Those that there are."""
        return tuple(x for x in (self.hidden, self.weight, self.bias) if x is not None)

    def logits(self) -> Tensor:
        return functional.linear(self.hidden, self.weight, self.bias)

    def to(self, dtype: torch.dtype) -> Head:
        """The same numbers, new leaves."""
        return Head(
            *(
                None if x is None else x.detach().to(dtype).requires_grad_()
                for x in (self.hidden, self.weight, self.bias)
            )
        )

    def budget(self, rows: int | None) -> int | None:
        """Bytes that this many rows of logits take."""
        return None if rows is None else rows * self.weight.shape[0] * self.weight.element_size()

    def inputs(self, rows: int | None = None, strategy: str = "auto") -> dict[str, Any]:
        """What objectives take in place of logits."""
        return {
            "hidden_states": self.hidden,
            "lm_head_weight": self.weight,
            "lm_head_bias": self.bias,
            "strategy": strategy,
            "memory_budget": self.budget(rows),
        }


def head(
    *lead: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    size: int = D,
    num_classes: int = V,
    bias: bool = True,
) -> Head:
    """A random head; ``lead`` is the shape of the tokens, [B, T] if not given."""
    rng = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((*(lead or (B, T)), size), (num_classes, size), (num_classes,))
    ]
    return Head(*(made if bias else made[:2]))


def targets(*lead: int, seed: int = 0, num_classes: int = V) -> Tensor:
    """Random ids; in a batch [B, T] some are ignored, and the last sample has none."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(num_classes, lead or (B, T), generator=rng)
    if ids.dim() == 2 and len(ids) > 1:
        ids[0, ::2], ids[-1] = IGNORE, IGNORE
    return ids


def gradients(value: Tensor, of: Head, seed: int = 1, **options: Any) -> list[Tensor]:
    """Gradients from a random upstream; zeros where the value does not depend on a leaf."""
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    leaves = [leaf for leaf in of.leaves if leaf.requires_grad]
    found = torch.autograd.grad(value, leaves, upstream.to(value.dtype), allow_unused=True, **options)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def assert_same(
    ours: Callable[[Head], Tensor], theirs: Callable[[Tensor], Tensor], of: Head, **tolerance: float
) -> None:
    """``ours(head)`` and ``theirs(logits)`` are equal to rounding, and so are the gradients."""
    tolerance = tolerance or {"rtol": 1e-11, "atol": 1e-12}
    value, expected = ours(of), theirs(of.logits())
    torch.testing.assert_close(value, expected, **tolerance)
    torch.testing.assert_close(gradients(value, of), gradients(expected, of), **tolerance)


class LargestTensor(TorchDispatchMode):
    """The most elements, and the most bytes, that any operator's result has memory for."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in _tensors(result):
            nbytes = x.untyped_storage().nbytes()
            self.nbytes = max(self.nbytes, nbytes)
            self.numel = max(self.numel, nbytes // x.element_size())
        return result


def _tensors(result: Any) -> Iterator[Tensor]:
    yield from (x for x in tree_leaves(result) if isinstance(x, Tensor))


class Ledger(TorchDispatchMode):
    """The memory of what is made inside it, on any device.

    Attributes:
        live, peak: bytes that exist now, and the most that did at once.
        counts: launches by operator; views, and memory that nothing fills, are none.
    """

    def __init__(self, *known: Tensor | None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.counts: Counter[str] = Counter()
        self._seen = {x.untyped_storage()._cdata for x in known if x is not None}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0].removeprefix("aten::")
        is_view = any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)
        if not is_view and "empty" not in name:
            self.counts[name] += 1
        for x in _tensors(result):
            storage = x.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, storage: int, nbytes: int) -> None:
        self._seen.discard(storage)
        self.live -= nbytes
