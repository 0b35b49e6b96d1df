"""The user's own modifiers: the pipeline calls ``modify_loss`` and uses the result unchanged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lossmith.equation.output import LossOutput
from lossmith.modifiers.base import BaseLossModifier


@dataclass(frozen=True)
class CustomModifiers:
    """The custom modifiers of a call, and what they work on.

    Attributes:
        modifiers: with their positions in the pipeline, in order.
        logits, targets: of the batch, as the user gave them.
        arguments: position, output so far -> keyword arguments.
        put: position, per-position loss [..., T] -> the batch's output with that loss.
    """

    modifiers: Sequence[tuple[int, BaseLossModifier]]
    logits: Tensor
    targets: Tensor
    arguments: Callable[[int, LossOutput], Mapping[str, Any]]
    put: Callable[[int, Tensor], LossOutput]

    def apply(self, output: LossOutput) -> LossOutput:
        """Call each modifier in turn and use its result unchanged."""
        on_reduced: list[tuple[int, BaseLossModifier]] = []
        for position, modifier in self.modifiers:
            loss, is_per_position = self._answer(position, modifier, output)
            if not is_per_position:
                output = _with_part(output, modifier, loss)
                on_reduced.append((position, modifier))
                continue
            output = self.put(position, loss)
            # What earlier modifiers did applied to a loss that has been replaced.
            for earlier_position, earlier in on_reduced:
                loss, is_per_position = self._answer(earlier_position, earlier, output)
                if not is_per_position:
                    output = _with_part(output, earlier, loss)
        return output

    def _answer(self, position: int, modifier: BaseLossModifier, output: LossOutput) -> tuple[Tensor, bool]:
        """The loss that a modifier returns, and whether it is a per-position loss."""
        arguments = _accepted(modifier, self.arguments(position, output))
        answer = modifier.modify_loss(self.logits, self.targets, output.total, **arguments)
        _let_go_of_the_graph(modifier)
        if isinstance(answer, Mapping):
            losses = answer.get("per_position_loss")
            if isinstance(losses, Tensor) and losses.shape != self.targets.shape:
                raise ValueError(
                    f"{modifier.name} returned a per_position_loss {list(losses.shape)}; "
                    f"expected the targets' shape {list(self.targets.shape)}"
                )
            if isinstance(losses, Tensor):
                return losses, True
            answer = answer.get("loss")
        if not isinstance(answer, Tensor):
            raise TypeError(
                f"{modifier.name}.modify_loss must return the loss as a tensor, or "
                f"{{'per_position_loss': tensor}}; got {type(answer).__name__}"
            )
        if answer.shape != output.total.shape:
            raise ValueError(
                f"{modifier.name}.modify_loss must return a loss of the shape that it was given, "
                f"{list(output.total.shape)}; got {list(answer.shape)}. Return the loss of every position "
                "as {'per_position_loss': tensor}"
            )
        return answer, False


def _let_go_of_the_graph(modifier: BaseLossModifier) -> None:
    """Detach the modifier's metrics, which would hold the whole graph until the next batch."""
    metrics = modifier._metrics
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"{modifier.name}._metrics must be a mapping of names to numbers; got {type(metrics).__name__}"
        )
    modifier._metrics = {n: v.detach() if isinstance(v, Tensor) else v for n, v in metrics.items()}


def _accepted(modifier: BaseLossModifier, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the modifier's signature accepts."""
    parameters = list(inspect.signature(modifier.modify_loss).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(arguments)
    lacking = [p.name for p in parameters[3:] if p.default is p.empty and p.name not in arguments]
    if lacking:
        raise TypeError(
            f"{modifier.name}.modify_loss takes {lacking[0]!r}, which nobody gave; pass it to the pipeline's "
            f"modify_loss, {lacking[0]}=..., or give it a default"
        )
    return {p.name: arguments[p.name] for p in parameters if p.name in arguments}


def _with_part(output: LossOutput, modifier: BaseLossModifier, loss: Tensor) -> LossOutput:
    """The output with ``loss`` as its total, and the modifier's change as a part."""
    if loss is output.total:
        return output
    added = loss - output.total + output.parts.get(modifier.name, 0.0)
    return replace(output, total=loss, parts={**output.parts, modifier.name: added})
