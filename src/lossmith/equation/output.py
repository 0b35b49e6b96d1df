"""``LossOutput``: what an objective made of a batch, and how more parts are added to it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from torch import Tensor

from lossmith.core.metrics import Metrics
from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.batch import TokenBatch


@dataclass(frozen=True, repr=False)
class LossOutput:
    """What an objective made of a batch.

    Attributes:
        total: the loss; the sum of ``parts``. [..., T] per token where the reduction is ``none``.
        parts: each term's contribution, weights and denominator included, by name.
        valid: [N] bool, which tokens (or scores) were supervised.
        stats: the statistics of every token, in the shape of the targets; asking for one that no term used
            costs another pass over the logits. None where there are no tokens but scores.
        batch: the tokens as they were aligned, masked, scaled and weighed, flat [N] (``stats.flat()`` goes
            with it); None likewise.
        shares: [K, N] what each token adds to each of the per-token terms, detached and before ``weigh``.
        metrics: ``loss``, each part, ``nll`` (unsmoothed, temperature 1, a mean over tokens),
            ``perplexity`` and ``accuracy``; computed when they are read.
        all_stats: the statistics, flat, also where something else than a loss looks at the predictions of a
            position without a target (``batch.also_read``).
    """

    total: Tensor
    parts: dict[str, Tensor]
    valid: Tensor
    stats: TokenStats | None
    batch: TokenBatch | None
    shares: Tensor
    metrics: Metrics
    all_stats: TokenStats | None = None

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in ("total", "parts", "num_tokens", "stats")}
        return f"LossOutput({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def num_tokens(self) -> Tensor:
        """How many tokens were supervised (0-dimensional)."""
        return self.valid.sum()

    @property
    def contributions(self) -> Tensor:
        """[N] what each token adds to the per-token terms together, detached and before ``weigh``."""
        return self.shares.sum(0)

    def as_dict(self) -> dict[str, Tensor]:
        """The parts, and the loss as ``total_loss``."""
        return {**self.parts, "total_loss": self.total}

    def shaped(self) -> LossOutput:
        """The same with the statistics, flat while the loss is made, in the shape of the targets."""
        if self.stats is None or self.batch is None:
            return self
        return replace(self, stats=self.stats.reshape(self.batch.shape))

    def __getstate__(self) -> dict[str, Any]:
        """Numbers without a graph, for pickle and ``copy.deepcopy``."""
        parts = {name: part.detach() for name, part in self.parts.items()}
        return {**self.__dict__, "total": self.total.detach(), "parts": parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # past the frozen setattr


def with_parts(output: LossOutput, parts: Mapping[str, Tensor]) -> LossOutput:
    """The output with further parts, weighted and divided already, added to its total."""
    if not parts:
        return output
    if output.total.dim():
        raise ValueError(
            f"the parts {', '.join(parts)} belong to no token; reduction='none' has no place for them"
        )
    twice = [name for name in parts if name in output.parts]
    if twice:
        raise ValueError(f"the parts of an objective need distinct names; {twice[0]!r} is there twice")
    total = reduce(operator.add, parts.values(), output.total)
    added = Metrics({"loss": total.sum, **{name: part.sum for name, part in parts.items()}})
    metrics = output.metrics.joined(added)
    return replace(output, total=total, parts={**output.parts, **parts}, metrics=metrics)
