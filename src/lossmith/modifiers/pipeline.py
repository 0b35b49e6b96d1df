"""``LossModifierPipeline``: an objective with loss modifiers applied to it."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lossmith.batch import TokenBatch
from lossmith.engine.predictions import Logits
from lossmith.engine.stats import TokenStats
from lossmith.equation import LossOutput, Term, with_parts
from lossmith.evaluation import whole_batch_reason
from lossmith.inputs import OWN_INPUTS, both_masks, either, given_targets, take_predictions
from lossmith.metrics import Metrics
from lossmith.modifiers.base import BaseLossModifier, ModelMode
from lossmith.modifiers.score_run import ScoreBatch, evaluate_scores
from lossmith.modifiers.scorer_modifier import ScorerModifier
from lossmith.modifiers.token_modifier import TokenModifier
from lossmith.modifiers.token_run import TokenRun
from lossmith.objective import Objective
from lossmith.reduction import Denominator, Reduction, check_reduction
from lossmith.terms.cross_entropy import cross_entropy
from lossmith.wrapped_objective import WrappedObjective

AutoReduction = Literal["auto"] | Reduction


class LossModifierPipeline(WrappedObjective):
    """An objective and the loss modifiers applied to it, in one pass over the vocabulary.

        L = sum_t  scale[t] * (product of the samples' weights) * (the token's loss, as modified)

    Modifiers of lossmith fill in the one equation, so their order makes no difference. Custom ones
    act in the order of the list: see :class:`lossmith.BaseLossModifier`. With nothing enabled it is
    the objective itself.

    Args:
        modifiers: the modifiers.
        base: the objective that is modified; plain cross-entropy if not given.
        model_mode: what the model predicts; if not given, it shows from the batch: a prediction and a target
            a sequence are a SEQUENCE_SCORER's, anything else a LANGUAGE_MODEL's.
        reduction: ``auto`` is ``sequence_mean`` where a modifier weighs samples, and the base
            objective's own elsewhere; or any of :class:`lossmith.Objective`.

    Attributes:
        modifiers: the modifiers, enabled or not.
        base: the objective.

    Example:
        >>> import torch, lossmith
        >>> pipeline = lossmith.LossModifierPipeline(
        ...     [lossmith.EntropyModifier({}), lossmith.TargetSmoothingModifier({"factor": 0.1})]
        ... )
        >>> logits = torch.randn(4, 8, 100, requires_grad=True)
        >>> loss = pipeline.modify_loss(logits, torch.randint(100, (4, 8)))
        >>> loss.backward()
        >>> pipeline.get_enabled_modifier_names()
        ['EntropyModifier', 'TargetSmoothingModifier']
    """

    def __init__(
        self,
        modifiers: Iterable[BaseLossModifier] = (),
        *,
        base: Objective | None = None,
        model_mode: ModelMode | str | None = None,
        reduction: AutoReduction = "auto",
    ) -> None:
        if base is None:
            base = Objective([Term("cross_entropy", _cross_entropy)])
        if isinstance(base, LossModifierPipeline):
            raise TypeError("a pipeline cannot be the base of another; give all modifiers to one pipeline")
        if reduction != "auto":
            check_reduction(reduction)
        super().__init__(base)
        self.modifiers = nn.ModuleList()
        self.model_mode = None if model_mode is None else ModelMode(model_mode)
        self.auto_reduction: AutoReduction = reduction
        self._is_disabled = False
        for modifier in modifiers:
            self.add_modifier(modifier)

    # ── what is in it ─────────────────────────────────────────────────────────────────────────────

    def add_modifier(self, modifier: BaseLossModifier) -> None:
        """Append a modifier.

        Raises:
            TypeError: it is not a :class:`lossmith.BaseLossModifier`.
            ValueError: it is in the pipeline already.
        """
        if not isinstance(modifier, BaseLossModifier):
            raise TypeError(
                f"a modifier must be an instance of a subclass of lossmith.BaseLossModifier; got {modifier!r}"
            )
        if any(modifier is known for known in self.modifiers):
            raise ValueError(f"this {modifier.name} is in the pipeline already; make another one")
        self.modifiers.append(modifier)

    def get_enabled_modifier_names(self) -> list[str]:
        """Class names of the enabled modifiers, in order."""
        return [modifier.name for modifier in self._enabled()]

    def is_empty(self) -> bool:
        """Whether no modifier is enabled."""
        return not self._enabled()

    @contextlib.contextmanager
    def temporarily_disabled(self) -> Iterator[LossModifierPipeline]:
        """``with pipeline.temporarily_disabled():`` the objective is the unmodified one."""
        before, self._is_disabled = self._is_disabled, True
        try:
            yield self
        finally:
            self._is_disabled = before

    def _enabled(self, mode: ModelMode | None = None) -> list[BaseLossModifier]:
        enabled = [] if self._is_disabled else [m for m in self.modifiers if m.enabled]
        return [m for m in enabled if mode is None or m.supports_mode(mode)]  # type: ignore[misc]

    # ── metrics ───────────────────────────────────────────────────────────────────────────────────

    def get_all_metrics(self) -> dict[str, float]:
        """Every enabled modifier's metrics of its last batch, as ``ClassName.metric``: plain floats.

        Reading them is the only synchronisation with the device that a pipeline makes.
        """
        everything = Metrics({})
        names: list[str] = []
        for modifier in self._enabled():
            names.append(modifier.name)
            number = names.count(modifier.name)
            label = modifier.name if number == 1 else f"{modifier.name}_{number}"
            found = modifier.get_metrics()
            if not isinstance(found, Mapping):
                raise TypeError(
                    f"{modifier.name}.get_metrics must return a mapping; got {type(found).__name__}"
                )
            metrics = found if isinstance(found, Metrics) else Metrics(found)
            everything |= metrics.prefixed(f"{label}.")
        return everything.to_dict()

    def reset_all_metrics(self) -> None:
        """Forget all metrics."""
        for modifier in self.modifiers:
            modifier.reset_metrics()  # type: ignore[operator]

    # ── the loss ──────────────────────────────────────────────────────────────────────────────────

    def modify_loss(
        self,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        loss: Tensor | None = None,
        *,
        model_mode: ModelMode | str | None = None,
        mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        per_position_loss: Tensor | None = None,
        ignore_index: int | None = None,
        stats: TokenStats | None = None,
        denominator: Denominator | None = None,
        num_items_in_batch: Denominator | None = None,
        reduction: AutoReduction = "auto",
        **inputs: Any,
    ) -> Tensor:
        """The loss as the enabled modifiers make it; ``loss`` itself where none is enabled.

        ``loss`` is also what comes back where the enabled modifiers only measure, and what custom
        modifiers are given. Where the token losses are modified or weighed, the loss is made of
        ``per_position_loss``, or without it of the base objective.

        Args:
            logits: [..., T, V]; of a sequence scorer the predictions [B] in [0, 1].
            targets: [..., T] ids, or [B] numbers of a sequence scorer.
            loss: the reduced loss so far.
            model_mode: what the model predicts, in place of the pipeline's.
            mask, attention_mask: [..., T] bool or integers, 0 where a target does not count.
            per_position_loss: [..., T] the loss of each position, in place of the base objective's
                (what that makes of it, say by a focal weight, or adds to it, stays).
            ignore_index: the target id of positions without one; the base objective's (-100) if not given.
            stats: :func:`lossmith.token_stats` of these logits at these targets, if they are here already.
            denominator, num_items_in_batch: supervised tokens (samples, where samples are weighed) over
                all micro-batches and ranks; :meth:`count` counts a batch's.
            reduction: see the pipeline's; this call's goes first.
            inputs: ``token_weight``, ``input_ids``, ``segment_ids``, ``shift``, what the base objective
                takes, and whatever custom modifiers take.

        Raises:
            TypeError: an input that neither the pipeline, nor its base, nor a custom modifier can take.
        """
        targets = given_targets(targets)
        mode = self._mode(model_mode, logits, targets)
        self._check_inputs(inputs)
        if loss is not None and not isinstance(loss, Tensor):
            raise TypeError(f"loss must be a tensor; got {type(loss).__name__}")
        if loss is not None and not self._enabled(mode) and not inputs.get("scalars"):
            return loss
        mask = either("mask", mask, "attention_mask", attention_mask)
        return self._evaluate(
            logits,
            targets,
            loss=loss,
            mode=mode,
            mask=mask,
            attention_mask=mask,  # components see the one that there is, as in evaluate
            per_position_loss=per_position_loss,
            ignore_index=ignore_index,
            stats=stats,
            denominator=either("denominator", denominator, "num_items_in_batch", num_items_in_batch),
            reduction=reduction,
            **inputs,
        ).total

    def evaluate(  # pyright: ignore[reportIncompatibleMethodOverride]  (it takes more)
        self,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        model_mode: ModelMode | str | None = None,
        mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        denominator: Denominator | None = None,
        num_items_in_batch: Denominator | None = None,
        **inputs: Any,
    ) -> LossOutput:
        """The loss with its parts and metrics; the arguments are those of :meth:`modify_loss`."""
        targets = given_targets(targets)
        self._check_inputs(inputs)
        inputs["mask"], inputs["attention_mask"] = both_masks(mask, attention_mask)
        inputs["denominator"] = either("denominator", denominator, "num_items_in_batch", num_items_in_batch)
        return self._evaluate(logits, targets, mode=self._mode(model_mode, logits, targets), **inputs)

    def count(  # pyright: ignore[reportIncompatibleMethodOverride]  (it takes more)
        self,
        targets: Tensor,
        *,
        mask: Tensor | None = None,
        model_mode: ModelMode | str | None = None,
        reduction: AutoReduction = "auto",
        ignore_index: int | None = None,
        shift: bool | int | None = None,
    ) -> Tensor:
        """What the pipeline divides by: supervised tokens, or samples where samples are weighed.

        Args:
            targets, mask, model_mode, reduction, ignore_index, shift: as for :meth:`modify_loss`.
        """
        mode = self._mode(model_mode, None, targets)
        if mode is ModelMode.SEQUENCE_SCORER:
            return (
                torch.full((), targets.numel(), device=targets.device) if mask is None else mask.bool().sum()
            )
        active = self._enabled(mode)
        ignored = self.ignore_index if ignore_index is None else ignore_index
        return self.base.count(
            _kept(active, targets, ignored),
            mask=mask,
            reduction=self._reduction(reduction, active),
            ignore_index=ignored,
            shift=shift,
        )

    def _evaluate(
        self,
        logits: Tensor | None,
        targets: Tensor,
        *,
        mode: ModelMode,
        loss: Tensor | None = None,
        mask: Tensor | None = None,
        per_position_loss: Tensor | None = None,
        ignore_index: int | None = None,
        stats: TokenStats | None = None,
        denominator: Denominator | None = None,
        reduction: AutoReduction = "auto",
        scalars: Mapping[str, Tensor] | None = None,
        token_weight: Tensor | None = None,
        shift: bool | int | None = None,
        **inputs: Any,
    ) -> LossOutput:
        active = self._enabled(mode)
        for modifier in self.modifiers:
            if modifier not in active:
                vars(modifier)["_metrics"] = {}  # of a batch that is no longer the last
        resolved = self._reduction(reduction, active)
        ignored = self.ignore_index if ignore_index is None else ignore_index
        of_batch = {name: inputs.get(name) for name in ("input_ids", "segment_ids")}
        of_batch |= {"mask": mask, "denominator": denominator}
        for_custom = {**inputs, **of_batch, "model_mode": mode, "reduction": resolved}
        for_custom["ignore_index"] = ignored
        if mode is ModelMode.SEQUENCE_SCORER:
            if logits is None:
                raise TypeError("a sequence scorer's predictions [B] are missing; pass them as logits")
            if token_weight is not None:
                raise TypeError("token_weight weighs tokens, and a sequence scorer has none; leave it out")
            if shift:
                raise TypeError(
                    "shift moves targets along a row, and a sequence scorer has none; leave it out"
                )
            scores = ScoreBatch(logits, targets, mask, denominator, resolved)
            output = evaluate_scores(active, scores, loss, per_position_loss, for_custom)
            return with_parts(output, {k: v * scores.share for k, v in (scalars or {}).items()})
        if per_position_loss is not None and per_position_loss.shape != targets.shape:
            raise ValueError(
                f"per_position_loss must have the targets' shape {list(targets.shape)}; "
                f"got {list(per_position_loss.shape)}"
            )
        predictions, inputs = take_predictions(logits, inputs, self.base.input_names)
        if any(not isinstance(modifier, TokenModifier) for modifier in active):
            predictions = Logits(predictions.logits())  # custom modifiers look at them
        batch, stats_of = self.base.bind(
            predictions,
            _kept(active, targets, ignored),
            stats=stats,
            reduction=resolved,
            ignore_index=ignored,
            token_weight=token_weight,
            shift=shift,
            features=self.base.features(inputs),
            **of_batch,
        )
        run = TokenRun(
            self.base,
            active,
            batch,
            stats_of,
            per_position_loss,
            lambda: predictions.sample(self.base.sweep_options.softcap).reshape(-1),
            denominator is not None or resolved not in ("sum", "none"),
            {"scalars": scalars, "per_token": resolved == "none", "memory": self._memory},
            inputs,
        )
        return run.finish(predictions, targets, loss, for_custom)

    def whole_batch_reason(self) -> str | None:
        active = self._enabled(ModelMode.LANGUAGE_MODEL)
        for modifier in active:
            if not isinstance(modifier, TokenModifier):
                return f"{modifier.name} looks at logits"
            if modifier.weighs:
                return f"{modifier.name} weighs samples"
        return whole_batch_reason(self.base.terms(), None, self._reduction("auto", active) == "none")

    # ── choices ───────────────────────────────────────────────────────────────────────────────────

    def _mode(self, asked: ModelMode | str | None, logits: Tensor | None, targets: Tensor) -> ModelMode:
        if asked is not None or self.model_mode is not None:
            return ModelMode(self.model_mode if asked is None else asked)
        are_flat = targets.dim() <= 1 and (logits is None or logits.dim() == 1 or logits.shape[-1] == 1)
        is_scored = targets.is_floating_point() or (logits is not None and logits.shape == targets.shape)
        return ModelMode.SEQUENCE_SCORER if are_flat and is_scored else ModelMode.LANGUAGE_MODEL

    def _reduction(self, asked: AutoReduction, active: Sequence[BaseLossModifier]) -> Reduction:
        if asked == "auto":
            asked = self.auto_reduction
        if asked != "auto":
            check_reduction(asked)
            return asked
        own: Reduction = self.base.reduction
        weighs = any(isinstance(m, TokenModifier) and m.weighs for m in active)
        return "sequence_mean" if weighs and own in ("mean", "token_mean") else own

    def _check_inputs(self, inputs: Iterable[str]) -> None:
        """Custom modifiers may take anything but what is nearly a name of ours; without one an unknown name
        is a mistake."""
        ours = (*OWN_INPUTS, *PIPELINE_INPUTS)
        if any(not isinstance(m, TokenModifier | ScorerModifier) for m in self.modifiers):
            known = (*ours, *self.base.input_names)
            inputs = [n for n in inputs if n in known or difflib.get_close_matches(n, known, 1, NEARLY)]
        self.base.check_inputs(inputs, more=ours)


def _cross_entropy(stats: TokenStats, batch: TokenBatch) -> Tensor:
    return cross_entropy(stats, batch.target_weight)


NEARLY = 0.85
PIPELINE_INPUTS = ("loss", "model_mode", "per_position_loss", "ignore_index", "reduction")


def _kept(active: Sequence[BaseLossModifier], targets: Tensor, ignore_index: int) -> Tensor:
    """The targets, less those that a modifier leaves out."""
    for modifier in active:
        if isinstance(modifier, TokenModifier) and modifier.changes_loss:
            kept = modifier.keeps(targets)
            targets = targets if kept is None else targets.masked_fill(~kept, ignore_index)
    return targets
