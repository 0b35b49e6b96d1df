"""Classes from before ``UnifiedLoss``: each is one underneath, with its former arguments and results."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lossmith.components.component import Component, Weighted
from lossmith.components.mtp import MTP
from lossmith.core.metrics import Source
from lossmith.equation.batch import TokenBatch
from lossmith.equation.output import LossOutput
from lossmith.equation.term import Reads
from lossmith.objectives.inputs import either
from lossmith.objectives.temperature import AdaptiveTemperature
from lossmith.objectives.unified import UnifiedLoss


def _say(old: str, new: str) -> None:
    warnings.warn(f"{old} is UnifiedLoss({new}); use that", DeprecationWarning, stacklevel=3)


class _WhereGiven(Component):
    """A component that sits out batches that come without its inputs.

    Args:
        component: the component.
        inputs: it takes part if one of these is given.
    """

    def __init__(self, component: Component, inputs: Sequence[str]) -> None:
        super().__init__()
        self.component = component
        self.inputs = tuple(inputs)
        self.optional = (*component.required, *component.optional)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def reads(self) -> Reads:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.component.reads

    def also_read(self, batch: TokenBatch, inputs: Mapping[str, Any]) -> Tensor | None:
        return self.component.also_read(batch, inputs) if self._are_given(inputs) else None

    def scalar(self, inputs: Mapping[str, Any], output: LossOutput) -> Tensor | None:
        return self.component.scalar(inputs, output) if self._are_given(inputs) else None

    def token_sum(self, inputs: Mapping[str, Any], output: LossOutput) -> Tensor | None:
        return self.component.token_sum(inputs, output) if self._are_given(inputs) else None

    def metrics(self) -> Mapping[str, Source]:
        return self.component.metrics()

    def _are_given(self, inputs: Mapping[str, Any]) -> bool:
        return any(inputs.get(name) is not None for name in self.inputs)


def _use_where_given(loss: UnifiedLoss, name: str, *inputs: str) -> None:
    if name in loss.components:
        weighted: Any = loss.components[name]
        loss.components[name] = Weighted(_WhereGiven(weighted.component, inputs), weighted.weight)


class DeepSeekLoss(UnifiedLoss):
    """``UnifiedLoss(primary_loss_type="deepseek")``; MTP heads and expert balance join when given inputs.

    Args:
        vocab_size: V.
        hidden_size: D; turns ``use_mtp`` on unless that is given.
        num_experts: E; turns ``use_moe_balancing`` on unless that is given.
        options: of :class:`lossmith.UnifiedLoss`.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int | None = None, num_experts: int | None = None, **options: Any
    ) -> None:
        _say("DeepSeekLoss", "vocab_size, hidden_size, primary_loss_type='deepseek', use_mtp=True, ...")
        on = {"use_mtp": hidden_size is not None, "use_moe_balancing": num_experts is not None}
        options = {**on, **options, "num_experts": num_experts}
        super().__init__(vocab_size, hidden_size, "deepseek", **options)
        _use_where_given(self, "mtp_loss", "hidden_states", "additional_logits")
        _use_where_given(self, "moe_balance_loss", "gate_logits")

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the order of before)
        self,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        gate_logits: Any = None,
        expert_indices: Any = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """The parts, by their former names: ``main_loss``, ``mtp_mtp_loss``, ``moe_balancing_term``,
        ``total_loss`` and whatever else is on; also ``main_temperature`` and ``moe_expert_counts``.

        Args:
            logits, targets, hidden_states, attention_mask, gate_logits, expert_indices, inputs: see
                :class:`lossmith.UnifiedLoss`.
        """
        if hidden_states is not None and targets is not None and hidden_states.shape == targets.shape:
            raise TypeError(
                "DeepSeekLoss takes (logits, targets, hidden_states, attention_mask), and the third seems to "
                "be a mask; pass attention_mask by name"
            )
        given = {"hidden_states": hidden_states, "gate_logits": gate_logits, "expert_indices": expert_indices}
        output = self.evaluate(logits, targets, attention_mask=attention_mask, **given, **inputs)
        names = {"mtp_loss": "mtp_mtp_loss", "moe_balance_loss": "moe_balancing_term"}
        parts = {names.get(name, name): part for name, part in self.detailed(output).items()}
        temperature = self.base.temperature
        if isinstance(temperature, AdaptiveTemperature):
            temperature = temperature.value
        parts["main_temperature"] = torch.as_tensor(temperature)
        if "moe_balance_loss" in self.components:
            balance: Any = self.components["moe_balance_loss"]
            parts["moe_expert_counts"] = balance.component.component.expert_counts
        return {name: part for name, part in parts.items() if part is not None}


