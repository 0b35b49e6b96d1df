"""``Objective``: a training objective as a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, overload

import torch
from torch import Tensor

from lossmith.core.stepping import Stepped
from lossmith.engine.head.plan import Plan
from lossmith.engine.predictions import Predictions
from lossmith.engine.rows.backends import BackendName
from lossmith.engine.shards.sequence import SequenceShards
from lossmith.engine.shards.sequence_part import SequencePart
from lossmith.engine.statistics.stats import TokenStats
from lossmith.engine.sweep_options import SweepOptions
from lossmith.engine.tokens.family import CrossEntropyFamily
from lossmith.equation.batch import TokenBatch
from lossmith.equation.cross_entropy import evaluate_cross_entropy
from lossmith.equation.evaluation import evaluate, whole_batch_reason
from lossmith.equation.output import LossOutput
from lossmith.equation.reduction import Denominator, Empty, Reduction
from lossmith.equation.term import Reads, Term, TokenLoss, Weigh
from lossmith.objectives.aligned import Aligned
from lossmith.objectives.inputs import (
    HEAD_INPUTS,
    OWN_INPUTS,
    both_masks,
    either,
    given_targets,
    take_predictions,
    whole_sequences,
)
from lossmith.objectives.temperature import AdaptiveTemperature
from lossmith.options import option, strict_options, unknown_option
from lossmith.options.shared import ClassWeight, IgnoreIndex, Shift, Softcap, Temperature
from lossmith.terms.cross_entropy import cross_entropy


class Objective(Aligned):
    """A training objective: terms, how the logits are read, and how the tokens are averaged.

    Args:
        terms: the per-token terms.
        reduction: ``mean`` (= ``token_mean``), ``sequence_mean``, ``sum`` or ``none``.
        ignore_index: the id that marks a token without a target.
        shift: how many steps ahead logits[t] predict. True (1): the targets are unshifted labels, as Hugging
            Face has them. False (0): they are aligned. None: False, unless
            :mod:`lossmith.integrations.huggingface` knows what fits the model.
        empty: the loss of a batch without a supervised token: ``zero`` (with zero gradients) or ``nan``.
        temperature, softcap: how the logits are read; see :func:`lossmith.token_stats`.
        backend: which arithmetic computes the rows of logits, ``native``, ``triton`` or ``torch``, an error
            where it does not take them; None for the first that does.

    Raises:
        TypeError: an unknown option (the message names the nearest), or one of the wrong type.
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

    # What evaluate takes besides its own arguments.
    input_names: tuple[str, ...] = ()

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
        backend: BackendName = None,
    ) -> None:
        super().__init__()
        self.reduction: Reduction = reduction
        self.ignore_index = ignore_index
        self.shift = shift
        self.empty: Empty = empty
        self.pad_token_id = self.eos_token_id = None
        self.temperature = temperature
        self.softcap = softcap
        self.backend: BackendName = backend
        self.register_buffer("class_weight", class_weight)
        self._terms = tuple(terms)
        self._shift_was_checked = False

    def token_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[N] the per-token loss that the terms build on: the first term's, or cross-entropy if there are no
        terms; a subclass may be more specific. Loss modifiers replace it."""
        return self._terms[0].loss(stats, batch) if self._terms else cross_entropy(stats, batch.target_weight)

    @property
    def token_loss_reads(self) -> Reads:
        """The statistics that :meth:`token_loss` reads; all of them unless a subclass says otherwise."""
        if type(self).token_loss is not Objective.token_loss:
            return None
        return self._terms[0].reads if self._terms else ("nll",)

    @property
    def reads(self) -> Reads:
        """The statistics that :meth:`complete` reads, computed together with those of the terms."""
        return ("unscaled.nll",) if isinstance(self.temperature, AdaptiveTemperature) else ()

    @property
    def wanted_inputs(self) -> set[str]:
        """The names of the inputs that it uses now; a component that is off accepts its own but uses none."""
        return set(self.input_names)

    @property
    def resolved_reduction(self) -> Reduction:
        """How the tokens of a batch are averaged now."""
        return self.reduction

    def terms(self, token_loss: TokenLoss | None = None) -> Sequence[Term]:
        """The per-token terms of the next batch, built on ``token_loss`` (default: the objective's own)."""
        if token_loss is None or not self._terms:
            return self._terms
        return [replace(self._terms[0], loss=token_loss, reads=token_loss.reads), *self._terms[1:]]

    @property
    def family(self) -> CrossEntropyFamily | None:
        """The same as one step, where the terms are the cross-entropy family's and no others."""
        return None

    @property
    def weigh(self) -> Weigh | None:
        """(detached statistics, batch) -> [N] the factor of all terms of a token; None for 1."""
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
        sequence: SequenceShards | None = None,
        **inputs: Any,
    ) -> LossOutput:
        """The loss of ``logits`` [..., V] at ``targets`` [...], with its parts and metrics.

        Given ``hidden_states`` and ``lm_head_weight`` in place of logits, it makes the logits a chunk of
        tokens at a time; value and gradients are the same.

        Args:
            logits: [..., T, V]; a ``LinearHead`` that would make them; or None.
            targets: [..., T] ids, or unshifted labels with ``shift``.
            mask: [..., T] bool or integers, 0 where a target is ignored.
            attention_mask: another name for ``mask``. If both are given, ``mask`` applies to the targets and
                ``attention_mask`` to the other tensors that components read.
            token_weight: [..., T] weights of the targets; they do not enter the denominator.
            input_ids: [..., T] the tokens that the logits were computed from.
            segment_ids: [..., T] the document of a packed row that each token of ``input_ids`` belongs to.
            denominator, num_items_in_batch: supervised tokens (or samples) over all micro-batches and ranks.
            scalars: weighted scalars to add to the loss, by name.
            shift: overrides the objective's own.
            sequence: how sequences are split across ranks, of which each passes its positions alone.
            inputs: what else the objective takes (``input_names``); and, without logits, ``hidden_states``
                [..., T, D], ``lm_head_weight`` [V, D], ``lm_head_bias`` [V], a model's own ``lm_head_scale``
                and ``lm_head_softcap``, and the ``strategy``, ``memory_budget``, ``skip_ignored``,
                ``logits_dtype`` and ``skip_small_gradients`` of :func:`lossmith.linear_cross_entropy`.

        Raises:
            TypeError: an input that the objective does not take, or neither logits nor a head.
        """
        self.check_inputs(inputs)
        predictions, inputs = take_predictions(logits, inputs, self.input_names)
        targets = given_targets(targets)
        mask, attention_mask = both_masks(mask, attention_mask)
        of_tokens = {"input_ids": input_ids, "segment_ids": segment_ids}
        aligned: dict[str, Any] = {"mask": mask, "token_weight": token_weight, **of_tokens}
        inputs = {"attention_mask": attention_mask, **inputs}
        if sequence is not None:
            predictions = SequencePart(predictions, sequence)
            names = {*self.feature_names, "attention_mask"}, self.per_token(inputs)
            targets, aligned, inputs = whole_sequences(sequence, targets, aligned, inputs, *names)
        batch = self.bind(
            predictions,
            self.kept(targets, self.ignore_index),
            inputs,
            **aligned,
            shift=shift,
            denominator=either("denominator", denominator, "num_items_in_batch", num_items_in_batch),
        )
        batch = batch if sequence is None else replace(batch, sequence=sequence)
        return self.evaluate_batch(predictions, batch, inputs, scalars).shaped()

    def per_token(self, inputs: Mapping[str, Any]) -> set[str]:
        """The names of inputs with a row per token, which are gathered where sequences are split.

        Raises:
            ValueError: an input that is in use, and cannot be split.
        """
        return set()

    def evaluate_batch(
        self,
        predictions: Predictions,
        batch: TokenBatch,
        inputs: Mapping[str, Any],
        scalars: Mapping[str, Tensor] | None = None,
        stats: TokenStats | None = None,
    ) -> LossOutput:
        """The loss of an aligned batch, with its statistics flat.

        Args:
            predictions, batch: see :meth:`bind`.
            inputs, scalars: as for :meth:`evaluate`.
            stats: the batch's statistics, flat, if already computed.
        """
        options, per_token, output = self.sweep_options, self.reduction == "none", None
        family = None if torch.compiler.is_compiling() else self.family
        is_whole = stats is None and not scalars and not per_token
        if family and is_whole and predictions.has_cross_entropy(self.backend, self.softcap):
            output = evaluate_cross_entropy(family, predictions, batch, options, self.reads)
        if output is None:
            output = evaluate(
                self.terms(),
                predictions,
                batch,
                options,
                stats=stats,
                weigh=self.weigh,
                reads=self.reads,
                scalars=scalars,
                per_token=per_token,
                family=family,
            )
        return self.complete(output, inputs)

    def complete(self, output: LossOutput, inputs: Mapping[str, Any]) -> LossOutput:
        """The output plus parts that are not per-token terms, which a subclass may have."""
        if isinstance(self.temperature, AdaptiveTemperature) and torch.is_grad_enabled():
            assert output.stats is not None
            nll = output.stats.unscaled.nll.detach().masked_fill(~output.valid, 0.0)
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
        """Advance state that moves once per optimizer step. This happens by itself after ``step()`` of a
        PyTorch optimizer; call it yourself with any other."""
        for module in self.modules():
            if isinstance(module, Stepped):
                module.on_optimizer_step()

    def check_inputs(self, inputs: Iterable[str], more: Iterable[str] = ()) -> None:
        """
        Raises:
            TypeError: a name that :meth:`evaluate` does not know; ``more`` are further names that it knows.
        """
        for name in inputs:
            if name not in (*self.input_names, *HEAD_INPUTS, *more):
                known = {"logits", "targets", *OWN_INPUTS, *self.input_names, *more}
                raise TypeError(unknown_option(type(self).__name__, name, known))

    def plan(self, *, hidden_states: Tensor, lm_head_weight: Tensor, targets: Tensor, **inputs: Any) -> Plan:
        """How this objective would sweep a linear head, and at what cost; computes nothing.

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
        return predictions.plan(batch.targets, batch.ignore_index, self.whole_batch_reason())

    def whole_batch_reason(self) -> str | None:
        """Why a linear head must be swept twice, or None; see
        :func:`lossmith.equation.evaluation.whole_batch_reason`."""
        return whole_batch_reason(self.terms(), None, self.weigh, self.reduction == "none")

    if TYPE_CHECKING:  # nn.Module's own is untyped

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
