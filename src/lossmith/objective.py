"""``Objective``: what is trained for, as a module."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.batch import TokenBatch, align, num_steps
from lossmith.engine.linear import LinearHead
from lossmith.engine.plan import Plan
from lossmith.engine.predictions import Predictions
from lossmith.engine.stats import TokenStats
from lossmith.engine.sweep_options import SweepOptions
from lossmith.equation import LossOutput, PerToken, StatsOf, Term
from lossmith.evaluation import Memory, evaluate, whole_batch_reason
from lossmith.inputs import HEAD_INPUTS, OWN_INPUTS, both_masks, either, given_targets, take_predictions
from lossmith.options import unknown_option
from lossmith.reduction import Denominator, Empty, Reduction, check_reduction
from lossmith.stepping import Stepped
from lossmith.temperature import AdaptiveTemperature
from lossmith.terms.cross_entropy import cross_entropy


class Objective(nn.Module):
    """A training objective: terms, how the logits are read, and how the tokens are averaged.

    Args:
        terms: the per-token terms.
        reduction: ``mean`` (= ``token_mean``), ``sequence_mean``, ``sum`` or ``none``.
        ignore_index: the target id of tokens without one.
        shift: how many steps ahead logits[t] predict: True (1) takes targets for unshifted labels, as
            Hugging Face has them, False (0) for aligned ones. None is False, or what fits the model where
            :mod:`lossmith.integrations.huggingface` knows it.
        empty: what a batch without a supervised token gives: ``zero`` (with zero gradients) or ``nan``.
        temperature, softcap: how the logits are read; see :func:`lossmith.token_stats`.

    Example:
        >>> import torch, lossmith
        >>> margin = lossmith.Term("margin", lambda s, batch: (s.top_wrong_logit - s.target_logit + 1).relu())
        >>> plain = lossmith.Term("cross_entropy", lambda s, batch: s.nll)
        >>> criterion = lossmith.Objective([plain, margin])
        >>> output = criterion.evaluate(torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.long))
        >>> sorted(output.parts), round(output.total.item(), 4)
        (['cross_entropy', 'margin'], 2.6094)
    """

    class_weight: Tensor | None
    # Targets that equal it do not count, unless it is the end of a text too: see lossmith.batch.align.
    pad_token_id: int | None
    eos_token_id: int | None
    # What evaluate takes besides its own arguments; of these, what belongs to a position [..., T] each.
    input_names: tuple[str, ...] = ()
    feature_names: tuple[str, ...] = ()

    def __init__(
        self,
        terms: Sequence[Term] = (),
        *,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        shift: bool | int | None = None,
        empty: Empty = "zero",
        temperature: float | Tensor | AdaptiveTemperature = 1.0,
        softcap: float | None = None,
        class_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction, empty)
        num_steps(False if shift is None else shift)  # which refuses what is none
        self.reduction: Reduction = reduction
        self.ignore_index = ignore_index
        self.shift = shift
        self.empty: Empty = empty
        self.pad_token_id = self.eos_token_id = None
        self.temperature = temperature
        self.softcap = softcap
        self.register_buffer("class_weight", class_weight)
        _sweep_options(temperature, softcap, class_weight)  # which refuses what cannot be
        self._terms = tuple(terms)
        self._shift_was_checked = False
        self._memory: Memory = {}

    def token_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[N] the loss of each token that the terms are made of: the first term's, cross-entropy where there
        is none, or what a subclass has that is finer. Loss modifiers put another in its place."""
        return self._terms[0].loss(stats, batch) if self._terms else cross_entropy(stats, batch.target_weight)

    def terms(self, token_loss: PerToken | None = None) -> Sequence[Term]:
        """The per-token terms of the next batch, made of ``token_loss`` (default: the objective's own)."""
        if token_loss is None or not self._terms:
            return self._terms
        return [replace(self._terms[0], loss=token_loss), *self._terms[1:]]

    def evaluate(
        self,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_weight: Tensor | None = None,
        input_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        denominator: Denominator | None = None,
        num_items_in_batch: Denominator | None = None,
        scalars: Mapping[str, Tensor] | None = None,
        shift: bool | int | None = None,
        **inputs: Any,
    ) -> LossOutput:
        """The loss of ``logits`` [..., V] at ``targets`` [...], with its parts and metrics.

        In place of logits it takes ``hidden_states`` and ``lm_head_weight``, and makes the logits a few at a
        time; value and gradients are the same.

        Args:
            logits: [..., T, V], or None.
            targets: [..., T] ids, or unshifted labels with ``shift``.
            mask: [..., T] bool or integers, 0 where a target does not count.
            attention_mask: another name of it; where both are given, this one is for what components
                make of other tensors, and ``mask`` for the targets.
            token_weight: [..., T] weights of the targets; they do not enter the denominator.
            input_ids: [..., T] what the logits were computed from.
            segment_ids: [..., T] which document of a packed row a token of ``input_ids`` belongs to.
            denominator, num_items_in_batch: supervised tokens (or samples) over all micro-batches and ranks.
            scalars: weighted scalars of other tensors to add, by name.
            shift: in place of the objective's own.
            inputs: what else the objective takes (``input_names``); and, without logits, ``hidden_states``
                [..., T, D], ``lm_head_weight`` [V, D], ``lm_head_bias`` [V], a model's own ``lm_head_scale``
                and ``lm_head_softcap``, and the ``strategy`` and ``memory_budget`` of
                :func:`lossmith.linear_cross_entropy`.

        Raises:
            TypeError: an input that the objective does not take, or neither logits nor a head.
        """
        self.check_inputs(inputs)
        predictions, inputs = take_predictions(logits, inputs, self.input_names)
        mask, attention_mask = both_masks(mask, attention_mask)
        batch, stats_of = self.bind(
            predictions,
            given_targets(targets),
            mask=mask,
            token_weight=token_weight,
            input_ids=input_ids,
            segment_ids=segment_ids,
            features=self.features(inputs),
            shift=shift,
            denominator=either("denominator", denominator, "num_items_in_batch", num_items_in_batch),
        )
        output = evaluate(
            self.terms(),
            stats_of,
            batch,
            reads=self.reads,
            scalars=scalars,
            per_token=self.reduction == "none",
            memory=self._memory,
        )
        return self.complete(output, {"attention_mask": attention_mask, **inputs})

    def complete(self, output: LossOutput, inputs: Mapping[str, Any]) -> LossOutput:
        """The output with the parts that are no terms of the tokens' statistics; a subclass may have some."""
        if isinstance(self.temperature, AdaptiveTemperature) and torch.is_grad_enabled():
            assert output.stats is not None
            assert output.batch is not None
            nll = torch.where(output.batch.valid, output.stats.unscaled.nll.detach(), 0.0)
            self.temperature.observe(nll.sum(), output.num_tokens)
        return output

    def reads(self, stats: TokenStats) -> None:
        """Read what :meth:`complete` is going to read, so that it is computed with the rest."""
        if isinstance(self.temperature, AdaptiveTemperature):
            _ = stats.unscaled.nll

    @property
    def sweep_options(self) -> SweepOptions:
        """How the logits are read."""
        return _sweep_options(self.temperature, self.softcap, self.class_weight)

    def on_optimizer_step(self) -> None:
        """Let state that moves once per optimizer step move. After the ``step()`` of PyTorch's optimizers it
        does so by itself; this is for others."""
        for module in self.modules():
            if isinstance(module, Stepped):
                module.on_optimizer_step()

    def check_inputs(self, inputs: Iterable[str], more: Iterable[str] = ()) -> None:
        """
        Raises:
            TypeError: a name that :meth:`evaluate` does not know; ``more`` are names that it does.
        """
        for name in inputs:
            if name not in (*self.input_names, *HEAD_INPUTS, *more):
                known = {*OWN_INPUTS, *self.input_names, *more}
                raise TypeError(unknown_option(type(self).__name__, name, known))

    def features(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those of the inputs that belong to a position each."""
        return {name: inputs[name] for name in self.feature_names if inputs.get(name) is not None}

    def plan(self, *, hidden_states: Tensor, lm_head_weight: Tensor, targets: Tensor, **inputs: Any) -> Plan:
        """How this objective would sweep a linear head, and what that costs; nothing is computed.

        Args:
            hidden_states, lm_head_weight, targets, inputs: as for :meth:`evaluate`.

        Example:
            >>> import torch, lossmith
            >>> hidden = torch.randn(64, 16, requires_grad=True)
            >>> weight, targets = torch.randn(1000, 16, requires_grad=True), torch.zeros(64).long()
            >>> head = {"hidden_states": hidden, "lm_head_weight": weight}
            >>> print(lossmith.NVAMPLoss().plan(targets=targets, **head))
            two_sweep: the weights of the term 'variance' depend on the whole batch. 64 tokens in 1 chunks \
of 64; 3 products of N V D = 64 x 1000 x 16 (0.00614 GFLOP); 0.244 MiB besides the gradients
        """
        self.check_inputs(inputs, more=OWN_INPUTS)
        given = {"hidden_states": hidden_states, "lm_head_weight": lm_head_weight, **inputs}
        predictions, rest = take_predictions(None, given, ())
        mask, _ = both_masks(rest.get("mask"), rest.get("attention_mask"))
        batch, _ = self.bind(predictions, targets, mask=mask, shift=rest.get("shift"))
        assert isinstance(predictions, LinearHead)
        return predictions.plan(batch.targets, batch.ignore_index, self.whole_batch_reason())

    def whole_batch_reason(self) -> str | None:
        """Why a linear head has to be swept twice, or None; see
        :func:`lossmith.equation.whole_batch_reason`."""
        return whole_batch_reason(self.terms(), None, self.reduction == "none")

    def bind(
        self,
        predictions: Predictions,
        targets: Tensor,
        *,
        stats: TokenStats | None = None,
        reduction: Reduction | None = None,
        ignore_index: int | None = None,
        **inputs: Any,
    ) -> tuple[TokenBatch, StatsOf]:
        """A batch aligned, and its statistics once somebody says with which candidates.

        Args:
            predictions: logits, or a linear head.
            targets, inputs: as for :meth:`evaluate`.
            stats: statistics of these predictions at these targets, if they are here already.
            reduction, ignore_index: instead of the objective's own.
        """
        predictions.check(targets)
        options = self.sweep_options
        ignored = self.ignore_index if ignore_index is None else ignore_index
        batch = self._align(
            targets,
            ignore_index=ignored,
            reduction=reduction or self.reduction,
            num_classes=predictions.num_classes,
            class_weight=options.checked_class_weight(predictions),
            dtype=predictions.dtype,
            **inputs,
        )
        self._warn_if_unshifted(batch)
        if stats is not None:
            return batch, _given(stats, batch)

        def stats_of(candidates: Tensor | None) -> TokenStats:
            return options.stats(predictions, batch.targets, ignore_index=ignored, candidates=candidates)

        return batch, stats_of

    def count(
        self,
        targets: Tensor,
        *,
        mask: Tensor | None = None,
        reduction: Reduction | None = None,
        ignore_index: int | None = None,
        shift: bool | int | None = None,
    ) -> Tensor:
        """What this objective divides by: the supervised tokens, or samples under ``sequence_mean``.

        Summed over all micro-batches and ranks it is the ``denominator`` to pass with each of them.

        Args:
            targets, mask: [..., T], as for :meth:`evaluate`.
            reduction, ignore_index, shift: instead of the objective's own.
        """
        return self._align(
            targets,
            mask=mask,
            shift=shift,
            reduction=reduction or self.reduction,
            ignore_index=self.ignore_index if ignore_index is None else ignore_index,
            class_weight=self.class_weight,
        ).count

    def _align(self, targets: Tensor, *, shift: bool | int | None = None, **given: Any) -> TokenBatch:
        own = False if self.shift is None else self.shift
        return align(
            targets,
            shift=own if shift is None else shift,
            empty=self.empty,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_id,
            **given,
        )

    def _warn_if_unshifted(self, batch: TokenBatch) -> None:
        """Once, on the first batch: it is a mistake in the wiring, and looking waits for the device. What is
        shifted cannot be it."""
        if self._shift_was_checked or batch.shift or batch.input_ids is None or torch.compiler.is_compiling():
            return
        self._shift_was_checked = True
        if batch.is_unshifted:
            warnings.warn(
                "every target equals the input at its own position, which teaches the model to copy. If the "
                "targets are labels as Hugging Face has them, pass shift=True",
                stacklevel=3,
            )

    def forward(
        self,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        return_detailed: bool = False,
        **inputs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The loss; with ``return_detailed`` a dict of the parts and ``total_loss``. The arguments are those
        of :meth:`evaluate`."""
        output = self.evaluate(logits, targets, **inputs)
        return output.as_dict() if return_detailed else output.total


def _sweep_options(
    temperature: float | Tensor | AdaptiveTemperature, softcap: float | None, class_weight: Tensor | None
) -> SweepOptions:
    now = temperature.value if isinstance(temperature, AdaptiveTemperature) else temperature
    return SweepOptions(now, softcap, class_weight)


def _given(stats: TokenStats, batch: TokenBatch) -> StatsOf:
    """The caller's statistics, flat.

    Raises:
        ValueError: they are of other targets, or lack candidates that a term reads.
    """
    if stats.targets.numel() != batch.targets.numel():
        raise ValueError(
            f"stats must be those of the targets, {list(batch.shape)}; got {list(stats.targets.shape)}"
        )
    theirs = stats.targets.reshape(-1)
    # elsewhere looking would wait for the device
    looks = batch.targets.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and ((theirs != batch.targets) & batch.valid).nonzero().numel():
        raise ValueError(
            "stats are of other targets than these. With shift=True logits[t] predict targets[t + 1]; "
            "pass the statistics of those"
        )

    def stats_of(candidates: Tensor | None) -> TokenStats:
        if candidates is not None:
            raise ValueError(
                "a term reads the logits of candidate ids, which the given stats do not have; leave stats out"
            )
        return stats.restrict(batch.targets, batch.ignore_index)

    return stats_of