class AdaptiveMTPLoss(UnifiedLoss):
    """``UnifiedLoss(primary_loss_type="adaptive_mtp")`` over as many heads as the model has.

    Args:
        vocab_size, hidden_size, options: see :class:`lossmith.UnifiedLoss`.
        primary_loss_weight: only 1.
        additional_loss_base_weight: weight of the heads' loss.
        confidence_reg_strength: weight of the calibration of the confidence scores.
        use_confidence_weighting: weigh the heads' tokens by confidence.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int | None = None,
        *,
        primary_loss_weight: float = 1.0,
        additional_loss_base_weight: float = 0.1,
        confidence_reg_strength: float = 0.01,
        use_confidence_weighting: bool = True,
        **options: Any,
    ) -> None:
        _say(
            "AdaptiveMTPLoss", "vocab_size, hidden_size, primary_loss_type='adaptive_mtp', use_mtp=True, ..."
        )
        if primary_loss_weight != 1:
            raise ValueError(
                f"the main loss has the weight 1; got primary_loss_weight={primary_loss_weight}. Divide "
                "additional_loss_base_weight, and multiply the loss"
            )
        super().__init__(vocab_size, hidden_size, "adaptive_mtp", **options)
        calibration: Any = self.components["confidence_loss"]
        calibration.weight = confidence_reg_strength
        if not self.use_mtp:
            base: Any = self.base
            heads = _AsManyHeads(
                vocab_size,
                adaptive=use_confidence_weighting,
                threshold=base.threshold,
                weight_range=base.weight_range,
            )
            self.components["mtp_loss"] = Weighted(heads, additional_loss_base_weight)
            _use_where_given(self, "mtp_loss", "additional_logits")

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the arguments of before)
        self,
        primary_logits: Tensor | None = None,
        targets: Tensor | None = None,
        additional_logits: Sequence[Tensor] | None = None,
        confidence_scores: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mtp_active: bool = False,
        *,
        logits: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Any]:
        """``loss`` and its parts, by their former names.

        Args:
            primary_logits: of the main prediction; ``logits`` is another name.
            additional_logits: of the model's heads; read if ``mtp_active``.
            targets, confidence_scores, attention_mask, inputs: see :class:`lossmith.UnifiedLoss`.
        """
        has_heads = mtp_active and additional_logits is not None and len(additional_logits)
        output = self.evaluate(
            either("primary_logits", primary_logits, "logits", logits),
            targets,
            attention_mask=attention_mask,
            additional_logits=additional_logits if has_heads else None,
            confidence_scores=confidence_scores,
            **inputs,
        )
        parts, zero = self.detailed(output), torch.zeros_like(output.total)
        is_there = "mtp_loss" in parts
        return {
            "loss": output.total,
            "primary_loss": parts["main_loss"],
            "additional_loss": parts.get("mtp_loss", zero),
            "confidence_reg": parts.get("confidence_loss", zero),
            "avg_confidence": zero if confidence_scores is None else confidence_scores.detach().mean(),
            "effective_mtp_weight": self.components["mtp_loss"].weight if is_there else 0.0,
            "mtp_active": mtp_active,
        }


class _AsManyHeads(MTP):
    """MTP with one head for each tensor of logits that the model passes."""

    def token_sum(self, inputs: Mapping[str, Any], output: LossOutput) -> Tensor:
        self.num_future_tokens = len(inputs["additional_logits"])
        return super().token_sum(inputs, output)


class AntiRepetitionLoss(UnifiedLoss):
    """``UnifiedLoss(use_ngram_penalty=True, use_immediate_repetition_penalty=True)``.

    Args:
        vocab_size, eos_token_id, pad_token_id, options: see :class:`lossmith.UnifiedLoss`.
        repetition_penalty_weight: ``ngram_penalty_weight``.
        diversity_bonus_weight: only 0; the bonus depended on the labels alone and had no gradient.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        repetition_penalty_weight: float | None = None,
        *,
        diversity_bonus_weight: float = 0.0,
        **options: Any,
    ) -> None:
        _say("AntiRepetitionLoss", "use_ngram_penalty=True, use_immediate_repetition_penalty=True, ...")
        if diversity_bonus_weight:
            raise ValueError(
                f"diversity_bonus_weight={diversity_bonus_weight} weighs a number of the labels, which has "
                "no gradient; leave it out"
            )
        options = {"use_ngram_penalty": True, "use_immediate_repetition_penalty": True, **options}
        if repetition_penalty_weight is not None:
            options["ngram_penalty_weight"] = repetition_penalty_weight
        super().__init__(vocab_size, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **options)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the arguments of before)
        self,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_components: bool = False,
        *,
        targets: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The loss; with ``return_components`` also its weighted parts by their former names, detached.

        Args:
            logits, attention_mask, inputs: see :class:`lossmith.UnifiedLoss`.
            labels: what ``logits[t]`` predict; ``targets`` is another name.
        """
        targets = either("targets", targets, "labels", labels)
        output = self.evaluate(logits, targets, attention_mask=attention_mask, **inputs)
        if not return_components:
            return output.total, None
        names = {"main_loss": "base_loss", "ngram_penalty": "repetition_penalty"}
        parts = {names.get(name, name): part.detach() for name, part in self.detailed(output).items()}
        return output.total, {"diversity_bonus": torch.zeros_like(parts["base_loss"]), **parts}
