"""The arithmetics of tokens, by the names of the backends that have one, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lossmith.engine.tokens import native_tokens, triton_tokens
from lossmith.engine.watched import is_eager, is_watched


class TokenArithmetic(Protocol):
    """Numbers of tokens, computed by one launch a call; tensors [N] or [N, K], None where there is none."""

    def takes(self, like: Tensor, is_asked_for: bool = False, /) -> bool:
        """Whether tensors like this are computed here; or can be, if somebody asks for it by name."""
        ...

    def derive(self, of: Any, raw: Sequence[Tensor], derived: Sequence[Tensor], /) -> None:
        """Fill in the derived statistics from the raw ones."""
        ...

    def derive_back(
        self,
        of: Any,
        raw: Sequence[Tensor],
        upstream: Sequence[Tensor | None],
        gradient: Sequence[Tensor | None],
        /,
    ) -> None:
        """Fill in the gradients of raw statistics that are not None from those of the derived ones."""
        ...

    def family(self, of: Any, raw: Sequence[Tensor], values: Tensor, /) -> None:
        """Fill in the terms [K, N] of the cross-entropy family."""
        ...

    def family_back(
        self,
        of: Any,
        raw: Sequence[Tensor],
        upstream: Tensor,
        gradient: Sequence[Tensor | None],
        /,
    ) -> None:
        """Fill in the gradients of raw statistics that are not None from those of the terms [K, N]."""
        ...

    def weigh(
        self, values: Sequence[Tensor], scale: Tensor, weight: Tensor | None, shares: Tensor, /
    ) -> tuple[Tensor, Tensor]:
        """Fill in the shares [K, N]; returns their weighed sums [K], and the sum of all."""
        ...

    def weigh_back(
        self,
        scale: Tensor,
        weight: Tensor | None,
        of_sums: Tensor | None,
        of_total: Tensor | None,
        gradient: Tensor,
        /,
    ) -> None:
        """Fill in the gradients [K, N] of the values."""
        ...


ARITHMETICS: dict[str, TokenArithmetic] = {"native": native_tokens, "triton": triton_tokens}


def arithmetic_for(like: Tensor, backend: str | None) -> TokenArithmetic:
    """The one that was asked for, or the first that takes tensors like this.

    Raises:
        LookupError: there is none.
    """
    if backend is not None:
        return ARITHMETICS[backend]
    found = next((one for one in ARITHMETICS.values() if one.takes(like)), None)
    if found is None:
        raise LookupError(f"no arithmetic for tokens on {like.device}")
    return found


def is_one_step(like: Tensor, backend: str | None) -> bool:
    """Whether numbers like these are computed by an arithmetic here, and not by PyTorch's operations, which
    ``torch.compile`` makes one step of itself. Tensors without memory stand for those of a GPU."""
    if torch.compiler.is_compiling() or backend not in (None, *ARITHMETICS):
        return False
    if like.device.type == "meta":
        return is_watched()
    if not (is_eager(like) or is_watched()):
        return False
    if backend is not None:
        return ARITHMETICS[backend].takes(like, True)
    return any(one.takes(like) for one in ARITHMETICS.values())
