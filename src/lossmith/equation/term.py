"""``Term``: one per-token term, with what it reads and where it looks declared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from lossmith.engine.statistics.statistic import UNSCALED, UndeclaredRead
from lossmith.engine.statistics.stats import STATISTIC_NAMES, TokenStats, unknown_statistic
from lossmith.equation.batch import TokenBatch
from lossmith.equation.reduction import scaled
from lossmith.options import option, strict_options

PerToken = Callable[[TokenStats, TokenBatch], Tensor]
Weigh = Callable[[TokenStats, TokenBatch], "Tensor | None"]
# Names of statistics, ``unscaled.`` before those at temperature 1; None for every one there is.
Reads = Annotated[Sequence[str] | None, option("names of statistics", advice='Of one, write ("nll",)')]
Scope = Literal["token", "batch"]


# Hashed by identity: torch.compile of PyTorch 2.11 hashes what it calls, before it has its fields.
@dataclass(frozen=True, eq=False)
class TokenLoss:
    """A loss of each token that terms are made of, and what it reads.

    Args:
        of: (stats, batch) -> [N].
        reads: the statistics that it reads.
    """

    of: PerToken
    reads: Reads = None

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return self.of(stats, batch)


@strict_options
@dataclass(frozen=True)
class Term:
    """One per-token term of an objective: ``coefficient * token_weight * loss``.

    What it reads and where it looks is declared. :func:`lossmith.testing.check_term` holds it to that.

    Args:
        name: what the term is called in ``LossOutput.parts``.
        loss: (stats, batch) -> [N], differentiable, never reduced.
        coefficient: lambda; a term whose coefficient is the number 0 is left out.
        token_weight: (stats, batch) -> [N] or a scalar; sees detached statistics, since a weight
            that could be lowered by gradient descent would be lowered instead of the loss.
        reads: names of the statistics that ``loss`` and ``token_weight`` read, ``unscaled.nll`` for one at
            temperature 1; reading another is an error. None: every statistic, still in one pass.
        scope: ``token`` promises that a token's loss and weight depend on that token alone, which lets a
            linear head be swept once; ``batch`` promises nothing.
        candidates: batch -> [N, K] ids (-1 pads) whose logits ``loss`` reads.

    Raises:
        ValueError: an unknown scope or statistic.

    Example:
        >>> import lossmith
        >>> hard = lossmith.Term(
        ...     "hard", lambda s, b: s.nll * (1 - s.target_prob), reads=("nll", "target_prob"), scope="token"
        ... )
    """

    name: str
    loss: PerToken
    coefficient: Annotated[float | Tensor, option("lambda")] = 1.0
    token_weight: PerToken | None = None
    reads: Reads = None
    scope: Scope = "batch"
    candidates: Callable[[TokenBatch], Tensor] | None = None

    def __post_init__(self) -> None:
        for name in self.reads or ():
            if name.removeprefix(UNSCALED) not in STATISTIC_NAMES:
                raise ValueError(f"reads of the term {self.name!r}: {unknown_statistic(name)}")

    def __str__(self) -> str:
        """As it stands in a sum."""
        if isinstance(self.coefficient, Tensor):
            return f"a coefficient * {self.name}"
        return self.name if self.coefficient == 1 else f"{self.coefficient:g} {self.name}"

    @property
    def is_off(self) -> bool:
        return not isinstance(self.coefficient, Tensor) and self.coefficient == 0

    def values(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[N] coefficient * token_weight * loss of each token, before the batch's scale.

        Raises:
            ValueError: not a value per token, or a statistic is read that was not declared.
        """
        try:
            values = self.loss(stats, batch)
            if values.shape != batch.targets.shape:
                raise ValueError(
                    f"term {self.name!r} must return a value per token, {list(batch.targets.shape)}, and "
                    f"leave averaging to the objective; got {list(values.shape)}"
                )
            if self.token_weight is not None:
                values = scaled(values, self.token_weight(stats.detach(), batch).detach())
        except UndeclaredRead as undeclared:
            declared = ", ".join(map(repr, (*(self.reads or ()), undeclared.name)))
            raise ValueError(
                f"the term {self.name!r} reads the statistic {undeclared.name!r}, which it does not declare; "
                f"write reads=({declared})"
            ) from None
        is_one = not isinstance(self.coefficient, Tensor) and self.coefficient == 1
        return values if is_one else values * self.coefficient


def joined(*reads: Reads) -> Reads:
    """All that one of these reads."""
    return None if None in reads else tuple(dict.fromkeys(name for names in reads for name in names or ()))
