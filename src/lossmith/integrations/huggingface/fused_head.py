"""``FusedHead``: a model's head, left out of its forward; the loss makes the logits chunk by chunk."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lossmith.engine.head.plan import HeadOptions
from lossmith.engine.predictions import Predictions
from lossmith.integrations.huggingface.trial import LENGTH, ROWS, AfterHead, Trial, agreed, made_up_logits
from lossmith.objectives.inputs import scaled_head

# The output of a forward, the hidden states before the head, and the predictions: logits or a linear head.
Forward = tuple[Any, Tensor | None, Tensor | Predictions]


class FusedHead:
    """A model's head [V, D], hooked in the model's forward, and left out of it where possible.

    A head that is left out gets no positions and so costs nothing. That requires knowing what the model does
    to its logits: from a trial before training, or else from the first batch, in which the head gets a few
    positions and made-up logits replace its output.
    """

    def __init__(
        self,
        model: Any,
        trial: Trial,
        options: HeadOptions | None = None,
        *,
        materialize: bool = False,
    ) -> None:
        self.options = options or HeadOptions()
        self.after: AfterHead | None = None  # what the model does to its logits, once known
        # Why the logits must be materialised; None if they need not be.
        self.why_not = "it was asked to" if materialize else _unusual(model.get_output_embeddings())
        self._listens = self._skips = False
        self._hidden: Tensor | None = None
        self._given: Tensor | None = None
        if self.why_not is None and trial.why_not is None:
            self._conclude(trial.after)

    def watch(self, model: Any) -> list[RemovableHandle]:
        """Hook the model's head, if it exposes one."""
        head = model.get_output_embeddings()
        if head is None:
            return []
        before = head.register_forward_pre_hook(self._on_head)
        # first, since other hooks may change the logits
        return [before, head.register_forward_hook(self._on_logits, prepend=True)]

    def run(
        self, model: Any, forward: Callable[[], Any], *, leaves_out: bool, listens: bool = False
    ) -> Forward:
        """Run the model without labels, with the head left out if that is wanted and possible; ``listens``
        asks for the hidden states in any case."""
        # A compiled forward cannot find out what happens to the logits.
        is_known = self.after is not None
        leaves_out = leaves_out and self.why_not is None and (is_known or not torch.compiler.is_compiling())
        if leaves_out and not is_known:
            output, hidden, leaves_out = self._run_first(forward, listens)
        else:
            output, hidden = self._run(forward, listens or leaves_out, leaves_out)
        if not leaves_out or hidden is None:
            return output, hidden, output["logits"]
        head, after = model.get_output_embeddings(), self.after
        assert after is not None
        options = {"scale": after.scale, "softcap": after.softcap, **self.options.options}
        return output, hidden, scaled_head(hidden, head.weight, head.bias, **options)

    def _run(self, forward: Callable[[], Any], listens: bool, skips: bool) -> tuple[Any, Tensor | None]:
        """The forward's output, and the input of the head."""
        self._listens, self._skips, self._hidden = listens, skips, None
        try:
            return forward(), self._hidden
        finally:
            self._listens = self._skips = False
            self._hidden = None

    def _run_first(self, forward: Callable[[], Any], listens: bool) -> tuple[Any, Tensor | None, bool]:
        """The same, and whether the head was left out. This forward shows what the model does after its head;
        if it does not, it runs again with all logits."""
        seen = output = hidden = None
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled()):  # restored after the hook changes it
                output, hidden = self._run(forward, True, True)
            if self._given is not None and isinstance(output["logits"], Tensor):
                seen = AfterHead.seen(self._given, output["logits"])
        except Exception:  # due to made-up logits; the next forward raises the caller's own mistakes again
            seen = None
        finally:
            self._given = None
        if seen is None:
            output, hidden = self._run(forward, listens, False)
        self._conclude(agreed(Trial(after=seen)).after)
        if self.why_not is not None and seen is not None:  # another rank's model differs
            output, hidden = self._run(forward, listens, False)
        return output, hidden, self.why_not is None

    def _conclude(self, after: AfterHead | None) -> None:
        """Decide whether the head can be left out, from what the model was seen to do."""
        self.after = after
        if after is None:
            self.why_not = "it makes something else of its logits than is known of it"
            warnings.warn(
                "this model's logits are not hidden @ weight.T, scaled and capped, so they are computed as "
                "always, all at once, and the loss from them. attach(..., materialize_logits=True) says that "
                "you know",
                stacklevel=4,
            )

    def _on_head(self, head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A forward pre-hook of the head."""
        if not self._listens:
            return None
        hidden = self._hidden = inputs[0]
        if not self._skips:
            return None
        return (hidden[:ROWS, :LENGTH] if self.after is None else hidden[..., :0, :], *inputs[1:])

    def _on_logits(self, head: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        """A forward hook of the head."""
        if not self._skips or self.after is not None:
            return None
        torch.set_grad_enabled(True)  # the graph shows whether anything else goes into the model's logits
        self._given = made_up_logits(logits)
        return self._given.clone()  # the model may change it in place


def _unusual(head: Any) -> str | None:
    """Why a head's weight cannot be used by itself, or None."""
    if head is None:
        return "it shows no head"
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}"  # from LoRA, or quantised
    if hasattr(head, "_hf_hook"):
        return "its head is moved between devices"
    if "forward" in vars(head):
        return "its head has a forward of its own"
    if hasattr(head.weight, "ds_id"):
        return "ZeRO-3 has its head's weight only inside the head's forward"
    return None
