"""``ComposedLoss``: a primary objective and weighted components."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Annotated, Any

from torch import Tensor

from lossmith.components.component import Component, Components, Weighted
from lossmith.core.metrics import Metrics, Source
from lossmith.equation.batch import TokenBatch
from lossmith.equation.output import LossOutput, with_parts
from lossmith.equation.term import Reads, Term, TokenLoss, joined
from lossmith.objectives.objective import Objective
from lossmith.objectives.wrapped import WrappedObjective
from lossmith.options import option, strict_options


class ComposedLoss(WrappedObjective):
    """A primary objective plus weighted components, computed in one pass over the vocabulary.

        L = primary + sum_k weight_k component_k

    Args:
        primary: the main objective.
        components: by name, each a :class:`lossmith.Weighted` or a bare component (weight 1). Their terms
            share the primary's pass and its denominator.

    Raises:
        TypeError: the primary is not an objective, or a component is not a component.

    Attributes:
        base: the primary.
        components: the weighted components, by name.

    Example:
        >>> import torch, lossmith
        >>> criterion = lossmith.ComposedLoss(
        ...     lossmith.CrossEntropyLoss(label_smoothing=0.1),
        ...     components={"repeat": lossmith.Weighted(lossmith.ImmediateRepetition(), 0.5)},
        ... )
        >>> logits = torch.randn(2, 8, 50, requires_grad=True)
        >>> loss = criterion(logits, torch.randint(50, (2, 8)))
        >>> loss.backward()
    """

    @strict_options
    def __init__(
        self,
        primary: Annotated[Objective, option("the main objective", advice="Put terms into Objective([...])")],
        components: Annotated[
            Mapping[str, Weighted | Component] | None, option("weighted components, by name")
        ] = None,
    ) -> None:
        super().__init__(primary)
        self.components = Components()
        for name, given in (components or {}).items():
            weighted = given if isinstance(given, Weighted) else Weighted(given)
            self.components[name] = weighted
            # Components of weight 0 too: the weight may change.
            component = weighted.component
            names = (*component.required, *component.optional)
            self.input_names += tuple(n for n in names if n not in self.input_names and n not in BOUND)
            self.feature_names += tuple(n for n in component.per_position if n not in self.feature_names)

    def _active(self) -> list[tuple[str, Component, float | Tensor]]:
        """Components whose weight is not 0."""
        found: list[tuple[str, Component, float | Tensor]] = []
        for name, weighted in self.components.items():
            assert isinstance(weighted, Weighted)
            if weighted.weight != 0:
                found.append((name, weighted.component, weighted.weight))
        return found

    def terms(self, token_loss: TokenLoss | None = None) -> Sequence[Term]:
        terms = list(self.base.terms(token_loss))
        for name, component, weight in self._active():
            term = component.term()
            if term is not None:
                terms.append(replace(term, name=name, coefficient=weight * term.coefficient))
        return terms

    def features(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        for name, component, _ in self._active():
            for needed in component.required:
                if inputs.get(needed) is None:
                    raise ValueError(
                        f"the component {name!r} ({type(component).__name__}) needs {needed}; "
                        f"pass {needed}=..., or give the component a weight of 0"
                    )
        return {**super().features(inputs), **Objective.features(self, inputs)}

    def per_token(self, inputs: Mapping[str, Any]) -> set[str]:
        found = self.base.per_token(inputs)
        for name, component, _ in self._active():
            known = {*component.per_position, *component.per_token, *component.of_own_positions}
            for needed in (*component.required, *component.optional):
                if needed not in {*known, *BOUND, "attention_mask"} and inputs.get(needed) is not None:
                    raise ValueError(
                        f"the component {name!r} ({type(component).__name__}) reads {needed} of whole "
                        "sequences, which are split across ranks; give it a weight of 0, or leave it out"
                    )
            found |= set(component.per_token)
        return found

    @property
    def reads(self) -> Reads:
        return joined(self.base.reads, *(component.reads for _, component, _ in self._active()))

    @property
    def wanted_inputs(self) -> set[str]:
        parts = [component for _, component, _ in self._active()]
        return self.base.wanted_inputs.union(*((*part.required, *part.optional) for part in parts))

    def also_read(self, batch: TokenBatch, inputs: Mapping[str, Any]) -> Tensor | None:
        wanted = [component.also_read(batch, inputs) for _, component, _ in self._active()]
        found = [some for some in (super().also_read(batch, inputs), *wanted) if some is not None]
        return reduce(operator.or_, found) if found else None

    def complete(self, output: LossOutput, inputs: Mapping[str, Any]) -> LossOutput:
        output = self.base.complete(output, inputs)
        assert output.batch is not None
        parts: dict[str, Tensor] = {}
        for name, component, weight in self._active():
            scalar = component.scalar(inputs, output)
            if scalar is not None:
                parts[name] = weight * scalar * output.batch.share
            token_sum = component.token_sum(inputs, output)
            if token_sum is not None:
                parts[name] = parts.get(name, 0.0) + weight * token_sum
        output = with_parts(output, parts)
        return replace(output, metrics=output.metrics.joined(Metrics(self.measures())))

    def measures(self) -> dict[str, Source]:
        """What the components measured on the last batch besides its loss, as ``component/name``."""
        return {
            f"{name}/{measure}": source
            for name, component, _ in self._active()
            for measure, source in component.metrics().items()
        }


# Inputs that every objective aligns with its targets; a component finds them in the batch.
BOUND = ("input_ids", "segment_ids")
