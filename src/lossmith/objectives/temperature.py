"""``AdaptiveTemperature``: a temperature that follows how steady the training loss is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from lossmith.core.buffers import put
from lossmith.core.distributed import sum_over_ranks
from lossmith.core.stepping import Stepped
from lossmith.options import option, strict_options
from lossmith.options.shared import LOWEST_DIVISOR, TemperatureBounds


class AdaptiveTemperature(Stepped):
    """A temperature that falls while the loss is steady and rises while it is not.

        cv = std / mean of the last ``window`` steps' negative log-likelihoods (unsmoothed, temperature 1)
        T <- T (1 - rate) where cv < low,  T (1 + rate) where cv > high,  within the bounds

    It moves once per optimizer step, after ``step()`` of an optimizer of the parameters that the loss trains,
    from the second step on; before it has seen ``window`` steps, it uses those it has. All ranks use the same
    temperature. A batch whose loss is not finite is left out. The state is in buffers. A model trained at
    T < 1 predicts flatter distributions than the training loss sees.

    Args:
        initial: the first temperature.
        bounds: the lowest and the highest temperature.
        rate: the relative change per step.
        window: how many of the last steps it looks at.
        low, high: it falls where cv is below ``low`` and rises where cv is above ``high``.

    Attributes:
        value: the temperature, a 0-dimensional tensor.

    Raises:
        TypeError: an unknown option (the message names the nearest), or one of the wrong type.
        ValueError: an option out of range.
    """

    value: Tensor
    history: Tensor
    num_steps: Tensor
    pending: Tensor

    @strict_options
    def __init__(
        self,
        initial: Annotated[float, option("where it begins", low=LOWEST_DIVISOR)] = 1.0,
        *,
        bounds: TemperatureBounds = (0.5, 2.0),
        rate: Annotated[float, option("how far it moves in a step", low=0, below=1)] = 0.01,
        window: Annotated[int, option("how many steps are looked at", low=2)] = 100,
        low: Annotated[float, option("coefficient of variation below which it falls", low=0)] = 0.05,
        high: Annotated[float, option("coefficient of variation above which it rises", low=0)] = 0.1,
    ) -> None:
        super().__init__()
        bottom, top = bounds
        if not bottom <= initial <= top:
            raise ValueError(
                f"expected lowest <= initial <= highest temperature; got bounds={tuple(bounds)} and {initial}"
            )
        if low > high:
            raise ValueError(f"expected low <= high; got {low} and {high}")
        self.bounds, self.rate, self.low, self.high = (bottom, top), rate, low, high
        self.register_buffer("value", torch.tensor(float(initial)))
        self.register_buffer("history", torch.zeros(window))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("pending", torch.zeros(2))  # summed nll, number of tokens

    def observe(self, nll_sum: Tensor, num_tokens: Tensor, loss: Tensor | None = None) -> None:
        """Record a batch.

        Args:
            nll_sum: the summed negative log-likelihood of its tokens.
            num_tokens: how many tokens.
            loss: the batch's loss; its graph tells which optimizer's step to wait for. Default: any.
        """
        seen = torch.stack([nll_sum.detach(), num_tokens.to(nll_sum.dtype)])
        # One bad batch would stay in the mean of every step of the window.
        pending = self.pending.to(seen.device)
        put(self, pending=pending + seen.masked_fill(~seen[0].isfinite(), 0.0))
        self.take_note(loss)

    def advance(self) -> None:
        nll_sum, num_tokens = sum_over_ranks(self.pending, "global").unbind()
        window = len(self.history)
        slot = torch.arange(window, device=self.history.device) == self.num_steps % window
        mean_nll = (nll_sum / num_tokens.clamp(min=1)).to(self.history)
        # A step without supervised tokens carries no information.
        counts = (num_tokens > 0).to(self.history.device)
        put(
            self,
            pending=torch.zeros_like(self.pending),
            history=torch.where(slot & counts, mean_nll, self.history),
            num_steps=self.num_steps + counts,
        )
        variation = self._variation(self.num_steps.clamp(max=window))
        change = torch.where(variation < self.low, 1 - self.rate, 1.0)
        change = torch.where(variation > self.high, 1 + self.rate, change)
        moved = (self.value * change).clamp(*self.bounds)
        put(self, value=torch.where(counts & (self.num_steps > 1), moved, self.value))

    def _variation(self, num_seen: Tensor) -> Tensor:
        """The coefficient of variation of the steps seen so far, the first ``num_seen`` slots."""
        is_seen = torch.arange(len(self.history), device=self.history.device) < num_seen
        mean = self.history.masked_fill(~is_seen, 0.0).sum() / num_seen
        deviation = (self.history - mean).masked_fill(~is_seen, 0.0).square().sum() / num_seen
        return deviation.sqrt() / mean.clamp(min=1e-12)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptiveTemperature:
        """Move with the model but stay in fp32 when it is cast: bf16 would lose a step of one percent."""
        super()._apply(fn, recurse)
        for name in ("value", "history", "pending"):
            setattr(self, name, getattr(self, name).float())
        return self

    def extra_repr(self) -> str:
        return f"bounds={self.bounds}, rate={self.rate}, window={len(self.history)}"
