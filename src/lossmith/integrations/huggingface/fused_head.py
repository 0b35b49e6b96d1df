"""``FusedHead``: a model's head, left out of its forward, so that the loss makes the logits a few at a time;
``HeadInput``: what the head sees in that forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lossmith.engine.blocks import accumulation_dtype
from lossmith.engine.plan import Strategy, check_strategy

# What models do to their logits after the head, and where their configurations say so.
# Gemma 2, 3; Griffin; xLSTM
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
DIVISORS = ("logits_scaling",)  # Granite


class FusedHead:
    """A head [V, D] whose product the model's forward does not make.

    The head is given no positions at all, and so costs nothing. On the first batch it is given one, to see
    whether what the model makes of its logits is what is known of it.

    Args:
        model: one whose logits are those of its output embeddings.
        strategy, memory_budget: of :func:`lossmith.linear_cross_entropy`.

    Attributes:
        why_not: why the logits have to be there after all; None while they do not.
    """

    def __init__(self, model: Any, strategy: Strategy = "auto", memory_budget: int | None = None) -> None:
        check_strategy(strategy, memory_budget)
        self.strategy, self.memory_budget = strategy, memory_budget
        self.has_been_compared = False
        self.why_not = _unusual(model.get_output_embeddings())
        config = getattr(model.config, "get_text_config", lambda: model.config)()
        self.softcap = _first(config, SOFTCAPS)
        self.scale = (_first(config, FACTORS) or 1.0) / (_first(config, DIVISORS) or 1.0)

    def seen_by_head(self, hidden: Tensor) -> Tensor:
        """What of the hidden states [..., T, D] the head gets to see."""
        return hidden[..., :0, :] if self.has_been_compared else hidden[:1, :1]

    def inputs(self, head: nn.Linear, hidden: Tensor) -> dict[str, Any]:
        """What an objective takes in place of logits."""
        return {
            "hidden_states": hidden,
            "lm_head_weight": head.weight,
            "lm_head_bias": head.bias,
            "lm_head_softcap": self.softcap,
            "lm_head_scale": self.scale,
            "strategy": self.strategy,
            "memory_budget": self.memory_budget,
        }

    @torch.no_grad()
    def is_right(self, head: nn.Linear, hidden: Tensor, logits: Tensor) -> bool:
        """Whether the model makes of one position's hidden state what we would; looked at once."""
        if self.has_been_compared or torch.compiler.is_compiling():
            return True
        self.has_been_compared = True
        seen = hidden[:1, :1]
        wide = accumulation_dtype(logits.dtype)
        expected = F.linear(seen.to(head.weight.dtype), head.weight, head.bias).to(wide) * self.scale
        if self.softcap is not None:
            expected = self.softcap * torch.tanh(expected / self.softcap)
        tolerance = 8 * torch.finfo(logits.dtype).eps * float(expected.abs().max().clamp(min=1))
        if logits.shape == expected.shape and bool((logits.to(wide) - expected).abs().max() <= tolerance):
            return True
        self.why_not = "it makes something else of its logits than is known of it"
        warnings.warn(
            "this model's logits are not hidden @ weight.T, capped and scaled as its configuration says, so "
            "they are computed as always, all at once, and the loss from them. attach(..., "
            "materialize_logits=True) says that you know",
            stacklevel=5,
        )
        return False


class HeadInput:
    """What a model's head gets to see in a forward, kept; it is there anyway, for the head's gradient.

    Args:
        fused: the head, if it may be left out.
    """

    def __init__(self, fused: FusedHead | None) -> None:
        self.fused = fused
        self._listens = self._skips = False
        self._hidden: Tensor | None = None

    def on_head(self, head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A forward pre-hook of the head."""
        if not self._listens:
            return None
        self._hidden = inputs[0]
        if not self._skips or self.fused is None:
            return None
        return (self.fused.seen_by_head(inputs[0]), *inputs[1:])

    def during(
        self, forward: Callable[[], Any], head: Any, *, keeps: bool, skips: bool
    ) -> tuple[Any, Tensor | None, bool]:
        """What a forward returns, what the head saw in it, or would have, and whether the head was left out.

        Args:
            forward: the model's, without labels.
            head: the model's, as it is now.
            keeps: whether what the head sees is wanted although the head is not left out.
            skips: whether to leave it out.
        """
        self._listens, self._skips, self._hidden = keeps or skips, skips, None
        try:
            output = forward()
        finally:
            hidden, self._hidden = self._hidden, None
            self._listens = self._skips = False
        if not skips or hidden is None:
            return output, hidden, False
        assert self.fused is not None
        if self.fused.is_right(head, hidden, output["logits"]):
            return output, hidden, True
        return self.during(forward, head, keeps=keeps, skips=False)


def _unusual(head: Any) -> str | None:
    """Why a head's weight cannot be used by itself, or None."""
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}"  # LoRA's, a quantised one, none
    if hasattr(head, "_hf_hook"):
        return "its head is moved between devices"
    if hasattr(head.weight, "ds_id"):
        return "ZeRO-3 has its head's weight only inside the head's forward"
    return None


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    found = (getattr(config, name, None) for name in names)
    return next((float(value) for value in found if value), None)
