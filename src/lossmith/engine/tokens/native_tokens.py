"""The arithmetic of tokens on a CPU, compiled: calls ``tokens_native.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossmith.engine.native.build import library
from lossmith.engine.native.memory import Memory
from lossmith.engine.statistics.raw import Needs, raw_names
from lossmith.engine.sweep import Maybe

if TYPE_CHECKING:
    from lossmith.engine.tokens.derivation import Derivation
    from lossmith.engine.tokens.family import CrossEntropyFamily, FamilyTerms

RAW = raw_names(Needs(31))
DERIVED = (
    "logsumexp", "wrong_logsumexp", "nll", "target_prob", "target_log1m_prob", "entropy",
    "normalized_wrong_entropy", "mean_logit", "total_nll", "top_prob", "candidate_log1m_prob",
)  # fmt: skip
FLOATS = (torch.float32, torch.float64)
OF_CANDIDATES = ("candidate_logits", "candidate_log1m_prob")


# How a family is told.
FAMILY_FIELDS = [
    ("excludes_target", ctypes.c_int64),
    *((name, ctypes.c_double) for name in ("label_smoothing", "focal_gamma", "z_loss", "confidence_penalty")),
]


def family_values(family: CrossEntropyFamily) -> tuple[float, ...]:
    """The values of ``FAMILY_FIELDS``."""
    numbers = family.label_smoothing, family.focal_gamma, family.z_loss, family.confidence_penalty
    return family.excludes_target, *numbers


class _Tokens(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("is_double", "num_rows", "num_candidates", "num_threads")),
        ("targets", ctypes.c_void_p),
        ("ignore_index", ctypes.c_int64),
        ("candidates", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in RAW),
        *((name, ctypes.c_void_p) for name in DERIVED),
        *(("g_" + name, ctypes.c_void_p) for name in DERIVED),
        *(("g_" + name, ctypes.c_void_p) for name in RAW),
    ]


class _Terms(ctypes.Structure):
    _fields_ = [
        ("is_double", ctypes.c_int64),
        ("num_terms", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
        *(
            (name, ctypes.c_void_p)
            for name in ("scale", "weight", "shares", "sums", "total", "g_sums", "g_total", "gradient")
        ),
    ]


def takes(like: Tensor, is_asked_for: bool = False) -> bool:
    """Whether numbers like these are computed here."""
    is_taken = like.device.type == "cpu" and like.dtype in FLOATS
    return is_taken and library() is not None


def derive(of: Derivation, raw: Sequence[Tensor], derived: Sequence[Tensor]) -> None:
    """Fill in the derived statistics."""
    call = _Call(of, of.made_of, raw)
    call.give("", of.names, derived, is_output=True)
    _library().lossmith_derive(ctypes.byref(call.tokens))


def derive_back(of: Derivation, raw: Sequence[Tensor], upstream: Maybe, gradient: Maybe) -> None:
    """Fill in the gradients of the raw statistics."""
    call = _Call(of, of.made_of, raw)
    call.give("g_", of.names, upstream)
    call.give("g_", of.made_of, gradient, is_output=True)
    _library().lossmith_derive_back(ctypes.byref(call.tokens))


def family(of: FamilyTerms, raw: Sequence[Tensor], values: Tensor) -> None:
    """Fill in the terms [K, N]."""
    call = _FamilyCall(of, raw, None)
    call.give("values", values, values.numel(), is_output=True)
    _library().lossmith_family(ctypes.byref(call.terms))


def family_back(of: FamilyTerms, raw: Sequence[Tensor], upstream: Tensor, gradient: Maybe) -> None:
    """Fill in the gradients of the raw statistics."""
    call = _FamilyCall(of, raw, gradient)
    call.give("upstream", upstream, len(of.family.names) * of.targets.numel())
    _library().lossmith_family_back(ctypes.byref(call.terms))


class _FamilyTerms(ctypes.Structure):
    _fields_ = [
        ("views", ctypes.POINTER(_Tokens)),
        ("num_views", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("target_weight", "values", "upstream")),
        *FAMILY_FIELDS,
    ]


class _FamilyCall:
    """What a call about the cross-entropy family is given, which lives as long."""

    def __init__(self, of: FamilyTerms, raw: Sequence[Tensor], gradient: Maybe | None) -> None:
        self.memory, self.dtype = Memory(), raw[0].dtype
        first = len(of.made_of[0])
        self._calls = []
        for names, start in zip(of.made_of, (0, first), strict=True):
            if names:
                call = _Call(of, names, raw[start : start + len(names)])
                if gradient is not None:
                    call.give("g_", names, gradient[start : start + len(names)], is_output=True)
                self._calls.append(call)
        views = (_Tokens * len(self._calls))(*(call.tokens for call in self._calls))
        self.terms = _FamilyTerms(views, len(views), None, None, None, *family_values(of.family))
        if of.target_weight is not None:
            self.give("target_weight", of.target_weight, of.targets.numel())

    def give(self, name: str, value: Tensor, numel: int, *, is_output: bool = False) -> None:
        setattr(self.terms, name, self.memory.of(name, value, self.dtype, numel, is_output=is_output))


class _Call:
    """What a call is given, which lives as long."""

    def __init__(self, of: Derivation | FamilyTerms, made_of: Sequence[str], raw: Sequence[Tensor]) -> None:
        self.memory, self.dtype, self.num_rows = Memory(), raw[0].dtype, of.targets.numel()
        candidates = getattr(of, "candidates", None)
        self.num_candidates = 0 if candidates is None else candidates.shape[-1]
        num_ids = self.num_rows * self.num_candidates
        self.tokens = _Tokens(
            _is_double(self.dtype),
            self.num_rows,
            self.num_candidates,
            torch.get_num_threads(),
            self.memory.of("targets", of.targets, torch.int64, self.num_rows),
            of.ignore_index,
            self.memory.of("candidates", candidates, torch.int64, num_ids),
        )
        self.give("", made_of, raw)

    def give(self, prefix: str, names: Sequence[str], values: Maybe, *, is_output: bool = False) -> None:
        for name, value in zip(names, values, strict=True):
            if value is not None:
                numel = self.num_rows * (self.num_candidates if name in OF_CANDIDATES else 1)
                place = self.memory.of(name, value, self.dtype, numel, is_output=is_output)
                setattr(self.tokens, prefix + name, place)


def weigh(
    values: Sequence[Tensor], scale: Tensor, weight: Tensor | None, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill in the shares [K, N]; their sums [K], and the sum of all."""
    memory, num_rows, dtype, num_terms = Memory(), scale.numel(), scale.dtype, len(shares)
    sums, total = scale.new_empty(num_terms), scale.new_empty(())
    each = values[0].unbind() if values[0].dim() > 1 else values
    places = (memory.of("values", value, dtype, num_rows) for value in each)
    terms = _Terms(
        is_double=_is_double(dtype),
        num_terms=num_terms,
        num_rows=num_rows,
        values=(ctypes.c_void_p * num_terms)(*places),
        scale=memory.of("scale", scale, dtype, num_rows),
        weight=memory.of("weight", weight, dtype, num_rows),
        shares=memory.of("shares", shares, dtype, num_terms * num_rows, is_output=True),
        sums=sums.data_ptr(),
        total=total.data_ptr(),
    )
    _library().lossmith_weigh(ctypes.byref(terms))
    return sums, total


def weigh_back(
    scale: Tensor, weight: Tensor | None, of_sums: Tensor | None, of_total: Tensor | None, gradient: Tensor
) -> None:
    """Fill in the gradients [K, N] of the values."""
    memory, num_rows, num_terms, dtype = Memory(), scale.numel(), gradient.shape[0], scale.dtype
    terms = _Terms(
        is_double=_is_double(dtype),
        num_terms=num_terms,
        num_rows=num_rows,
        scale=memory.of("scale", scale, dtype, num_rows),
        weight=memory.of("weight", weight, dtype, num_rows),
        g_sums=memory.of("gradients of sums", of_sums, dtype, num_terms),
        g_total=memory.of("gradient of the total", of_total, dtype, 1),
        gradient=memory.of("gradient", gradient, dtype, num_terms * num_rows, is_output=True),
    )
    _library().lossmith_weigh_back(ctypes.byref(terms))


def _is_double(dtype: torch.dtype) -> bool:
    """
    Raises:
        ValueError: neither single nor double precision, which are all that the library reads and writes.
    """
    if dtype not in FLOATS:
        raise ValueError(f"the compiled code takes numbers of tokens in float32 or float64; got {dtype}")
    return dtype == torch.float64


def _library() -> Any:
    return library()
