"""``WrappedObjective``: an objective around another, which it leaves unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from torch import Tensor

from lossmith.engine.statistics.stats import TokenStats
from lossmith.engine.sweep_options import SweepOptions
from lossmith.equation.batch import TokenBatch
from lossmith.equation.output import LossOutput
from lossmith.equation.reduction import Reduction
from lossmith.equation.term import Reads, Term, TokenLoss, Weigh
from lossmith.objectives.objective import Objective
from lossmith.options import option, strict_options

# Options that are read from the objective inside.
OF_THE_BASE = (
    "reduction",
    "ignore_index",
    "shift",
    "empty",
    "temperature",
    "softcap",
    "class_weight",
    "backend",
    "pad_token_id",
    "eos_token_id",
)


class WrappedObjective(Objective):
    """An objective that wraps another.

    Args:
        base: the objective inside; it decides how logits are read and tokens averaged.

    Attributes:
        base: the objective inside.
    """

    @strict_options
    def __init__(self, base: Annotated[Objective, option("the objective inside")]) -> None:
        super(Objective, self).__init__()  # options are looked up on the base at each read
        self.base = base
        self.input_names, self.feature_names = base.input_names, base.feature_names

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__
        return getattr(found("base"), name) if name in OF_THE_BASE else found(name)

    @property
    def sweep_options(self) -> SweepOptions:
        return self.base.sweep_options

    def token_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return self.base.token_loss(stats, batch)

    @property
    def token_loss_reads(self) -> Reads:
        return self.base.token_loss_reads

    @property
    def reads(self) -> Reads:
        return self.base.reads

    @property
    def wanted_inputs(self) -> set[str]:
        return self.base.wanted_inputs

    @property
    def resolved_reduction(self) -> Reduction:
        return self.base.resolved_reduction

    def also_read(self, batch: TokenBatch, inputs: Mapping[str, Any]) -> Tensor | None:
        return self.base.also_read(batch, inputs)

    def terms(self, token_loss: TokenLoss | None = None) -> Sequence[Term]:
        return self.base.terms(token_loss)

    def kept(self, targets: Tensor, ignore_index: int) -> Tensor:
        return self.base.kept(targets, ignore_index)

    @property
    def weigh(self) -> Weigh | None:
        return self.base.weigh

    def complete(self, output: LossOutput, inputs: Mapping[str, Any]) -> LossOutput:
        return self.base.complete(output, inputs)

    def features(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return self.base.features(inputs)

    def per_token(self, inputs: Mapping[str, Any]) -> set[str]:
        return self.base.per_token(inputs)

    def count(self, targets: Tensor, **options: Any) -> Tensor:
        return self.base.count(targets, **options)

    def _warn_if_unshifted(self, batch: TokenBatch) -> None:
        self.base._warn_if_unshifted(batch)
