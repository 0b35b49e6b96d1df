"""``Objective``: what is trained for, as a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, overload

import torch
from torch import Tensor, nn

from lossmith.core.stepping import Stepped
from lossmith.engine.head.linear_head import LinearHead
from lossmith.engine.head.plan import Plan
from lossmith.engine.predictions import Predictions
from lossmith.engine.statistics.stats import TokenStats
from lossmith.engine.sweep_options import SweepOptions, fitting_class_weight
from lossmith.equation.batch import TokenBatch, align
from lossmith.equation.evaluation import evaluate, whole_batch_reason
from lossmith.equation.output import LossOutput
from lossmith.equation.reduction import Denominator, Empty, Reduction
from lossmith.equation.term import Reads, Term, TokenLoss, Weigh
from lossmith.objectives.inputs import (
    HEAD_INPUTS,
    OWN_INPUTS,
    both_masks,
    either,
    given_targets,
    take_predictions,
)
from lossmith.objectives.temperature import AdaptiveTemperature
from lossmith.options import option, strict_options, unknown_option
from lossmith.options.shared import Backend, ClassWeight, IgnoreIndex, Shift, Softcap, Temperature
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
        backend: which arithmetic computes the rows of logits, ``native``, ``triton`` or ``torch``, an error
            where it does not take them; None for the first that does.

    Raises:
        TypeError: an unknown option, where the message names the nearest, or one of a wrong type.
        ValueError: an option out of range.

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
    # Targets that equal it do not count, unless it is the end of a text too: see `align`.
    pad_token_id: int | None
    eos_token_id: int | None
    # What evaluate takes besides its own arguments; of these, what belongs to a position [..., T] each.
    input_names: tuple[str, ...] = ()
    feature_names: tuple[str, ...] = ()

    @strict_options
    def __init__(
        self,
        terms: Annotated[Sequence[Term], option("the per-token terms")] = (),
        *,
        reduction: Reduction = "mean",
        ignore_index: IgnoreIndex = -100,
        shift: Shift | None = None,
        empty: Empty = "zero",
        temperature: Temperature | AdaptiveTemperature = 1.0,
        softcap: Softcap = None,
        class_weight: ClassWeight = None,
        backend: Backend = None,
    ) -> None:
        super().__init__()
        self.reduction: Reduction = reduction
        self.ignore_index = ignore_index
        self.shift = shift
        self.empty: Empty = empty
        self.pad_token_id = self.eos_token_id = None
        self.temperature = temperature
        self.softcap = softcap
        self.backend: Backend = backend
        self.register_buffer("class_weight", class_weight)
        self._terms = tuple(terms)
        self._shift_was_checked = False

    def token_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[N] the loss of each token that the terms are made of: the first term's, cross-entropy where there
        is none, or what a subclass has that is finer. Loss modifiers put another in its place."""
        return self._terms[0].loss(stats, batch) if self._terms else cross_entropy(stats, batch.target_weight)

    @property
    def token_loss_reads(self) -> Reads:
        """The statistics that :meth:`token_loss` reads; every one where a subclass does not say."""
        if type(self).token_loss is not Objective.token_loss:
            return None
        return self._terms[0].reads if self._terms else ("nll",)

    @property
    def reads(self) -> Reads:
        """The statistics that :meth:`complete` reads, to be computed with those of the terms."""
        return ("unscaled.nll",) if isinstance(self.temperature, AdaptiveTemperature) else ()

    @property
    def wanted_inputs(self) -> set[str]:
        """The names of the inputs that it would use now; a component that is off takes some and uses none."""
        return set(self.input_names)

    @property
    def resolved_reduction(self) -> Reduction:
        """How the tokens of a batch are averaged now."""
        return self.reduction

    def also_read(self, batch: TokenBatch, inputs: Mapping[str, Any]) -> Tensor | None:
        """[N] bool, positions without a target whose statistics :meth:`complete` reads all the same, from
        ``output.all_stats``; None for none."""
        return None

    def terms(self, token_loss: TokenLoss | None = None) -> Sequence[Term]:
        """The per-token terms of the next batch, made of ``token_loss`` (default: the objective's own)."""
        if token_loss is None or not self._terms:
            return self._terms
        return [replace(self._terms[0], loss=token_loss, reads=token_loss.reads), *self._terms[1:]]

    def kept(self, targets: Tensor, ignore_index: int) -> Tensor:
        """The targets [..., T], ``ignore_index`` in place of those that a subclass leaves out."""
        return targets

    @property
    def weigh(self) -> Weigh | None:
        """(detached statistics, batch) -> [N] what all terms of a token are multiplied by; None for 1."""
        return None

    def _own_token_loss(self, given: TokenLoss | None) -> TokenLoss:
        return TokenLoss(self.token_loss, self.token_loss_reads) if given is None else given

    def evaluate(
        self,
        logits: Tensor | Predictions | None = None,
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
            logits: [..., T, V]; a ``LinearHead`` that would make them; or None.
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
        batch = self.bind(
            predictions,
            self.kept(given_targets(targets), self.ignore_index),
            inputs,
            mask=mask,
            token_weight=token_weight,
            input_ids=input_ids,
            segment_ids=segment_ids,
            shift=shift,
            denominator=either("denominator", denominator, "num_items_in_batch", num_items_in_batch),
        )
        inputs = {"attention_mask": attention_mask, **inputs}
        return self.evaluate_batch(predictions, batch, inputs, scalars).shaped()

    def evaluate_batch(
        self,
        predictions: Predictions,
        batch: TokenBatch,
        inputs: Mapping[str, Any],
        scalars: Mapping[str, Tensor] | None = None,
        stats: TokenStats | None = None,
    ) -> LossOutput:
        """The loss of a batch that is aligned, with its statistics flat.

        Args:
            predictions, batch: see :meth:`bind`.
            inputs, scalars: as for :meth:`evaluate`.
            stats: the batch's statistics, flat, if they are here already.
        """
        output = evaluate(
            self.terms(),
            predictions,
            batch,
            self.sweep_options,
            stats=stats,
            weigh=self.weigh,
            reads=self.reads,
            scalars=scalars,
            per_token=self.reduction == "none",
        )
        return self.complete(output, inputs)

    def complete(self, output: LossOutput, inputs: Mapping[str, Any]) -> LossOutput:
        """The output with the parts that are no terms of the tokens' statistics; a subclass may have some."""
        if isinstance(self.temperature, AdaptiveTemperature) and torch.is_grad_enabled():
            assert output.stats is not None
            assert output.batch is not None
            nll = torch.where(output.batch.valid, output.stats.unscaled.nll.detach(), 0.0)
            self.temperature.observe(nll.sum(), output.num_tokens, output.total)
        return output

    @property
    def sweep_options(self) -> SweepOptions:
        """How the logits are read."""
        now = self.temperature
        if isinstance(now, AdaptiveTemperature):
            now = now.value.clone()  # it moves in place, and the way back reads what was read here
        return SweepOptions(now, self.softcap, self.class_weight, self.backend)

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
                known = {"logits", "targets", *OWN_INPUTS, *self.input_names, *more}
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
            two_sweep: the term 'variance' may depend on the whole batch (its scope is 'batch'). 64 tokens \
in 1 chunks of 64; 3 products of N V D = 64 x 1000 x 16 (0.00614 GFLOP); 0.244 MiB besides the gradients
        """
        self.check_inputs(inputs, more=OWN_INPUTS)
        given = {"hidden_states": hidden_states, "lm_head_weight": lm_head_weight, **inputs}
        predictions, rest = take_predictions(None, given, ())
        mask, _ = both_masks(rest.get("mask"), rest.get("attention_mask"))
        batch = self.bind(predictions, targets, mask=mask, shift=rest.get("shift"))
        assert isinstance(predictions, LinearHead)
        return predictions.plan(batch.targets, batch.ignore_index, self.whole_batch_reason())

    def whole_batch_reason(self) -> str | None:
        """Why a linear head has to be swept twice, or None; see
        :func:`lossmith.equation.evaluation.whole_batch_reason`."""
        return whole_batch_reason(self.terms(), None, self.weigh, self.reduction == "none")

    def bind(
        self,
        predictions: Predictions,
        targets: Tensor,
        inputs: Mapping[str, Any] | None = None,
        *,
        reduction: Reduction | None = None,
        ignore_index: int | None = None,
        **given: Any,
    ) -> TokenBatch:
        """A batch, checked and aligned with its predictions.

        Args:
            predictions: logits, or a linear head.
            targets, given: as for :meth:`evaluate`.
            inputs: what else the objective was given; None where only the targets matter.
            reduction, ignore_index: instead of the objective's own.
        """
        predictions.check(targets)
        batch = self._align(
            targets,
            ignore_index=self.ignore_index if ignore_index is None else ignore_index,
            reduction=reduction or self.reduction,
            num_classes=predictions.num_classes,
            class_weight=fitting_class_weight(self.class_weight, predictions),
            dtype=predictions.dtype,
            features=None if inputs is None else self.features(inputs),
            **given,
        )
        self._warn_if_unshifted(batch)
        also_read = None if inputs is None else self.also_read(batch, inputs)
        return batch if also_read is None else replace(batch, also_read=also_read)

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
        ignored = self.ignore_index if ignore_index is None else ignore_index
        return self._align(
            self.kept(targets, ignored),
            mask=mask,
            shift=shift,
            reduction=reduction or self.reduction,
            ignore_index=ignored,
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
        """Once, on the first batch: it is a mistake in the wiring, and looking waits for the device."""
        if not self._shift_was_checked and batch.can_be_unshifted:
            self._shift_was_checked = True
            batch.warn_if_unshifted()

    if TYPE_CHECKING:  # nn.Module's own is of any type

        @overload
        def __call__(
            self, *args: Any, return_detailed: Literal[True], **inputs: Any
        ) -> dict[str, Tensor]: ...
        @overload
        def __call__(self, *args: Any, return_detailed: Literal[False] = False, **inputs: Any) -> Tensor: ...
        def __call__(self, *args: Any, **inputs: Any) -> Any: ...

    def forward(self, *args: Any, return_detailed: bool = False, **inputs: Any) -> Tensor | dict[str, Tensor]:
        """The loss; with ``return_detailed`` a dict of the parts and ``total_loss``. The arguments are those
        of :meth:`evaluate`."""
        output = self.evaluate(*args, **inputs)
        return output.as_dict() if return_detailed else output.total

    def extra_repr(self) -> str:
        if type(self).terms is not Objective.terms:
            return ""
        on = [term for term in self._terms if not term.is_off]
        return " + ".join(map(str, on)) or "no terms: the loss is 0"
