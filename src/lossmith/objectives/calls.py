"""The one-call forms as type checkers see them: their options, and what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Protocol, cast, overload

from torch import Tensor
from typing_extensions import Unpack

from lossmith.engine.head.plan import (
    LogitsDtype,
    MemoryBudget,
    Plan,
    SkipIgnored,
    SkipSmallGradients,
    Strategy,
)
from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.reduction import Denominator
from lossmith.objectives.cross_entropy import CrossEntropyOptions
from lossmith.options import option
from lossmith.options.shared import Mask, TokenWeight

Bias = Annotated[Tensor | None, option("the head's bias [V]")]


class BatchOptions(CrossEntropyOptions, total=False):
    """The further options of a call of :func:`lossmith.cross_entropy`: those of the batch."""

    mask: Mask
    token_weight: TokenWeight
    denominator: Denominator | None


class LinearOptions(BatchOptions, total=False):
    """The further options of a call of :func:`lossmith.linear_cross_entropy`: those of the head."""

    bias: Bias
    strategy: Strategy
    memory_budget: MemoryBudget
    skip_ignored: SkipIgnored
    logits_dtype: LogitsDtype
    skip_small_gradients: SkipSmallGradients


class LinearCrossEntropy(Protocol):
    """:func:`lossmith.linear_cross_entropy`, which also explains itself."""

    @overload
    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        return_stats: Literal[True],
        **options: Unpack[LinearOptions],
    ) -> tuple[Tensor, TokenStats]: ...
    @overload
    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        return_stats: Literal[False] = False,
        **options: Unpack[LinearOptions],
    ) -> Tensor: ...

    @property
    def explain(self) -> Explain: ...


class Explain(Protocol):
    """What a call would do, and at what cost."""

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        return_stats: bool = False,
        **options: Unpack[LinearOptions],
    ) -> Plan: ...


def explained(function: Callable[..., Any]) -> LinearCrossEntropy:
    """The function itself: a type checker would not let a plain function have an attribute."""
    return cast(LinearCrossEntropy, function)
