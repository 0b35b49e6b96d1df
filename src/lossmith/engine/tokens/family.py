"""The terms of the cross-entropy family, from raw statistics in one step, and one step back."""

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
from lossmith.engine.statistics.raw import CONSTANTS, CORE_NAMES, GROUP_NAMES, Needs
from lossmith.engine.sweep import Maybe
from lossmith.engine.tokens.arithmetic import arithmetic_for
from lossmith.engine.watched import is_watched


@dataclass(frozen=True)
class CrossEntropyFamily:
    """What a token adds to each of its terms; the last two are left out where their weight is 0:

        w (1 - p_y)^gamma [(1 - eps) (-log p_y) + eps / V  sum_i (-log p_i)]     cross_entropy
        w z_loss logsumexp(z)^2                                                  z_loss
        -w confidence_penalty H(p)                                               confidence_penalty

    with the class weights w, and all else as :mod:`lossmith.terms` has it.

    Attributes:
        label_smoothing, focal_gamma, z_loss, confidence_penalty: eps, gamma, and the weights.
        excludes_target: whether eps is shared by the wrong classes alone.
    """

    label_smoothing: float = 0.0
    excludes_target: bool = False
    focal_gamma: float = 0.0
    z_loss: float = 0.0
    confidence_penalty: float = 0.0

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of its terms."""
        more = {"z_loss": self.z_loss, "confidence_penalty": self.confidence_penalty}
        return ("cross_entropy", *(name for name, weight in more.items() if weight != 0))

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        """The statistics that they are made of."""
        read = ["nll"]
        if self.label_smoothing != 0:
            read += ["total_nll", "num_finite"]
        if self.z_loss != 0:
            read.append("unscaled.logsumexp")
        if self.confidence_penalty != 0:
            read.append("entropy")
        return tuple(read)

    def raw_names(self, has_temperature: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The raw statistics that they are made of, of each of the two temperatures."""
        names: list[str] = list(CORE_NAMES)
        if self.confidence_penalty != 0:
            names += GROUP_NAMES[Needs.ENTROPY]
        if self.label_smoothing != 0:
            names += GROUP_NAMES[Needs.SUM]
        return tuple(names), CORE_NAMES if has_temperature and self.z_loss != 0 else ()


@dataclass(frozen=True, eq=False)
class FamilyTerms:
    """The family at some tokens.

    Attributes:
        family: which terms, K of them.
        targets: [N].
        target_weight: [N] class weights of the targets, in the dtype of the statistics; or None.
        ignore_index: the target of tokens that have none.
        has_temperature: whether there are statistics at two temperatures.
        backend: whose arithmetic; None for the first that takes the raw statistics.
    """

    family: CrossEntropyFamily
    targets: Tensor
    target_weight: Tensor | None
    ignore_index: int
    has_temperature: bool
    backend: str | None

    @property
    def made_of(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the raw statistics, of each temperature."""
        return self.family.raw_names(self.has_temperature)

    @property
    def has_gradient(self) -> list[bool]:
        """Which of the raw statistics have one."""
        return [name not in CONSTANTS for names in self.made_of for name in names]

    def of(self, raw: Sequence[Tensor]) -> Tensor:
        """The terms' values [K, N], differentiable, from raw statistics in the order of ``made_of``."""
        return _Terms.apply(self, *raw)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the operators' order."""
        one = self.family
        numbers = [one.label_smoothing, one.focal_gamma, one.z_loss, one.confidence_penalty]
        read = self.targets, self.target_weight, self.ignore_index, self.has_temperature
        return *read, one.excludes_target, numbers, self.backend


def _of_arguments(targets: Tensor, weight: Tensor | None, *rest: Any) -> FamilyTerms:
    ignore_index, has_temperature, excludes_target, (smoothing, *others), backend = rest
    family = CrossEntropyFamily(smoothing, excludes_target, *others)
    return FamilyTerms(family, targets, weight, ignore_index, has_temperature, backend)


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: FamilyTerms, *raw: Tensor) -> Tensor:
        ctx.terms = terms
        ctx.save_for_backward(*raw)
        return family_op(raw, *terms.arguments) if is_watched() else _family(raw, terms)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_batched(upstream)
        raw, terms = ctx.saved_tensors, ctx.terms
        with torch.no_grad():
            if is_watched():
                found = family_back_op(raw, upstream, *terms.arguments)
            else:
                found = _family_back(raw, upstream, terms)
        made = iter(found)
        return (None, *once([next(made) if has else None for has in terms.has_gradient], (*raw, upstream)))


def _blank(raw: Sequence[Tensor], terms: FamilyTerms) -> Tensor:
    return raw[0].new_empty((len(terms.family.names), len(terms.targets)))


def _family(raw: Sequence[Tensor], terms: FamilyTerms) -> Tensor:
    values = _blank(raw, terms)
    arithmetic_for(raw[0], terms.backend).family(terms, raw, values)
    return values


def _family_back(raw: Sequence[Tensor], upstream: Tensor, terms: FamilyTerms) -> list[Tensor]:
    """The gradients of those raw statistics that have one."""
    gradient: Maybe = [
        torch.empty_like(value) if has else None for value, has in zip(raw, terms.has_gradient, strict=True)
    ]
    arithmetic_for(raw[0], terms.backend).family_back(terms, raw, upstream, gradient)
    return [one for one in gradient if one is not None]


# ── what dispatch modes see ───────────────────────────────────────────────────────────────────────────


@torch.library.custom_op("lossmith::family", mutates_args=())
def family_op(
    raw: typing.Sequence[Tensor],
    targets: Tensor,
    target_weight: Tensor | None,
    ignore_index: int,
    has_temperature: bool,
    excludes_target: bool,
    numbers: typing.Sequence[float],
    backend: str | None,
) -> Tensor:
    rest = ignore_index, has_temperature, excludes_target, numbers, backend
    return _family(raw, _of_arguments(targets, target_weight, *rest))


@torch.library.custom_op("lossmith::family_back", mutates_args=())
def family_back_op(
    raw: typing.Sequence[Tensor],
    upstream: Tensor,
    targets: Tensor,
    target_weight: Tensor | None,
    ignore_index: int,
    has_temperature: bool,
    excludes_target: bool,
    numbers: typing.Sequence[float],
    backend: str | None,
) -> typing.List[Tensor]:  # noqa: UP006, as in lossmith.engine.rows.operators
    rest = ignore_index, has_temperature, excludes_target, numbers, backend
    return _family_back(raw, upstream, _of_arguments(targets, target_weight, *rest))


@family_op.register_fake
def _(raw, *rest):
    return _blank(raw, _of_arguments(*rest))


@family_back_op.register_fake
def _(raw, upstream, *rest):
    wanted = _of_arguments(*rest).has_gradient
    return [torch.empty_like(value) for value, w in zip(raw, wanted, strict=True) if w]
