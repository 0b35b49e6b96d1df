"""The arithmetic of tokens on a GPU: launches the Triton kernels beside this file, one a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossmith.engine.rows import triton_rows
from lossmith.engine.rows.triton_rows import in_a_row, launch
from lossmith.engine.sweep import Maybe

if TYPE_CHECKING:
    from lossmith.engine.tokens.derivation import Derivation
    from lossmith.engine.tokens.family import FamilyTerms

# How many tokens a program has at a time, and its warps.
TOKENS, WARPS = 128, 4
NUMBERS_OF_A_FAMILY = ("label_smoothing", "focal_gamma", "z_loss", "confidence_penalty")
TOKENS_OF_A_SUM, WARPS_OF_A_SUM = 2048, 8


def takes(like: Tensor, is_asked_for: bool = False) -> bool:
    """Whether numbers like these are computed here."""
    return like.dtype == torch.float32 and triton_rows.takes(like, None, is_asked_for)


def derive(of: Derivation, raw: Sequence[Tensor], derived: Sequence[Tensor]) -> None:
    """Fill in the derived statistics."""
    from lossmith.engine.tokens.triton_derivation import derive as kernel

    _launch(kernel, of, raw, dict(zip(of.names, derived, strict=True)))


def derive_back(of: Derivation, raw: Sequence[Tensor], upstream: Maybe, gradient: Maybe) -> None:
    """Fill in the gradients of the raw statistics."""
    from lossmith.engine.tokens.triton_derivation import derive_back as kernel

    names, values = (*of.names, *of.made_of), (*upstream, *gradient)
    _launch(kernel, of, raw, {f"g_{name}": value for name, value in zip(names, values, strict=True)})


def _launch(kernel: Any, of: Derivation, raw: Sequence[Tensor], given: dict[str, Tensor | None]) -> None:
    num_rows, ids = of.targets.numel(), of.candidates
    arguments: dict[str, Any] = dict.fromkeys(kernel.arg_names)
    arguments |= {name: in_a_row(value) for name, value in zip(of.made_of, raw, strict=True)}
    arguments |= {name: in_a_row(value) for name, value in given.items() if name in arguments}
    arguments |= {
        "num_rows": num_rows,
        "num_candidates": 0 if ids is None else ids.shape[-1],
        "targets": of.targets.contiguous(),
        "ignore_index": of.ignore_index,
        "candidates": in_a_row(ids),
        "SIZE": TOKENS,
    }
    launch(kernel, -(-num_rows // TOKENS), raw[0], arguments, WARPS)


def family(of: FamilyTerms, raw: Sequence[Tensor], values: Tensor) -> None:
    """Fill in the terms [K, N]."""
    from lossmith.engine.tokens.triton_family import family as kernel

    _launch_family(kernel, of, raw, {"values": values})


def family_back(of: FamilyTerms, raw: Sequence[Tensor], upstream: Tensor, gradient: Maybe) -> None:
    """Fill in the gradients of the raw statistics."""
    from lossmith.engine.tokens.triton_family import family_back as kernel

    names = suffixed(of)
    given = {f"g_{name}": one for name, one in zip(names, gradient, strict=True) if one is not None}
    _launch_family(kernel, of, raw, {"upstream": in_a_row(upstream), **given})


def suffixed(of: FamilyTerms) -> list[str]:
    """The raw statistics as the kernels call them."""
    first, second = of.made_of
    return [*first, *(f"{name}_2" for name in second)]


def switches_of(of: FamilyTerms) -> dict[str, bool]:
    """What the kernels are compiled for; numbers are not among it."""
    family = of.family
    return {
        "HAS_SMOOTHING": family.label_smoothing != 0,
        "EXCLUDES_TARGET": family.excludes_target,
        "HAS_FOCAL": family.focal_gamma != 0,
        "HAS_Z": family.z_loss != 0,
        "HAS_PENALTY": family.confidence_penalty != 0,
        "HAS_SECOND": bool(of.made_of[1]),
    }


def _launch_family(kernel: Any, of: FamilyTerms, raw: Sequence[Tensor], given: dict[str, Any]) -> None:
    family, num_rows = of.family, of.targets.numel()
    numbers = {name: getattr(family, name) for name in NUMBERS_OF_A_FAMILY}
    arguments: dict[str, Any] = dict.fromkeys(kernel.arg_names)
    arguments |= {name: in_a_row(value) for name, value in zip(suffixed(of), raw, strict=True)}
    arguments |= {
        "num_rows": num_rows,
        "targets": of.targets.contiguous(),
        "ignore_index": of.ignore_index,
        "target_class_weight": in_a_row(of.target_weight),
        **{name: float(value) for name, value in numbers.items()},
        **given,
        **switches_of(of),
        "SIZE": TOKENS,
    }
    launch(kernel, -(-num_rows // TOKENS), raw[0], arguments, WARPS)


def weigh(
    values: Sequence[Tensor], scale: Tensor, weight: Tensor | None, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill in the shares [K, N]; their sums [K], and the sum of all."""
    from lossmith.engine.tokens.triton_weighing import weigh as kernel

    num_terms = len(shares)
    together = values[0] if len(values) == 1 else torch.stack(list(values))
    sums, total = scale.new_empty(num_terms), scale.new_empty(())
    arguments = {
        "values": in_a_row(together),
        "scale": in_a_row(scale),
        "weight": in_a_row(weight),
        "shares": shares,
        "sums": sums,
        "total": total,
        "num_terms": num_terms,
        "num_rows": scale.numel(),
        "SIZE": TOKENS_OF_A_SUM,
    }
    launch(kernel, num_terms + (num_terms > 1), scale, arguments, WARPS_OF_A_SUM)
    return sums, total


def weigh_back(
    scale: Tensor, weight: Tensor | None, of_sums: Tensor | None, of_total: Tensor | None, gradient: Tensor
) -> None:
    """Fill in the gradients [K, N] of the values."""
    from lossmith.engine.tokens.triton_weighing import weigh_back as kernel

    num_blocks = -(-scale.numel() // TOKENS_OF_A_SUM)
    arguments = {
        "scale": in_a_row(scale),
        "weight": in_a_row(weight),
        "g_sums": in_a_row(of_sums),
        "g_total": of_total,
        "gradient": gradient,
        "num_rows": scale.numel(),
        "num_blocks": num_blocks,
        "SIZE": TOKENS_OF_A_SUM,
    }
    launch(kernel, len(gradient) * num_blocks, scale, arguments, WARPS_OF_A_SUM)
