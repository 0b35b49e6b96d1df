"""``FusedHead``: a model's head, left out of its forward, so that the loss makes the logits a few at a time;
``HeadInput``: what the head sees in that forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lossmith.engine.head.plan import Strategy, check_strategy
from lossmith.integrations.huggingface.after_head import AfterHead, made_up_logits
from lossmith.integrations.huggingface.trial import LENGTH, ROWS, Trial, agreed


class FusedHead:
    """A head [V, D] whose product the model's forward does not make.

    The head is given no positions at all, and so costs nothing. What the model does to its logits has to be
    known first: from a trial before the training, or else from the first batch, where the head is given a few
    positions, and made-up logits go on in place of theirs.

    Args:
        model: one whose logits are those of its output embeddings.
        trial: what :func:`try_out` saw of the model.
        strategy, memory_budget: of :func:`lossmith.linear_cross_entropy`.

    Attributes:
        why_not: why the logits have to be there after all; None while they do not.
        after: what the model does to its logits, or None while that is not known.
    """

    def __init__(
        self, model: Any, trial: Trial, strategy: Strategy = "auto", memory_budget: int | None = None
    ) -> None:
        check_strategy(strategy, memory_budget)
        self.strategy, self.memory_budget = strategy, memory_budget
        self.after: AfterHead | None = None
        self.why_not = _unusual(model.get_output_embeddings())
        if self.why_not is None and trial.why_not is None:
            self.conclude(trial.after)

    @property
    def is_usable(self) -> bool:
        """Whether the forward that begins can do without the logits. A compiled one cannot find out what is
        done to them."""
        return self.why_not is None and (self.after is not None or not torch.compiler.is_compiling())

    def conclude(self, after: AfterHead | None) -> None:
        """Settle whether the head can be left out, by what was seen of the model; None: it does more than
        can be done without it."""
        self.after = after
        if after is None:
            self.why_not = "it makes something else of its logits than is known of it"
            warnings.warn(
                "this model's logits are not hidden @ weight.T, scaled and capped, so they are computed as "
                "always, all at once, and the loss from them. attach(..., materialize_logits=True) says that "
                "you know",
                stacklevel=4,
            )

    def inputs(self, head: nn.Linear, hidden: Tensor) -> dict[str, Any]:
        """What an objective takes in place of logits."""
        assert self.after is not None
        return {
            "hidden_states": hidden,
            "lm_head_weight": head.weight,
            "lm_head_bias": head.bias,
            "lm_head_softcap": self.after.softcap,
            "lm_head_scale": self.after.scale,
            "strategy": self.strategy,
            "memory_budget": self.memory_budget,
        }


class HeadInput:
    """What a model's head gets to see in a forward, kept; it is there anyway, for the head's gradient.

    Args:
        fused: the head, if it may be left out.
    """

    def __init__(self, fused: FusedHead | None) -> None:
        self.fused = fused
        self._listens = self._skips = False
        self._hidden: Tensor | None = None
        self._given: Tensor | None = None

    def watch(self, head: nn.Module) -> list[RemovableHandle]:
        """Hook the head."""
        return [
            head.register_forward_pre_hook(self.on_head),
            head.register_forward_hook(
                self.on_logits, prepend=True
            ),  # other hooks do something to its logits
        ]

    def on_head(self, head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A forward pre-hook of the head."""
        if not self._listens:
            return None
        hidden = self._hidden = inputs[0]
        if not self._skips or self.fused is None:
            return None
        is_known = self.fused.after is not None
        return (hidden[..., :0, :] if is_known else hidden[:ROWS, :LENGTH], *inputs[1:])

    def on_logits(self, head: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        """A forward hook of the head."""
        if not self._skips or self.fused is None or self.fused.after is not None:
            return None
        torch.set_grad_enabled(True)  # the graph shows whether anything else goes into the model's logits
        self._given = made_up_logits(logits)
        return self._given.clone()  # which may be changed in place

    def during(
        self, forward: Callable[[], Any], *, keeps: bool, skips: bool
    ) -> tuple[Any, Tensor | None, bool]:
        """What a forward returns, what the head saw in it, or would have, and whether the head was left out.

        Args:
            forward: the model's, without labels.
            keeps: whether what the head sees is wanted although the head is not left out.
            skips: whether to leave it out.
        """
        if skips and self.fused is not None and self.fused.after is None:
            return self._for_the_first_time(forward, keeps)
        output, hidden = self._run(forward, keeps or skips, skips)
        return output, hidden, skips and hidden is not None

    def _for_the_first_time(self, forward: Callable[[], Any], keeps: bool) -> tuple[Any, Tensor | None, bool]:
        """The same, where what the model does after its head is not known: it shows in this forward, or the
        forward is made again with all logits."""
        assert self.fused is not None
        mine = output = hidden = None
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled()):  # as the hook finds it
                output, hidden = self._run(forward, True, True)
            if self._given is not None and isinstance(output["logits"], Tensor):
                mine = AfterHead.seen(self._given, output["logits"])
        except Exception:  # of made-up logits; what the caller did wrong, the next forward raises again
            mine = None
        finally:
            self._given = None
        if mine is None:
            output, hidden = self._run(forward, keeps, False)
        self.fused.conclude(agreed(Trial(after=mine)).after)
        if self.fused.why_not is None:
            return output, hidden, True
        if mine is not None:  # another rank's model does something else
            output, hidden = self._run(forward, keeps, False)
        return output, hidden, False

    def _run(self, forward: Callable[[], Any], listens: bool, skips: bool) -> tuple[Any, Tensor | None]:
        self._listens, self._skips, self._hidden = listens, skips, None
        try:
            return forward(), self._hidden
        finally:
            self._listens = self._skips = False
            self._hidden = None


def _unusual(head: Any) -> str | None:
    """Why a head's weight cannot be used by itself, or None."""
    if head is None:
        return "it shows no head"
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}"  # LoRA's, a quantised one
    if hasattr(head, "_hf_hook"):
        return "its head is moved between devices"
    if "forward" in vars(head):
        return "its head has a forward of its own"
    if hasattr(head.weight, "ds_id"):
        return "ZeRO-3 has its head's weight only inside the head's forward"
    return None
