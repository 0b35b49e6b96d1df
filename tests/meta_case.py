"""Steps over a linear head on meta tensors, which have a shape and no memory, as a GPU would make them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import lossmith
from linear_case import Ledger


def launches() -> ModuleType:
    """``benchmarks/launches.py``."""
    if "launches" not in sys.modules:
        place = Path(__file__).parents[1] / "benchmarks" / "launches.py"
        spec = importlib.util.spec_from_file_location("launches", place)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["launches"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["launches"])
    return sys.modules["launches"]


def head(
    shape: tuple[int, int, int], *dtypes: torch.dtype, bias: bool = False, device: str = "meta"
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states [N, D], weight [V, D], bias [V] and targets [N], half of them ignored.

    Args:
        shape: N, V, D.
        dtypes: of the hidden states, and of the weight if it is another.
    """
    num_tokens, num_classes, size = shape
    rng = None if device == "meta" else torch.Generator().manual_seed(0)
    hidden, weight, b = (
        torch.randn(*of, generator=rng, device=device).to(dtype).requires_grad_()
        for of, dtype in (
            ((num_tokens, size), dtypes[0]),
            ((num_classes, size), dtypes[-1]),
            ((num_classes,), dtypes[-1]),
        )
    )
    targets = torch.zeros(num_tokens, dtype=torch.long, device=device)
    targets[::2] = -100
    return hidden, weight, b if bias else None, targets


def step(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **options: Any
) -> tuple[lossmith.Plan, int, Ledger]:
    """A step of cross-entropy over a head: what was planned, the most memory besides inputs and gradients,
    and all that was counted."""
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    plan = lossmith.linear_cross_entropy.explain(hidden, weight, targets, bias=bias, **options)
    with launches().kernels(), Ledger(*leaves, targets) as ledger:
        lossmith.linear_cross_entropy(hidden, weight, targets, bias=bias, **options).backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]
    return plan, ledger.peak - sum(g.nbytes for g in gradients), ledger
