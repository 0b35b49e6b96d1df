"""``WrappedObjective``: an objective around another, which it leaves as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lossmith.batch import TokenBatch
from lossmith.engine.stats import TokenStats
from lossmith.equation import LossOutput, PerToken, StatsOf, Term
from lossmith.objective import Objective


class WrappedObjective(Objective):
    """An objective around another.

    Args:
        base: the objective inside; it says how logits are read and tokens averaged.

    Attributes:
        base: the objective inside.
    """

    def __init__(self, base: Objective) -> None:
        super().__init__(ignore_index=base.ignore_index, shift=base.shift, empty=base.empty)
        self.base = base
        self.reduction = base.reduction
        self.pad_token_id, self.eos_token_id = base.pad_token_id, base.eos_token_id
        self.input_names, self.feature_names = base.input_names, base.feature_names

    def token_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return self.base.token_loss(stats, batch)

    def terms(self, token_loss: PerToken | None = None) -> Sequence[Term]:
        return self.base.terms(token_loss)

    def bind(self, logits: Tensor, targets: Tensor, **inputs: Any) -> tuple[TokenBatch, StatsOf]:
        return self.base.bind(logits, targets, **inputs)

    def complete(self, output: LossOutput, inputs: Mapping[str, Any]) -> LossOutput:
        return self.base.complete(output, inputs)

    def count(self, targets: Tensor, **options: Any) -> Tensor:
        return self.base.count(targets, **options)
