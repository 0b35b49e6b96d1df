"""``look_at``: which part of the loss was not finite first, where, and what it was computed from."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.integrations.huggingface.attached_loss import NAME
from lossmith.training.run.loss_call import (
    Caught,
    LossCall,
    Place,
    catching,
    first_bad,
    place_of,
    random_now,
    rows_of,
    same_numbers,
)
from lossmith.training.untrusted import shortened


@dataclass
class MicroBatch:
    """A micro-batch of the step at hand.

    Attributes:
        inputs: what the model is given.
        random: the states of the random numbers before its forward.
        loss, parts, shares: what came out, detached; ``shares`` [K, N] are those of the first K parts.
    """

    inputs: dict[str, Any]
    random: dict[str, Tensor]
    loss: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    shares: Tensor | None = None

    @property
    def is_finite(self) -> bool:
        return self.loss is None or bool(self.loss.isfinite().all())

    @property
    def shape(self) -> torch.Size:
        """That of the labels."""
        return self.inputs["labels"].shape

    def bad_parts(self) -> dict[str, Place | None]:
        """The parts that are not finite, each with the first place at which it is not, if it has one."""
        found: dict[str, Place | None] = {}
        for k, (name, part) in enumerate(self.parts.items()):
            if not bool(part.isfinite().all()):
                own = None if self.shares is None or k >= len(self.shares) else self.shares[k]
                found[name] = None if own is None else place_of(first_bad(own), self.shape)
        return found


@dataclass
class Diagnosis:
    """What is known of a step that was not finite.

    Attributes:
        step, number: the step, and the micro-batch in it.
        is_loss: whether the loss was not finite, rather than a gradient.
        parts: the parts that were not finite, or whose gradient was not, each with the first place.
        origin: what was not finite first, in words.
        token: the token to be predicted at the first place.
        batch: the micro-batch.
        rank: the process whose it is, if there are several.
        call: what the loss was given; None if that is not known.
    """

    step: int
    number: int
    is_loss: bool
    parts: dict[str, Place | None]
    origin: str
    token: str = ""
    batch: MicroBatch | None = None
    call: LossCall | None = None
    rank: int | None = None

    @property
    def place(self) -> Place | None:
        return next(filter(None, self.parts.values()), None)

    @property
    def said(self) -> str:
        """It in one sentence."""
        names = ", ".join(self.parts)
        if self.is_loss:
            what = f"{names} not finite" if names else "the loss was not finite"
        else:
            what = "the loss was finite and the gradient" + (f" of {names}" if names else "") + " not"
        where = f" at {self.place}" if self.place else ""
        token = f" (predicting {self.token!r})" if self.token else ""
        micro = f", micro-batch {self.number}" if self.number else ""
        rank = "" if self.rank is None else f", rank {self.rank}"
        return f"step {self.step}{rank}{micro}: {what}{where}{token}; {self.origin}"


class Step:
    """The micro-batches of the step at hand, kept until the next begins."""

    def __init__(self) -> None:
        self.after = -1  # how many steps had ended when this one began
        self.batches: list[MicroBatch] = []

    def begin(self, inputs: Mapping[str, Any], after: int) -> None:
        """Keep a micro-batch before its forward."""
        if after != self.after:
            self.after, self.batches = after, []
        self.batches.append(MicroBatch(dict(inputs), random_now(inputs["labels"])))

    def first_bad(self) -> tuple[int, MicroBatch] | None:
        """The first micro-batch whose loss is not finite."""
        return next(((k, b) for k, b in enumerate(self.batches) if not b.is_finite), None)


@dataclass
class Again:
    """What a second forward of a micro-batch showed, with the weights that it had.

    Attributes:
        parameter: the first parameter that is not finite.
        module: the first module whose output is not finite.
        call: what the loss was given.
        order: the names of the modules, in the order in which they ended.
    """

    parameter: str | None
    module: str | None
    call: LossCall | None
    order: list[str]


def look_at(
    step: Step,
    number: int,
    is_loss: bool,
    model: nn.Module,
    objective: nn.Module,
    precision: Callable[[], Any],
    *,
    is_alone: bool = True,
) -> Diagnosis:
    """Find out what was not finite in a step that has not moved the weights yet.

    Args:
        step: its micro-batches.
        number: the step's number.
        is_loss: whether a loss was not finite, rather than a gradient.
        model: the model, without wrappers.
        objective: the one that the model's forward calls; a copy of it is asked, so that its state stays.
        precision: makes the context in which a forward runs.
        is_alone: whether there are no other processes, with which the loss might have to be computed.
    """
    found = step.first_bad()
    k, batch = found or (0, step.batches[0])
    known = Diagnosis(number, k, is_loss, batch.bad_parts(), "", batch=batch)
    try:
        if found is not None:
            of_a_loss(known, forward_again(batch, model, objective, precision))
            return known
        if not is_alone:
            known.origin = "where it began is not looked for in several processes"
            return known
        for k, batch in enumerate(step.batches):
            one = Diagnosis(number, k, is_loss, {}, "", batch=batch)
            of_a_gradient(one, forward_again(batch, model, objective, precision), model, objective, precision)
            if one.origin:
                return one
        known.origin = "computed again, everything is finite: look at random numbers, and at the machine"
    except Exception as error:  # of many classes; the run has failed already, and says so
        known.origin = f"what came before it could not be computed again ({shortened(str(error))})"
    return known


def forward_again(
    batch: MicroBatch,
    model: nn.Module,
    objective: nn.Module,
    precision: Callable[[], Any],
    *,
    with_graph: bool = False,
) -> Again:
    """Run the model up to its loss once more."""
    parameter = next((n for n, p in model.named_parameters() if not bool(p.detach().isfinite().all())), None)
    with contextlib.ExitStack() as stack:
        for context in (torch.set_grad_enabled(with_graph), precision(), same_numbers(batch.random)):
            stack.enter_context(context)
        order, bad = stack.enter_context(listening(model))
        calls = stack.enter_context(catching(objective))
        with contextlib.suppress(Caught):
            model(**batch.inputs)
    return Again(parameter, next(iter(bad), None), calls[0] if calls else None, order)


def of_a_loss(known: Diagnosis, again: Again) -> None:
    """Complete the diagnosis of a loss that is not finite."""
    known.call = call = again.call
    source = None if call is None else call.source
    if known.place is None and call is not None and source is not None:  # scores belong to no token
        place = place_of(first_bad(rows_of(source, call.shape)), call.shape)
        known.parts = {name: own or place for name, own in known.parts.items()}
    known.origin = origin_of(again, known.place)


def origin_of(again: Again, place: Place | None) -> str:
    """What was not finite first, from the weights to the loss."""
    call = again.call
    if again.parameter is not None:
        return f"the parameter {again.parameter} was not finite before this step"
    if call is None or call.source is None:
        return "the model's predictions are of a kind that is not looked at"
    is_head = call.source is not call.predictions
    made = "hidden states" if is_head else "logits"
    if again.module is not None and not bool(call.source.isfinite().all()):
        return f"the weights were finite, and the output of {again.module} was the first that was not"
    if not bool(call.source.isfinite().all()):
        return f"the weights were finite and the {made} not"
    logits = None if place is None else call.logits_at(place)
    if logits is not None and not bool(logits.isfinite().all()):
        return "the weights and hidden states were finite and the logits there not"
    if place is None:
        return f"the weights and {made} were finite"
    hidden = ", hidden states" if is_head else ""
    return f"the weights{hidden} and logits there were finite, so it began in the loss"


def of_a_gradient(
    known: Diagnosis, again: Again, model: nn.Module, objective: nn.Module, precision: Callable[[], Any]
) -> None:
    """Complete the diagnosis of a gradient that is not finite, of a loss that is; its origin stays empty if
    it is another micro-batch's."""
    known.call, batch = again.call, known.batch
    if again.parameter is not None:
        known.origin = f"the parameter {again.parameter} was not finite before this step"
        return
    if again.call is None or batch is None or again.call.source is None:
        return
    parts = again.call.examine(copy.deepcopy(objective))
    known.parts = {part.name: part.place for part in parts if not part.has_finite_gradient}
    if known.parts:
        known.origin = "the weights and predictions were finite, so it began in the loss"
        return
    # The gradients that the run has are clipped: one that is no number has spread to all of them.
    source = forward_again(batch, model, objective, precision, with_graph=True).call
    if source is None or source.source is None or not source.source.requires_grad:
        return
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    upstream = again.call.gradient(copy.deepcopy(objective))
    found = torch.autograd.grad(source.source, [p for _, p in named], upstream, allow_unused=True)
    those = [
        n for (n, _), g in zip(named, found, strict=True) if g is not None and not bool(g.isfinite().all())
    ]
    if those:  # the way back goes from the last module to the first
        places = {name: k for k, name in enumerate(again.order)}
        those.sort(key=lambda name: places.get(name.rpartition(".")[0], -1))
        before = f", before those of {len(those) - 1} more" if len(those) > 1 else ""
        known.origin = (
            f"it is finite where the loss begins; in the model, {those[-1]} is where it is not{before}"
        )


@contextlib.contextmanager
def listening(model: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """While entered, the names of the modules in the order in which they end, and of those whose output is
    not finite."""
    order: list[str] = []
    bad: list[str] = []

    def listen(name: str) -> Callable[..., None]:
        def hear(module: nn.Module, inputs: Any, output: Any) -> None:
            order.append(name)
            if not all(bool(value.isfinite().all()) for value in tensors_in(output)):
                bad.append(name)

        return hear

    own = [(n, m) for n, m in model.named_modules() if n and NAME not in n.split(".")]
    hooks = [module.register_forward_hook(listen(name)) for name, module in own]
    try:
        yield order, bad
    finally:
        for hook in hooks:
            hook.remove()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a module's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, Mapping):
        yield from tensors_in([*value.values()])
