"""``FusedHead``: a model's head, left out of its forward; the loss makes the logits chunk by chunk."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lossmith.core.distributed import num_ranks
from lossmith.engine.head.plan import HeadOptions
from lossmith.engine.predictions import Predictions
from lossmith.integrations.huggingface.trial import LENGTH, ROWS, AfterHead, Trial, agreed, made_up_logits
from lossmith.objectives.inputs import scaled_head

ASKED = "it was asked to"

# The output of a forward, the hidden states before the head, and the predictions: logits or a linear head.
Forward = tuple[Any, Tensor | None, Tensor | Predictions]


class FusedHead:
    """A model's head [V, D], hooked in the model's forward, and left out of it where possible.

    A head that is left out gets no positions and so costs nothing. That requires knowing what the model does
    to its logits: from a trial before training, or else from the first batch, in which the head gets a few
    positions and made-up logits replace its output. A head that replaces the first, with adapters, quantised
    or resized, is looked at in the same way. All ranks leave it out, or none: their collectives must pair up.
    """

    def __init__(
        self,
        model: Any,
        trial: Trial,
        options: HeadOptions | None = None,
        *,
        materialize: bool | None = None,
    ) -> None:
        self.options = options or HeadOptions()
        self.after: AfterHead | None = None  # what the model does to its logits, once known
        # Why the logits must be materialised; None if they need not be.
        why_not = ASKED if materialize else unusual(model.get_output_embeddings())
        self.why_not = _agreed_reason(why_not)
        if self.why_not is not None and not self.why_not.endswith(ASKED):
            _say(self.why_not)
        self.leaves_out_always = materialize is False  # in evaluation, too
        self._head: nn.Module | None = None
        self._handles: list[RemovableHandle] = []
        self._listens = self._skips = False
        self._hidden: Tensor | None = None
        self._given: Tensor | None = None
        if self.why_not is None and trial.why_not is None:
            self._conclude(trial.after)

    def watch(self, model: Any) -> None:
        """Hook the model's head, if it exposes one."""
        head = self._head = model.get_output_embeddings()
        if head is not None:
            before = head.register_forward_pre_hook(self._on_head)
            # first, since other hooks may change the logits
            self._handles = [before, head.register_forward_hook(self._on_logits, prepend=True)]

    def unwatch(self) -> None:
        """Undo :meth:`watch`."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._head = [], None

    def _follow(self, model: Any) -> bool:
        """Watch the head that the model has now; return whether that is the one that is watched."""
        head = model.get_output_embeddings()
        if head is not self._head and not torch.compiler.is_compiling():
            self.unwatch()
            self.watch(model)
            if not (self.why_not or "").endswith(ASKED):
                self.after, self.why_not = None, unusual(head)
                if self.why_not is not None:
                    _say(self.why_not)
        return head is self._head

    def run(
        self, model: Any, forward: Callable[[], Any], *, leaves_out: bool, listens: bool = False
    ) -> Forward:
        """Run the model without labels, with the head left out if that is wanted and possible; ``listens``
        asks for the hidden states in any case."""
        is_watched = self._follow(model)
        # A compiled forward cannot find out what happens to the logits.
        is_known = self.after is not None
        leaves_out = (leaves_out or self.leaves_out_always) and self.why_not is None and is_watched
        leaves_out = leaves_out and (is_known or not torch.compiler.is_compiling())
        if leaves_out and _is_sharded_apart(self._head):
            # Else its weight is gone after its own forward, and gathered again for the loss.
            self._head.set_reshard_after_forward(False)  # pyright: ignore
        if leaves_out and not is_known:
            output, hidden, leaves_out = self._run_first(forward, listens)
        else:
            output, hidden = self._run(forward, listens or leaves_out, leaves_out)
        if not leaves_out or hidden is None:
            return output, hidden, output["logits"]
        head, after = model.get_output_embeddings(), self.after
        assert after is not None
        options = {"scale": after.scale, "softcap": after.softcap, **self.options.options}
        of_head = as_dtensor(hidden, head.weight) if is_split_by_class(head) else hidden
        return output, hidden, scaled_head(of_head, head.weight, head.bias, **options)

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
        after = agreed(Trial(after=seen)).after
        if after is None:  # also if another rank's model differs: all run again, or none
            output, hidden = self._run(forward, listens, False)
        self._conclude(after)
        return output, hidden, self.why_not is None

    def _conclude(self, after: AfterHead | None) -> None:
        """Decide whether the head can be left out, from what the model was seen to do."""
        self.after = after
        if after is None:
            self.why_not = "it makes something else of its logits than is known of it"
            _say("its logits are not hidden @ weight.T, scaled and capped")

    def _on_head(self, head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A forward pre-hook of the head."""
        if not self._listens:
            return None
        hidden = self._hidden = inputs[0]
        if not self._skips:
            return None
        if self.after is None:
            return hidden[:ROWS, :LENGTH], *inputs[1:]
        least = 1 if is_split_by_class(head) else 0  # DTensor cannot divide what is empty
        return hidden[..., :least, :], *inputs[1:]

    def _on_logits(self, head: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        """A forward hook of the head."""
        if not self._skips or self.after is not None:
            return None
        torch.set_grad_enabled(True)  # the graph shows whether anything else goes into the model's logits
        self._given = made_up_logits(logits)
        return self._given.clone()  # the model may change it in place


def _say(why: str) -> None:
    warnings.warn(
        f"this model's logits are computed as always, all at once, and the loss from them: {why}. "
        "attach(..., materialize_logits=True) says that you know",
        stacklevel=5,
    )


def unusual(head: Any) -> str | None:
    """Why a head's weight cannot be used by itself, or None."""
    if head is None:
        return "it shows no head"
    kind = type(head)
    if _plain_class(head) is not nn.Linear:  # from LoRA, or quantised
        return f"its head is a {kind.__name__ if kind.__name__ != 'Linear' else f'{kind.__module__}.Linear'}"
    if hasattr(head, "_hf_hook"):
        return "its head is moved between devices"
    if "forward" in vars(head) and not is_split_by_class(head):
        return "its head has a forward of its own"
    if type(head.weight) not in (Tensor, nn.Parameter) and not hasattr(head.weight, "full_tensor"):
        return f"its head's weight is a {type(head.weight).__name__}"  # quantised in place
    return None


def is_split_by_class(head: Any) -> bool:
    """Whether transformers' tensor parallelism has split a head by class: its forward takes hidden states
    that are the same on every rank."""
    weight = getattr(head, "weight", None)
    is_split = [placement.is_shard(0) for placement in getattr(weight, "placements", ())] == [True]
    return is_split and getattr(head, "_is_hooked", False)


def as_dtensor(hidden: Tensor, weight: Any) -> Tensor:
    """Hidden states that every rank of the weight's mesh has."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(hidden, weight.device_mesh, [Replicate()], run_check=False)


def unembedding_of(head: Any) -> Tensor | None:
    """A head's weight, [V, D] unless ZeRO-3 has parted it; None if it has none of numbers."""
    weight = getattr(head, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() else None


def _plain_class(head: nn.Module) -> type:
    """The class of a module before ``fully_shard``, which puts a subclass in its place."""
    kind = type(head)
    return kind.__bases__[1] if _is_sharded_apart(head) and len(kind.__bases__) == 2 else kind


def _is_sharded_apart(head: nn.Module | None) -> bool:
    """Whether ``fully_shard`` was given the head by itself: its weight is whole in its own forward only."""
    return hasattr(head, "set_reshard_after_forward")


def _agreed_reason(mine: str | None) -> str | None:
    """Why the logits must be materialised, if they must be on any rank."""
    if num_ranks() == 1:
        return mine
    found: list[Any] = [None] * num_ranks()
    torch.distributed.all_gather_object(found, mine)
    others = [reason for reason in found if reason is not None]
    return mine if mine is not None or not others else f"on another rank, {others[0]}"
