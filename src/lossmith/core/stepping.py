"""``Stepped``: modules whose state advances once per optimizer step, however many batches that takes.

PyTorch leads from a loss to its parameters, but not from a parameter to its optimizer. So one hook observes
every ``optimizer.step()`` in the process once the first ``Stepped`` is made, and each module advances only at
the steps of its own optimizer: see :class:`Stepped`.
"""

from __future__ import annotations

import functools
import itertools
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

# A module warns that it is waiting after this many batches followed only by another optimizer's step.
PATIENCE = 1000

_everyone: weakref.WeakSet[Stepped] = weakref.WeakSet()
_numbers = itertools.count()


class Stepped(nn.Module):
    """State that advances by itself after ``optimizer.step()``, if there was a batch since the last time.

    A step counts if the optimizer holds a parameter in which the loss of one of those batches has a gradient.
    If the parameters cannot be traced, the step of any optimizer counts: the loss itself is compiled or has
    no gradient, a reentrant checkpoint hides them, or the optimizer holds others in their place (FSDP).

    Subclasses call :meth:`take_note` when they record something, and advance in :meth:`advance`.
    """

    has_news: bool

    def __init__(self) -> None:
        super().__init__()
        self.has_news = False
        self._trained: set[int] | None = set()  # ids of parameters; None if not traceable
        self._is_fresh = False  # a batch has come since the last step of any optimizer
        self._passed_by = 0
        self._join()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._trained = None if self.has_news else set()  # a copy has the original's ids
        self._join()  # __init__ has not run

    def _join(self) -> None:
        self._number = next(_numbers)
        _everyone.add(self)
        _listen()

    def take_note(self, loss: Tensor | None = None) -> None:
        """Note that there is something to advance by, from a batch with this loss."""
        self.has_news = self._is_fresh = True
        found = None if loss is None else trained_by(loss)
        self._trained = None if found is None or self._trained is None else self._trained | found

    def on_optimizer_step(self) -> None:
        """Advance, unless nothing has come since the last time. Runs after each ``optimizer.step()`` of this
        module's optimizer; call it yourself if the optimizer is not PyTorch's."""
        if self.has_news:
            self.has_news = False
            self._trained, self._passed_by = set(), 0
            with torch.no_grad():
                self.advance()

    def advance(self) -> None:
        """Advance the state by what was recorded."""
        raise NotImplementedError

    def after_step(self, parameters: list[Tensor]) -> None:
        """Advance if the step of an optimizer with these parameters counts."""
        if not self.has_news:
            return
        if not self._trained or any(id(p) in self._trained or _is_sharded(p) for p in parameters):
            self.on_optimizer_step()
            return
        self._passed_by += self._is_fresh
        if self._passed_by == PATIENCE and self._is_fresh:
            warnings.warn(
                f"{type(self).__name__} waits for the step of an optimizer that has a parameter of the "
                f"loss's graph, and after {PATIENCE} batches only others have stepped; call the objective's "
                "on_optimizer_step() after each step, as DeepSpeed needs it",
                stacklevel=2,
            )
        self._is_fresh = False


def trained_by(loss: Tensor) -> set[int] | None:
    """Ids of the leaves in which ``loss`` has a gradient; None if some cannot be traced."""
    if torch.compiler.is_compiling() or loss.grad_fn is None:
        return None
    found: set[int] = set()
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            found.add(id(node.variable))
        elif kind == "CheckpointFunctionBackward":
            return None
        waiting.extend(following for following, _ in node.next_functions if following is not None)
    return found


def _is_sharded(parameter: Tensor) -> bool:
    """Whether FSDP holds it in the place of another: a DTensor (FSDP2), or a view of a flat one (FSDP1)."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "_fsdp_flattened")


@functools.cache
def _listen() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # in order of creation: their sums over ranks must pair up
    for module in sorted(_everyone, key=lambda module: module._number):
        module.after_step(parameters)
