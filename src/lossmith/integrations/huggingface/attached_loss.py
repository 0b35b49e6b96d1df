"""``AttachedLoss``: an objective inside a model, fed with the model's inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lossmith.engine.predictions import Predictions, source_of
from lossmith.equation.output import LossOutput
from lossmith.integrations.huggingface.fused_head import FusedHead, unembedding_of
from lossmith.integrations.huggingface.labels import evaluate, label_mask, segments, targets_of
from lossmith.objectives.objective import Objective
from lossmith.options import nearest

NAME = "attached_loss"
FSDP1 = "_fsdp_wrapped_module."  # in the names of what FullyShardedDataParallel has wrapped
# Inputs that a caller may pass besides the objective's own.
PER_BATCH = ("denominator", "segment_ids", "token_weight", "sequence")
# Targets that are aligned already. No signature shows it: the Trainer would wait for it in every batch.
SHIFTED = "shift_labels"
# An objective's name for an input -> the model's name for it.
OTHER_NAMES = {"targets": "labels", "mask": "attention_mask"}


class AttachedLoss(nn.Module):
    """An objective as a submodule of a model. Its parameters count as the model's, so that whatever wraps the
    model trains and synchronises them, but the model's ``state_dict`` leaves them out."""

    def __init__(self, objective: Objective, known: frozenset[str], fused: FusedHead, shift: int) -> None:
        super().__init__()
        self.objective = objective
        self.known = known  # names of the inputs that the model takes
        self.fused = fused  # the model's head
        self.shift = shift  # how many steps ahead the model's logits predict its labels
        self.leaves_out_logits = False  # in evaluation too
        # Of the last batch, detached: the parts of its loss, and what `observe` returned for its output and
        # for what that was computed from, the input of the model's head or else the logits.
        self.parts: dict[str, Tensor] | None = None
        self.observe: Callable[[LossOutput, Tensor], Tensor] | None = None
        self.observed: Tensor | None = None
        # For detach: the model's own forward and loss_type, if any, and the parameters that were frozen.
        self.inner: Callable[..., Any] | None = None
        self.loss_type: Any = None
        self.frozen: list[nn.Parameter] = []
        self.handles: list[RemovableHandle] = []
        self._has_run = False
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_post_hook(_expect_nothing)

    def run(
        self, model: Any, forward: Callable[..., Any], inputs: dict[str, Any], given: Mapping[str, Any]
    ) -> Any:
        """The model's output for a batch with labels: its own output, with the objective's loss in it.

        Args:
            model, forward: the model that holds this, and its forward without the loss.
            inputs, given: the model's inputs, and what else the caller passes to the objective.
        """
        self._check_names({**inputs, **given})
        labels, num_items = inputs.pop("labels"), inputs.pop("num_items_in_batch", None)
        as_dict = inputs.pop("return_dict", None)
        if as_dict is None:
            as_dict = getattr(model.config, "return_dict", True)
        wanted = self.objective.wanted_inputs
        asks_routers = "gate_logits" in wanted and given.get("gate_logits") is None
        were_asked = inputs.get("output_router_logits")
        if were_asked is None:
            were_asked = getattr(model.config, "output_router_logits", False)
        if asks_routers:
            inputs["output_router_logits"] = True
        inputs["return_dict"] = True
        leaves_out = model.training or self.leaves_out_logits
        output, hidden, predictions = self.fused.run(
            model,
            lambda: forward(**inputs),  # without labels it adds no loss of its own
            # a tuple keeps its places, and the caller's hidden states may differ from the head's
            leaves_out=leaves_out and as_dict and given.get("hidden_states") is None,
            listens="hidden_states" in wanted,
        )
        if asks_routers and not output.get("router_logits"):
            raise ValueError(
                f"the objective balances experts, and {type(model).__name__} returns no router_logits; pass "
                "gate_logits=, or give the component a weight of 0"
            )
        made = {
            "hidden_states": hidden,
            "lm_head_weight": unembedding_of(model.get_output_embeddings()),
            **self.fused.options.options,
            "gate_logits": [z for z in output.get("router_logits") or () if z is not None] or None,
            "segment_ids": segments(inputs.get("position_ids"), labels),
        }
        own = {name: value for name, value in given.items() if value is not None}
        used = {"segment_ids", *wanted} - own.keys()  # the caller's come first
        own |= {name: value for name, value in made.items() if value is not None and name in used}
        loss = self._evaluate(predictions, hidden, labels, num_items, inputs, own)
        left_out = () if were_asked or not asks_routers else ("router_logits", "aux_loss")
        left_out += ("logits",) if isinstance(predictions, Predictions) else ()
        values = {name: value for name, value in output.items() if name not in left_out}
        result = type(output)(**{**values, "loss": loss})
        return result if as_dict else result.to_tuple()

    def _check_names(self, inputs: Mapping[str, Any]) -> None:
        """Refuse an input that neither the model nor the objective takes."""
        known = {*self.known, *PER_BATCH, SHIFTED, *self.objective.input_names}
        for name in inputs:
            if name not in known:
                near = OTHER_NAMES.get(name) or nearest(name, known)
                raise TypeError(
                    f"neither the model nor its {type(self.objective).__name__} takes {name!r}. "
                    + (f"Did you mean {near!r}? " if near else "")
                    + "If a trainer passes it to compute a loss of its own, make the trainer "
                    "class T(LossTrainer, ThatTrainer)"
                )

    def _evaluate(
        self,
        predictions: Tensor | Predictions,
        hidden: Tensor | None,
        labels: Tensor,
        num_items: Any,
        inputs: Mapping[str, Any],
        own: dict[str, Any],
    ) -> Tensor:
        """The loss of a batch; records its parts and what `observe` returns."""
        ids = inputs.get("input_ids")
        per_token = {
            "mask": label_mask(inputs.get("attention_mask"), labels),
            "input_ids": ids if ids is not None and ids.shape == labels.shape else None,
            "segment_ids": own.get("segment_ids"),
            "token_weight": own.get("token_weight"),
        }
        shifted, shift = own.pop(SHIFTED, None), self.shift
        if shifted is not None:  # as trainers shift them before they cut sequences, or join them
            labels, shift = shifted, 0
            mask = per_token["mask"]  # of the tokens, not of what they predict
            per_token |= {"attention_mask": mask, "mask": shifted.new_ones(shifted.shape)}
        own |= {n: value.to(predictions.device) for n, value in per_token.items() if value is not None}
        output = evaluate(self.objective, predictions, labels, num_items, shift=shift, **own)
        self._has_run = True
        self.parts = {name: part.detach() for name, part in output.parts.items()}
        if self.observe is not None:
            source = source_of(predictions) if hidden is None else hidden
            self.observed = self.observe(output, source).detach()
        return output.total

    def count(self, labels: Tensor, attention_mask: Any = None) -> Tensor:
        """What the objective divides by, for the model's labels [B, T]."""
        mask = label_mask(attention_mask, labels)
        return self.objective.count(targets_of(self.objective, labels), mask=mask, shift=self.shift)

    def after_forward(self, model: nn.Module, args: Any, inputs: Mapping[str, Any], output: Any) -> None:
        """A forward hook of the model: refuse labels that another forward in place of ours consumed."""
        has_run, self._has_run = self._has_run, False
        if inputs.get("labels") is not None and not has_run:
            raise RuntimeError(
                f"the labels went past the {type(self.objective).__name__} that is attached to this model: "
                "something replaced model.forward afterwards, as Liger's fused cross-entropy and TRL's "
                "trainers do. Switch that off, or make the trainer class T(LossTrainer, ThatTrainer)"
            )


def _leave_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A state_dict hook: leave the loss out of the model's state, but for what FSDP1 holds and would miss."""
    held = module.named_parameters() if FSDP1 in prefix else ()
    kept = {f"{prefix}{name}" for name, _ in held}
    for name in [name for name in state_dict if name.startswith(prefix) and name not in kept]:
        del state_dict[name]


def _expect_nothing(module: nn.Module, incompatible_keys: Any) -> None:
    """A load hook: report nothing of the loss as missing from a model's state."""
    missing = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if f".{NAME}." not in f".{name}"]
