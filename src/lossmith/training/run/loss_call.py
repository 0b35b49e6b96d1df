"""``LossCall``: what an objective was given for one batch, and each part of the loss that it makes of it."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.engine.head.linear_head import LinearHead
from lossmith.engine.predictions import Logits, Predictions
from lossmith.equation.batch import as_rows
from lossmith.equation.output import LossOutput


@dataclass(frozen=True)
class Place:
    """A sample of a batch, and a position of its predictions if there are several."""

    sample: int
    position: int | None = None

    def __str__(self) -> str:
        return f"sample {self.sample}" + ("" if self.position is None else f", position {self.position}")


@dataclass(frozen=True)
class Examined:
    """A part of a loss.

    Attributes:
        name, value: the part.
        norm: of its gradient in what it was computed from, the hidden states or the logits.
        place: the first place at which it, or its gradient, is not finite; else that of its largest value.
            None if it belongs to no token.
    """

    name: str
    value: float
    norm: float
    place: Place | None

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.value)

    @property
    def has_finite_gradient(self) -> bool:
        return math.isfinite(self.norm)


@dataclass(frozen=True)
class LossCall:
    """What an objective's ``evaluate`` was given.

    Attributes:
        predictions: logits (of a scorer, scores), or predictions of another kind.
        inputs: the other arguments by name, ``targets`` among them.
        autocast: the dtype of the products if they were made under autocast.
        random: the states of the random numbers at the call.
    """

    predictions: Any
    inputs: Mapping[str, Any]
    autocast: torch.dtype | None = None
    random: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def source(self) -> Tensor | None:
        """The hidden states of a head, or the logits; None for predictions of another kind."""
        return source_of(self.predictions)

    @property
    def shape(self) -> torch.Size:
        """That of the targets."""
        return self.inputs["targets"].shape

    def logits_at(self, place: Place) -> Tensor | None:
        """[V] the logits of a place."""
        with torch.no_grad():
            row = (
                rows_of(self.source, self.shape)[flat(place, self.shape)] if self.source is not None else None
            )
            if row is None or not isinstance(self.predictions, LinearHead):
                return row
            head, one = self.predictions, row[None]
            with self.under_autocast(one.device):
                return replace(head, hidden=one, strategy="auto").logits()[0]

    def under_autocast(self, device: torch.device) -> Any:
        """The precision of the call."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)

    def examine(self, objective: Any) -> list[Examined]:
        """Compute the loss again, part by part."""
        if self.source is None:
            return []
        leaf, output = self._evaluate(objective, self.source)
        return [
            examined(name, part, leaf, shares_of(output, k), self.shape)
            for k, (name, part) in enumerate(output.parts.items())
        ]

    def gradient(self, objective: Any) -> Tensor:
        """That of the loss in `source`."""
        assert self.source is not None
        leaf, output = self._evaluate(objective, self.source)
        return torch.autograd.grad(output.total, leaf)[0]

    def _evaluate(self, objective: Any, source: Tensor) -> tuple[Tensor, LossOutput]:
        """The loss, and the leaf that it was made from."""
        leaf = source.detach().requires_grad_()
        with torch.enable_grad(), self.under_autocast(leaf.device), same_numbers(self.random):
            return leaf, objective.evaluate(on(self.predictions, leaf), **self._inputs_on(leaf))

    def _inputs_on(self, leaf: Tensor) -> dict[str, Any]:
        """The inputs without their graphs, and with ``leaf`` in place of the hidden states."""
        source = self.source

        def fresh(value: Any) -> Any:
            if value is source:
                return leaf
            if isinstance(value, list | tuple):
                return [fresh(each) for each in value]
            return value.detach() if isinstance(value, Tensor) else value

        return {name: fresh(value) for name, value in self.inputs.items()}


def source_of(predictions: Any) -> Tensor | None:
    """What gradients are taken in: the hidden states of a head, or the logits; None if there is neither."""
    if isinstance(predictions, LinearHead):
        return predictions.hidden
    values = predictions.values if isinstance(predictions, Logits) else predictions
    return values if isinstance(values, Tensor) else None


