"""The named statistics of tokens from their raw ones, all that are asked for in one step, and one step back.

``TokenStats`` has the formulas, which autograd differentiates where there is no arithmetic for this, and in
``torch.compile``, which fuses them itself.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.checks import refuse_batched
from lossmith.engine.differentiable_once import once
from lossmith.engine.statistics.raw import CONSTANTS, CORE_NAMES, Needs, raw_names
from lossmith.engine.sweep import Maybe
from lossmith.engine.tokens.arithmetic import arithmetic_for
from lossmith.engine.watched import is_watched

# In the order in which the arithmetics have them.
RAW = raw_names(Needs(31))
OF_SUM = ("centered_sum", "sum_weight", "target_weight")
# What each is made of, in the arithmetics' order.
DERIVED: dict[str, tuple[str, ...]] = {
    "logsumexp": CORE_NAMES,
    "wrong_logsumexp": CORE_NAMES,
    "nll": CORE_NAMES,
    "target_prob": CORE_NAMES,
    "target_log1m_prob": CORE_NAMES,
    "entropy": (*CORE_NAMES, "wrong_entropy"),
    "normalized_wrong_entropy": ("wrong_entropy", "num_wrong"),
    "mean_logit": (*CORE_NAMES, *OF_SUM),
    "total_nll": (*CORE_NAMES, *OF_SUM),
    "top_prob": (*CORE_NAMES, "top_wrong_logit"),
    "candidate_log1m_prob": (*CORE_NAMES, "candidate_logits", "rest_log_sum"),
}
# What one has no gradient in although it is made of it.
CONSTANT_FOR = {"wrong_logsumexp": ("target_logit",), "mean_logit": ("wrong_log_sum",)}


@dataclass(frozen=True, eq=False)
class Derivation:
    """Which statistics to derive, and of which tokens.

    Attributes:
        names: of those to derive.
        targets: [N].
        candidates: [N, K], or None.
        ignore_index: the target of tokens that have none.
        backend: whose arithmetic; None for the first that takes the raw statistics.
    """

    names: tuple[str, ...]
    targets: Tensor
    candidates: Tensor | None
    ignore_index: int
    backend: str | None

    @property
    def made_of(self) -> tuple[str, ...]:
        """Names of the raw statistics, in the arithmetics' order."""
        return _made_of(self.names)

    def of(self, raw: Sequence[Tensor]) -> dict[str, Tensor]:
        """The named statistics, differentiable, from raw ones in the order of ``made_of``."""
        return dict(zip(self.names, _Derived.apply(self, *raw), strict=True))

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the operators' order."""
        return ",".join(self.names), self.targets, self.candidates, self.ignore_index, self.backend

    def blank(self, like: Tensor) -> list[Tensor]:
        """Memory for them, in the dtype of a raw statistic."""
        num, columns = len(self.targets), () if self.candidates is None else self.candidates.shape[-1:]
        shapes = ((num, *columns) if name == "candidate_log1m_prob" else (num,) for name in self.names)
        return [like.new_empty(shape) for shape in shapes]

    def has_gradient(self, upstream: Maybe) -> tuple[bool, ...]:
        """Which of the raw statistics have one, where some of the derived ones have."""
        return _has_gradient(self.names, tuple(gradient is not None for gradient in upstream))


@functools.cache
def _made_of(names: tuple[str, ...]) -> tuple[str, ...]:
    read = {raw for name in names for raw in DERIVED[name]}
    return tuple(name for name in RAW if name in read)


@functools.cache
def _has_gradient(names: tuple[str, ...], given: tuple[bool, ...]) -> tuple[bool, ...]:
    found = {
        raw
        for name, is_given in zip(names, given, strict=True)
        for raw in DERIVED[name]
        if is_given and raw not in (*CONSTANTS, *CONSTANT_FOR.get(name, ()))
    }
    return tuple(name in found for name in _made_of(names))


class _Derived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, derivation: Derivation, *raw: Tensor) -> tuple[Tensor, ...]:
        ctx.derivation = derivation
        ctx.save_for_backward(*raw)
        ctx.set_materialize_grads(False)
        if is_watched():
            return tuple(derive_op(raw, *derivation.arguments))
        return tuple(_derive(raw, derivation))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_batched(*upstream)
        raw, derivation = ctx.saved_tensors, ctx.derivation
        with torch.no_grad():
            if is_watched():
                found = derive_back_op(raw, upstream, *derivation.arguments)
            else:
                found = _derive_back(raw, upstream, derivation)
        made = iter(found)
        wanted = derivation.has_gradient(upstream)
        return (None, *once([next(made) if w else None for w in wanted], (*raw, *upstream)))


def _derive(raw: Sequence[Tensor], derivation: Derivation) -> list[Tensor]:
    outputs = derivation.blank(raw[0])
    arithmetic_for(raw[0], derivation.backend).derive(derivation, raw, outputs)
    return outputs


def _derive_back(raw: Sequence[Tensor], upstream: Maybe, derivation: Derivation) -> list[Tensor]:
    """The gradients of those raw statistics that have one."""
    wanted = derivation.has_gradient(upstream)
    gradients = [torch.empty_like(value) if w else None for value, w in zip(raw, wanted, strict=True)]
    arithmetic_for(raw[0], derivation.backend).derive_back(derivation, raw, upstream, gradients)
    return [gradient for gradient in gradients if gradient is not None]


# ── what dispatch modes see ───────────────────────────────────────────────────────────────────────────


@torch.library.custom_op("lossmith::derive", mutates_args=())
def derive_op(
    raw: typing.Sequence[Tensor],
    names: str,
    targets: Tensor,
    candidates: Tensor | None,
    ignore_index: int,
    backend: str | None,
) -> typing.List[Tensor]:  # noqa: UP006, as in lossmith.engine.rows.operators
    return _derive(raw, Derivation(tuple(names.split(",")), targets, candidates, ignore_index, backend))


@torch.library.custom_op("lossmith::derive_back", mutates_args=())
def derive_back_op(
    raw: typing.Sequence[Tensor],
    upstream: typing.Sequence[Tensor | None],
    names: str,
    targets: Tensor,
    candidates: Tensor | None,
    ignore_index: int,
    backend: str | None,
) -> typing.List[Tensor]:  # noqa: UP006
    derivation = Derivation(tuple(names.split(",")), targets, candidates, ignore_index, backend)
    return _derive_back(raw, upstream, derivation)


@derive_op.register_fake
def _(raw, names, *rest):
    return Derivation(tuple(names.split(",")), *rest).blank(raw[0])


@derive_back_op.register_fake
def _(raw, upstream, names, *rest):
    wanted = Derivation(tuple(names.split(",")), *rest).has_gradient(upstream)
    return [torch.empty_like(value) for value, w in zip(raw, wanted, strict=True) if w]
