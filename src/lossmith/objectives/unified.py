"""``UnifiedLoss``: one constructor for cross-entropy and every component; a composition underneath."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import reduce
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lossmith.core.metrics import Metrics
from lossmith.core.running_means import RunningMeans
from lossmith.core.warn_user import warn_user
from lossmith.engine.predictions import Predictions
from lossmith.engine.rows.backends import BackendName
from lossmith.equation.batch import TokenBatch
from lossmith.equation.output import LossOutput
from lossmith.equation.reduction import Denominator, Empty, Reduction
from lossmith.objectives import unified_options as flags
from lossmith.objectives.composed import ComposedLoss
from lossmith.objectives.temperature import AdaptiveTemperature
from lossmith.objectives.unified_parts import (
    check_options,
    describe_without_effect,
    make_components,
    make_primary,
)
from lossmith.options import options_of, strict_options
from lossmith.options.shared import (
    BalanceMode,
    ConfidenceThreshold,
    CosineMargin,
    ExpertsPerToken,
    ExpertUsage,
    FocalAlpha,
    FocalGamma,
    HiddenSize,
    IgnoreIndex,
    LabelSmoothing,
    MinLength,
    NgramSize,
    NumExperts,
    NumFutureTokens,
    NumRouters,
    PairTemperature,
    RepetitionThreshold,
    SharedProjection,
    Shift,
    TemperatureBounds,
    VocabSize,
    WeightRange,
    ZLossCoefficient,
)
from lossmith.terms.confidence_weight import SCORES

INPUTS = (
    "hidden_states",
    "lm_head_weight",
    "gate_logits",
    "expert_indices",
    "expert_outputs",
    "additional_logits",
    SCORES,
    "contrastive_pairs",
)


def _switch(name: str) -> property:
    """Whether the loss was made with this switch on; its weight in ``components`` may still change."""
    return property(lambda self: self._switches[name])


class UnifiedLoss(ComposedLoss):
    """Cross-entropy plus whichever components are switched on, in one pass over the vocabulary.

    ``logits[t]`` predict ``targets[t]``. Pass ``shift=True`` with unshifted labels, as Hugging Face has them;
    without it the model learns to copy its input.

        L = main + mtp_weight MTP + ngram_penalty_weight n-gram + immediate_repetition_weight immediate
            + eos_penalty_weight early EOS + gradient_balance_weight MoE balance + focal_weight focal
            + diversity_weight diversity + contrastive_weight contrastive + auxiliary_weight auxiliary

    Args:
        vocab_size: V.
        hidden_size: D, for multi-token prediction heads.
        primary_loss_type: ``standard``: cross-entropy; ``deepseek``: with a temperature, adaptive or fixed;
            ``adaptive_mtp``: weighted by the confidence of the prediction.
        label_smoothing, ignore_index, reduction, shift, empty, backend: see :func:`lossmith.cross_entropy`.
        initial_temperature, adaptive_temperature, temperature_bounds: of the ``deepseek`` primary; see
            :class:`lossmith.AdaptiveTemperature`.
        use_mtp, num_future_tokens, mtp_weight, mtp_type, shared_projection: multi-token prediction; see
            :class:`lossmith.MTP`. ``adaptive`` weighs tokens by confidence.
        adaptive_threshold, adaptive_weight_range: of the confidence weights.
        use_ngram_penalty, ngram_size, ngram_penalty_weight, ngram_window_size: see
            :class:`lossmith.NgramRepetition`.
        use_immediate_repetition_penalty, immediate_repetition_weight, immediate_repetition_threshold: see
            :class:`lossmith.ImmediateRepetition`.
        eos_token_id, min_sequence_length, eos_penalty_weight: see :class:`lossmith.EarlyEOS`; on if an id is
            given and the weight is not 0.
        pad_token_id: targets that equal it are ignored, unless it is the ``eos_token_id`` too.
        use_moe_balancing, num_experts, gradient_balance_weight, target_expert_usage, moe_top_k,
            moe_num_layers, moe_balance_mode, router_z_loss_weight: see :class:`lossmith.MoEBalance` and
            :class:`lossmith.RouterZLoss`.
        use_focal_loss, focal_gamma, focal_alpha, focal_weight, focal_mode: ``add`` a focal loss, or
            ``replace`` the main one by it.
        use_diversity_loss, diversity_weight: see :class:`lossmith.ExpertDiversity`.
        use_contrastive_loss, contrastive_weight, contrastive_temperature, contrastive_margin: see
            :class:`lossmith.Contrastive`.
        use_auxiliary_loss, auxiliary_weight: the confidence penalty, see :class:`lossmith.ConfidencePenalty`.
        z_loss: coefficient of the squared log-sum-exp.
        track_statistics: keep running means of the parts for :meth:`get_loss_statistics`.

    Attributes:
        use_mtp, use_ngram_penalty, use_immediate_repetition_penalty, use_moe_balancing, use_focal_loss,
            use_diversity_loss, use_contrastive_loss, use_auxiliary_loss: the switches as they were given.
        base: the main loss.
        components: the weighted components that are on, by the name of their part.

    Raises:
        TypeError: an unknown option (the message names the nearest), or one of the wrong type.
        ValueError: an option out of range, a component switched on without what it needs, or predictions over
            another vocabulary.

    Warns:
        UserWarning: options without effect because their switch is off; the message names the switch.

    Example:
        >>> import torch, lossmith
        >>> loss_fn = lossmith.UnifiedLoss(
        ...     vocab_size=50, use_ngram_penalty=True, use_immediate_repetition_penalty=True
        ... )
        >>> logits = torch.randn(2, 16, 50, requires_grad=True)
        >>> parts = loss_fn(logits, torch.randint(50, (2, 16)), return_detailed=True)
        >>> sorted(parts)
        ['immediate_repetition_penalty', 'main_loss', 'ngram_penalty', 'total_loss']
        >>> parts["total_loss"].backward()
    """

    @strict_options
    def __init__(
        self,
        vocab_size: VocabSize,
        hidden_size: HiddenSize = None,
        primary_loss_type: flags.PrimaryLossType = "deepseek",
        *,
        label_smoothing: LabelSmoothing = 0.0,
        ignore_index: IgnoreIndex = -100,
        initial_temperature: flags.InitialTemperature = 1.0,
        adaptive_temperature: flags.AdaptiveTemperature = False,
        temperature_bounds: TemperatureBounds = (0.5, 2.0),
        use_mtp: flags.UseMTP = False,
        num_future_tokens: NumFutureTokens = 3,
        mtp_weight: flags.MTPWeight = 0.1,
        mtp_type: flags.MTPType = "deepseek",
        shared_projection: SharedProjection = False,
        adaptive_threshold: ConfidenceThreshold = 0.7,
        adaptive_weight_range: WeightRange = (0.5, 1.5),
        use_ngram_penalty: flags.UseNgramPenalty = False,
        ngram_size: NgramSize = 4,
        ngram_penalty_weight: flags.NgramPenaltyWeight = 0.1,
        ngram_window_size: flags.NgramWindowSize = 50,
        use_immediate_repetition_penalty: flags.UseImmediateRepetitionPenalty = False,
        immediate_repetition_weight: flags.ImmediateRepetitionWeight = 0.5,
        immediate_repetition_threshold: RepetitionThreshold = 2,
        eos_token_id: flags.EosTokenId = None,
        pad_token_id: flags.PadTokenId = None,
        min_sequence_length: MinLength = 20,
        eos_penalty_weight: flags.EosPenaltyWeight = 0.05,
        use_moe_balancing: flags.UseMoEBalancing = False,
        num_experts: NumExperts | None = None,
        gradient_balance_weight: flags.GradientBalanceWeight = 0.1,
        target_expert_usage: ExpertUsage = None,
        moe_top_k: ExpertsPerToken = None,
        moe_num_layers: NumRouters = None,
        moe_balance_mode: BalanceMode = "loss",
        router_z_loss_weight: flags.RouterZLossWeight = 0.0,
        use_focal_loss: flags.UseFocalLoss = False,
        focal_gamma: FocalGamma = 2.0,
        focal_alpha: FocalAlpha = 1.0,
        focal_weight: flags.FocalWeight = 0.2,
        focal_mode: flags.FocalMode = "add",
        use_diversity_loss: flags.UseDiversityLoss = False,
        diversity_weight: flags.DiversityWeight = 0.05,
        use_contrastive_loss: flags.UseContrastiveLoss = False,
        contrastive_weight: flags.ContrastiveWeight = 0.1,
        contrastive_temperature: PairTemperature = 0.07,
        contrastive_margin: CosineMargin = 0.5,
        use_auxiliary_loss: flags.UseAuxiliaryLoss = False,
        auxiliary_weight: flags.AuxiliaryWeight = 0.1,
        z_loss: ZLossCoefficient = 0.0,
        reduction: Reduction = "mean",
        shift: Shift | None = None,
        empty: Empty = "zero",
        backend: BackendName = None,
        track_statistics: flags.TrackStatistics = True,
    ) -> None:
        self._make(SimpleNamespace(**{name: v for name, v in locals().items() if name != "self"}))

    def _make(self, chosen: SimpleNamespace) -> None:
        """Build the composition that the options stand for."""
        check_options(chosen)
        defaults = {name: declared.default for name, declared in options_of(UnifiedLoss).items()}
        said = describe_without_effect(chosen, defaults)
        if said is not None:
            warn_user(said)
        super().__init__(make_primary(chosen), make_components(chosen))
        self._switches = {name: bool(v) for name, v in vars(chosen).items() if name.startswith("use_")}
        self._said_what_is_not_read = False
        self.vocab_size: int = chosen.vocab_size
        self.primary_loss_type: flags.PrimaryLossType = chosen.primary_loss_type
        self.track_statistics: bool = chosen.track_statistics
        self.input_names = tuple(dict.fromkeys((*self.input_names, *INPUTS)))
        self._means = RunningMeans()

    use_mtp = _switch("use_mtp")
    use_ngram_penalty = _switch("use_ngram_penalty")
    use_immediate_repetition_penalty = _switch("use_immediate_repetition_penalty")
    use_moe_balancing = _switch("use_moe_balancing")
    use_focal_loss = _switch("use_focal_loss")
    use_diversity_loss = _switch("use_diversity_loss")
    use_contrastive_loss = _switch("use_contrastive_loss")
    use_auxiliary_loss = _switch("use_auxiliary_loss")

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the documented order of arguments)
        self,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
        lm_head_weight: Tensor | None = None,
        input_ids: Tensor | None = None,
        gate_logits: Any = None,
        expert_indices: Any = None,
        expert_outputs: Any = None,
        additional_logits: Any = None,
        confidence_scores: Tensor | None = None,
        contrastive_pairs: tuple[Tensor, Tensor] | None = None,
        denominator: Denominator | None = None,
        return_detailed: bool = False,
        **inputs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The loss; with ``return_detailed`` a dict of its weighted parts, which sum to ``total_loss``.

        Args:
            logits: [..., T, V], or None with ``hidden_states`` and ``lm_head_weight``.
            targets: [..., T] ids that ``logits[t]`` predict, ``ignore_index`` where there is none; with
                ``shift``, unshifted labels.
            attention_mask: [..., T] bool, integers, or floats of 0 and 1; 0 where a target is ignored.
            hidden_states: [B, T, D], for multi-token prediction, the contrastive loss, or in place of logits.
            lm_head_weight: [V, D], the unembedding, for ``shared_projection`` or in place of logits.
            input_ids: [..., T], the context of the repetition penalties; default: the preceding targets.
            gate_logits, expert_indices: of the routers; see :class:`lossmith.MoEBalance`.
            expert_outputs: see :class:`lossmith.ExpertDiversity`.
            additional_logits: of the model's own heads; see :class:`lossmith.MTP`.
            confidence_scores: [..., T] of a confidence head, in [0, 1].
            contrastive_pairs: two views of the samples; see :class:`lossmith.Contrastive`.
            denominator: supervised tokens over all micro-batches and ranks; also ``num_items_in_batch``.
            return_detailed: return the parts.
            inputs: ``segment_ids``, ``token_weight``, ``mask``, ``lm_head_bias``, and ``strategy``,
                ``memory_budget``, ``skip_ignored``, ``logits_dtype``, ``skip_small_gradients``:
                :meth:`lossmith.Objective.evaluate`.

        Raises:
            ValueError: a component is on but its input is missing; the message names both.
        """
        output = self.evaluate(
            logits,
            targets,
            attention_mask=attention_mask,
            denominator=denominator,
            input_ids=input_ids,
            hidden_states=hidden_states,
            lm_head_weight=lm_head_weight,
            gate_logits=gate_logits,
            expert_indices=expert_indices,
            expert_outputs=expert_outputs,
            additional_logits=additional_logits,
            confidence_scores=confidence_scores,
            contrastive_pairs=contrastive_pairs,
            **inputs,
        )
        return self.detailed(output) if return_detailed else output.total

    def detailed(self, output: LossOutput) -> dict[str, Tensor]:
        """The parts by their documented names: ``main_loss``, one of each component, ``total_loss``."""
        main = reduce(operator.add, [p for name, p in output.parts.items() if name not in self.components])
        parts = {name: part for name, part in output.parts.items() if name in self.components}
        return {"main_loss": main, **parts, "total_loss": output.total}

    def bind(self, predictions: Predictions, targets: Tensor, *args: Any, **given: Any) -> TokenBatch:
        predictions.check(targets)
        num_classes = predictions.num_classes
        if num_classes != self.vocab_size:
            raise ValueError(
                f"expected logits of V = vocab_size = {self.vocab_size} classes; got {num_classes}. Make the "
                f"loss with vocab_size={num_classes}, which counts padding too"
            )
        return super().bind(predictions, targets, *args, **given)

    def features(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        self._say_what_is_not_read(inputs)
        return super().features(inputs)

    def _say_what_is_not_read(self, inputs: Mapping[str, Any]) -> None:
        """Warn once: the name ``adaptive_mtp`` suggests MTP heads, but another switch turns them on."""
        if self.primary_loss_type != "adaptive_mtp" or self._said_what_is_not_read:
            return
        read = {name for _, part, _ in self._active() for name in (*part.required, *part.optional)}
        if inputs.get("lm_head_weight") is not None:
            read.add("hidden_states")  # together they are the logits
        given = [n for n in ("hidden_states", "additional_logits") if inputs.get(n) is not None]
        names = [name for name in given if name not in read]
        if names and not torch.compiler.is_compiling():
            self._said_what_is_not_read = True
            warn_user(
                f"primary_loss_type='adaptive_mtp' weighs the main loss by confidence and does not read "
                f"{' nor '.join(names)}; for heads that look further ahead make the loss with use_mtp=True"
            )

    def complete(self, output: LossOutput, inputs: Mapping[str, Any]) -> LossOutput:
        output = super().complete(output, inputs)
        if self.track_statistics and not torch.compiler.is_compiling():
            self._means.add({**self.detailed(output), **self.measures()}, output.total)
        return output

    def get_loss_statistics(self) -> dict[str, float]:
        """Means over the batches since the last reset, of the parts and of what components measure.
        Also ``num_batches``, the number of batches averaged; ``num_nonfinite``, the number left out because
        their loss was NaN or infinite; and the temperature. One synchronisation."""
        temperature = self.base.temperature
        if isinstance(temperature, AdaptiveTemperature):
            temperature = temperature.value
        return Metrics({**self._means.read(), "temperature": temperature}).to_dict()

    def reset_statistics(self) -> None:
        """Restart the means."""
        self._means = RunningMeans()


def create_unified_loss(config: Any) -> UnifiedLoss:
    """The :class:`UnifiedLoss` that a configuration describes.

    Args:
        config: a mapping of the constructor's options; or a dataclass, a namespace or any object with them as
            attributes, of which it ignores those that it does not know.

    Raises:
        TypeError: a mapping with an unknown option; the message names the nearest.

    Example:
        >>> import lossmith
        >>> loss_fn = lossmith.create_unified_loss({"vocab_size": 50, "use_ngram_penalty": True})
        >>> list(loss_fn.components)
        ['ngram_penalty']
    """
    known = options_of(UnifiedLoss)
    if isinstance(config, Mapping):
        options = {str(name): value for name, value in config.items()}
    else:
        found = {name: getattr(config, name, None) for name in known}
        options = {name: value for name, value in found.items() if value is not None}
    if "vocab_size" not in options:
        raise TypeError("the configuration of a UnifiedLoss needs vocab_size")
    return UnifiedLoss(**options)