def on(predictions: Any, leaf: Tensor) -> Any:
    """The same predictions from a leaf, with no gradient in anything else."""
    if isinstance(predictions, LinearHead):
        bias = None if predictions.bias is None else predictions.bias.detach()
        return replace(predictions, hidden=leaf, weight=predictions.weight.detach(), bias=bias)
    return leaf


def examined(name: str, part: Tensor, leaf: Tensor, shares: Tensor | None, shape: torch.Size) -> Examined:
    """A part of a loss, with its gradient in ``leaf``."""
    gradient = None
    if part.requires_grad:
        (gradient,) = torch.autograd.grad(part, leaf, retain_graph=True, allow_unused=True)
    value, place = part.item(), None
    if shares is not None and len(shares):
        place = place_of(first_bad(shares), shape) or place_of(int(shares.abs().argmax()), shape)
    norm = 0.0
    if gradient is not None:
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64).item()
        if math.isfinite(value) and not math.isfinite(norm):
            place = place_of(first_bad(rows_of(gradient, shape)), shape)
    return Examined(name, value, norm, place)


def shares_of(output: LossOutput, index: int) -> Tensor | None:
    """[N] what each token adds to a part, its weight included; None for a part that belongs to no token."""
    if index >= len(output.shares):
        return None
    own = output.shares[index]
    if output.batch is None:
        return own
    # a weight that is no number makes the part one, too
    return torch.where(output.batch.scale.isfinite(), own, output.batch.scale.to(own))


def first_bad(values: Tensor) -> int | None:
    """The first of [N] or [N, ...] values that is not finite."""
    bad = (~values.detach().reshape(len(values), -1).isfinite()).any(-1).nonzero()
    return int(bad[0, 0]) if len(bad) else None


def rows_of(values: Any, shape: torch.Size) -> Tensor:
    """Values of every place as [N, ...]."""
    return values.reshape(shape.numel(), -1)


def place_of(index: int | None, shape: torch.Size) -> Place | None:
    """A place by its number among all of ``shape``."""
    if index is None:
        return None
    if len(shape) < 2:
        return Place(index)
    return Place(*divmod(index, as_rows(shape)[1]))


def flat(place: Place, shape: torch.Size) -> int:
    """The number of a place among all of ``shape``."""
    return place.sample if place.position is None else place.sample * as_rows(shape)[1] + place.position


class Caught(BaseException):
    """The objective was called; no error, so that nothing on the way handles it as one."""


@contextlib.contextmanager
def catching(objective: nn.Module) -> Iterator[list[LossCall]]:
    """While entered, a call of the objective's ``evaluate`` is kept in the list and raises `Caught`."""
    found: list[LossCall] = []

    def evaluate(logits: Any = None, targets: Any = None, **inputs: Any) -> LossOutput:
        given = {name: value for name, value in inputs.items() if value is not None}
        found.append(
            LossCall(logits, {"targets": targets, **given}, autocast_of(logits), random_now(targets))
        )
        raise Caught

    vars(objective)["evaluate"] = evaluate
    try:
        yield found
    finally:
        del vars(objective)["evaluate"]


def autocast_of(predictions: Tensor | Predictions) -> torch.dtype | None:
    """The dtype that autocast gave to a head's products; None without it."""
    if not isinstance(predictions, LinearHead) or predictions.compute_dtype == predictions.hidden.dtype:
        return None
    return predictions.compute_dtype


# ── random numbers ────────────────────────────────────────────────────────────────────────────────


def random_now(like: Any) -> dict[str, Tensor]:
    """The states of the random numbers: the CPU's, and that of the GPU on which a tensor is."""
    states = {"cpu": torch.get_rng_state()}
    if isinstance(like, Tensor) and like.is_cuda:
        states["cuda"] = torch.cuda.get_rng_state(like.device)
    return states


@contextlib.contextmanager
def same_numbers(states: Mapping[str, Tensor]) -> Iterator[None]:
    """While entered, the random numbers of another time, where they are known; those of now go on
    afterwards."""
    on_gpu = "cuda" in states and torch.cuda.is_available()
    now = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if on_gpu else {})
    set_random({name: state for name, state in states.items() if name in now})
    try:
        yield
    finally:
        set_random(now)


def set_random(states: Mapping[str, Tensor]) -> None:
    """Set the states of the random numbers."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
