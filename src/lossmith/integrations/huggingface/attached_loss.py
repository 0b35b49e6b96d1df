"""``AttachedLoss``: an objective inside a model, fed with what the model was called with and made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lossmith.equation.output import LossOutput
from lossmith.integrations.huggingface.fused_head import FusedHead, HeadInput
from lossmith.integrations.huggingface.labels import (
    check_num_items,
    label_mask,
    segments,
    targets_of,
    wanted_inputs,
)
from lossmith.objectives.objective import Objective
from lossmith.objectives.unified import UnifiedLoss
from lossmith.options import nearest

# What a caller may pass besides the objective's own inputs.
PER_BATCH = ("denominator", "segment_ids", "token_weight")
# What an objective calls by one name and a model by another.
OTHER_NAMES = {"targets": "labels", "mask": "attention_mask"}


class AttachedLoss(nn.Module):
    """An objective as a part of a model. Its parameters are the model's, so that whatever wraps the model
    trains and synchronises them, but the model's ``state_dict`` does not have them.

    Args:
        objective: the loss.
        known: names of the inputs that the model takes.
        fused: the head whose logits need not be there, or None.
        shift: how many steps ahead the model's logits predict its labels.

    Attributes:
        parts: what the last batch's loss was made of, detached; None before the first.
        observe: what is wanted of every batch besides its loss, made of the output, or None.
        observed: that of the last batch, detached.
        inner: what stood in the model's own ``forward`` attribute when the loss was attached, or None.
    """

    def __init__(
        self, objective: Objective, known: frozenset[str], fused: FusedHead | None, shift: int
    ) -> None:
        super().__init__()
        self.objective = objective
        self.known = known
        self.fused = fused
        self.shift = shift
        self.head_input = HeadInput(fused)
        self.parts: dict[str, Tensor] | None = None
        self.observe: Callable[[LossOutput], Tensor] | None = None
        self.observed: Tensor | None = None
        self.inner: Callable[..., Any] | None = None
        self.handles: list[RemovableHandle] = []
        self.loss_type: Any = None  # the model's own, for detach
        self.frozen: list[nn.Parameter] = []
        self.has_run = False
        self.leaves_out_logits = False  # also where the model is evaluated
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_post_hook(_expect_nothing)

    def wants(self, name: str) -> bool:
        """Whether the objective would use this input now."""
        return name in wanted_inputs(self.objective)

    # ── what the model makes on its way ───────────────────────────────────────────────────────────

    def skips_head(self, model: nn.Module, given: Mapping[str, Any]) -> bool:
        """Whether the loss is to be made without the logits in the forward that begins: in training, unless
        the caller has other hidden states for the objective."""
        if self.fused is None or not self.fused.is_usable or given.get("hidden_states") is not None:
            return False
        return model.training or self.leaves_out_logits

    def after_forward(
        self, model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any], output: Any
    ) -> None:
        """A forward hook of the model.

        Raises:
            RuntimeError: a forward that was put in place of ours took the labels.
        """
        has_run, self.has_run = self.has_run, False
        if inputs.get("labels") is not None and not has_run:
            raise RuntimeError(
                f"the labels went past the {type(self.objective).__name__} that is attached to this model: "
                "something replaced model.forward afterwards, as Liger's fused cross-entropy and TRL's "
                "trainers do. Switch that off, or make the trainer class T(LossTrainer, ThatTrainer)"
            )

    # ── the loss ──────────────────────────────────────────────────────────────────────────────────

    def check(self, inputs: Mapping[str, Any]) -> None:
        """
        Raises:
            TypeError: an input that neither the model nor the objective takes.
        """
        known = {*self.known, *PER_BATCH, *self.objective.input_names}
        for name in inputs:
            if name not in known:
                near = OTHER_NAMES.get(name) or nearest(name, known)
                raise TypeError(
                    f"neither the model nor its {type(self.objective).__name__} takes {name!r}. "
                    + (f"Did you mean {near!r}? " if near else "")
                    + "If a trainer passes it to compute a loss of its own, make the trainer "
                    "class T(LossTrainer, ThatTrainer)"
                )

    def evaluate(
        self,
        predictions: Mapping[str, Any],
        labels: Tensor,
        inputs: Mapping[str, Any],
        given: Mapping[str, Any],
        made: Mapping[str, Any],
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            predictions: ``logits`` [B, T, V], or what :meth:`FusedHead.inputs` has in their place.
            labels: [B, T], as the model takes them.
            inputs: what the model was called with.
            given: what the caller has for the objective.
            made: what the model made for it; the caller's goes first.
            num_items_in_batch: the number of tokens, if the caller has no ``denominator``.
        """
        loss, own = self.objective, dict(given)
        device = next(iter(predictions.values())).device
        labels = labels.to(device)
        denominator = own.pop("denominator", None)
        if denominator is None and num_items_in_batch is not None:
            check_num_items(loss)
            denominator = num_items_in_batch
        ids = inputs.get("input_ids")
        mask = label_mask(inputs.get("attention_mask"), labels)
        if own.get("segment_ids") is None:
            own["segment_ids"] = segments(inputs.get("position_ids"), labels)
        for name, value in made.items():
            if value is not None and own.get(name) is None and self.wants(name):
                own[name] = value
        own = {
            name: value.to(device) if name in PER_BATCH and value is not None else value
            for name, value in own.items()
        }
        output = loss.evaluate(
            targets=targets_of(loss, labels),
            mask=None if mask is None else mask.to(device),
            input_ids=ids.to(device) if ids is not None and ids.shape == labels.shape else None,
            denominator=denominator,
            shift=self.shift,
            **{**own, **predictions},
        )
        self.has_run = True
        self.parts = {name: part.detach() for name, part in _parts(loss, output).items()}
        self.observed = None if self.observe is None else self.observe(output).detach()
        return output.total


def _parts(loss: Objective, output: LossOutput) -> dict[str, Tensor]:
    parts = loss.detailed(output) if isinstance(loss, UnifiedLoss) else output.parts
    return {name: part for name, part in parts.items() if name != "total_loss"}


def _leave_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """The state of a model is that of the model."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        del state_dict[name]


def _expect_nothing(module: nn.Module, incompatible_keys: Any) -> None:
    """And nothing of the loss is missing where a model's state is loaded."""
    missing = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if f".{NAME}." not in f".{name}"]


NAME = "attached_loss"
