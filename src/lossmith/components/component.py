"""``Component``: one part of a composed objective; subclass it to add your own."""

from __future__ import annotations

from collections.abc import ItemsView, Mapping, ValuesView
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from torch import Tensor, nn

from lossmith.core.metrics import Source
from lossmith.equation.batch import TokenBatch
from lossmith.equation.output import LossOutput
from lossmith.equation.term import Reads, Term
from lossmith.options import option, strict_options


class Component(nn.Module):
    """One part of a :class:`lossmith.ComposedLoss`: override ``term``, ``scalar`` or ``token_sum``.

    Attributes:
        required: names of the inputs that it needs; it raises without them.
        optional: names of the inputs that it uses if they are given.
        per_position: those of them with one entry per position, [..., T]; a term finds them flat, [N], in
            ``batch.features``.
        per_token: those with a row for each token, [..., T, K] or [N, K], or lists of such. Where sequences
            are split across ranks they are gathered, and each rank has the rows of all.
        of_own_positions: those that stay this rank's where sequences are split; ``output.batch.own`` and
            ``output.batch.predicted`` know which positions those are. Any other input is refused there.
        reads: names of the statistics that :meth:`scalar` and :meth:`token_sum` read from ``output.stats``;
            they are computed in the same pass.

    Example:
        >>> import torch, lossmith
        >>> class ShortText(lossmith.Component):
        ...     required = ("lengths",)
        ...     def scalar(self, inputs, output):
        ...         return inputs["lengths"].float().mean()
        >>> criterion = lossmith.ComposedLoss(
        ...     lossmith.CrossEntropyLoss(), components={"short": lossmith.Weighted(ShortText(), 0.1)}
        ... )
        >>> logits, targets = torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.long)
        >>> loss = criterion(logits, targets, lengths=torch.tensor([3.0, 5.0]), return_detailed=True)
        >>> round(loss["short"].item(), 4)
        0.4
    """

    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    per_position: ClassVar[tuple[str, ...]] = ()
    per_token: ClassVar[tuple[str, ...]] = ()
    of_own_positions: ClassVar[tuple[str, ...]] = ()
    reads: Reads = ()

    def term(self) -> Term | None:
        """A per-token term on the model's statistics, summed over tokens with all others. The composition
        renames it to the component's name."""
        return None

    def also_read(self, batch: TokenBatch, inputs: Mapping[str, Any]) -> Tensor | None:
        """[N] bool, positions without a target whose statistics the other methods also read, from
        ``output.all_stats``; None for none.

        Args:
            batch: the aligned batch.
            inputs: what the objective was given, by name.
        """
        return None

    def scalar(self, inputs: Mapping[str, Any], output: LossOutput) -> Tensor | None:
        """A scalar computed from other tensors, for example a mean over the batch. A micro-batch's scalar is
        weighted by its share of the batch.

        Args:
            inputs: what the objective was given, by name.
            output: the result of the per-token terms, with ``stats`` and ``batch``, both flat [N].
        """
        return None

    def token_sum(self, inputs: Mapping[str, Any], output: LossOutput) -> Tensor | None:
        """A sum over tokens, each times its ``output.batch.scale``, which divides it as it does the terms.

        Args:
            inputs, output: as for :meth:`scalar`.
        """
        return None

    def metrics(self) -> Mapping[str, Source]:
        """Metrics of the last batch, by name: tensors, or functions that compute them when they are read.
        ``output.metrics`` has them as ``component/name``."""
        return {}


class Weighted(nn.Module):
    """A component and its coefficient; 0 switches it off.

    Args:
        component: the component.
        weight: its coefficient.

    Raises:
        TypeError: not a component and a number.
        ValueError: a weight that is not finite.
    """

    @strict_options
    def __init__(
        self,
        component: Annotated[
            Component,
            option(
                "what is weighted",
                advice="A term belongs into Objective([...]), or into a Component whose term() returns it",
            ),
        ],
        weight: Annotated[float | Tensor, option("its coefficient")] = 1.0,
    ) -> None:
        super().__init__()
        self.component = component
        self.weight = weight

    def extra_repr(self) -> str:
        return f"weight={self.weight}"


if TYPE_CHECKING:

    class Components(nn.ModuleDict):
        """Weighted components by name; a plain ``nn.ModuleDict`` at run time."""

        def __getitem__(self, key: str) -> Weighted: ...
        def values(self) -> ValuesView[Weighted]: ...
        def items(self) -> ItemsView[str, Weighted]: ...

else:
    Components = nn.ModuleDict
