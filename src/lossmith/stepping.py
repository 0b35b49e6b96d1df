"""``Stepped``: modules whose state advances once per optimizer step, however many batches it takes."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_everyone: weakref.WeakSet[Stepped] = weakref.WeakSet()
_numbers = itertools.count()


class Stepped(nn.Module):
    """State that advances after ``optimizer.step()``, by itself, if there was a batch since the last time.

    Subclasses set ``has_news`` when they take something in, and advance in :meth:`advance`.
    """

    has_news: bool

    def __init__(self) -> None:
        super().__init__()
        self.has_news = False
        self._join()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join()  # a copy has not been through __init__

    def _join(self) -> None:
        self._number = next(_numbers)
        _everyone.add(self)

    def on_optimizer_step(self) -> None:
        """Advance, unless nothing has come since the last time. Called after every ``optimizer.step()``."""
        if self.has_news:
            self.has_news = False
            with torch.no_grad():
                self.advance()

    def advance(self) -> None:
        """Move the state on by what was taken in."""
        raise NotImplementedError


def _after_step(*_: Any) -> None:
    # in the order in which they were made: over ranks their sums have to meet
    for module in sorted(_everyone, key=lambda module: module._number):
        module.on_optimizer_step()


register_optimizer_step_post_hook(_after_step)
