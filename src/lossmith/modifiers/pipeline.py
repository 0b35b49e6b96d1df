"""``LossModifierPipeline``: an objective with loss modifiers applied to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from lossmith.core.former_names import former
from lossmith.core.metrics import Metrics
from lossmith.engine.predictions import Predictions
from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.evaluation import whole_batch_reason
from lossmith.equation.output import LossOutput
from lossmith.equation.reduction import Denominator, Reduction, check_reduction
from lossmith.modifiers.base import BaseLossModifier, ModelMode, read_switch
from lossmith.modifiers.call import Call, check_tensor
from lossmith.modifiers.checks import check_modifier, listed, warn_of_modes
from lossmith.modifiers.scores.score_objective import ScoreObjective
from lossmith.modifiers.tokens.token_objective import TokenObjective
from lossmith.objectives.cross_entropy import CrossEntropyLoss
from lossmith.objectives.inputs import OWN_INPUTS, both_masks, either, given_targets
from lossmith.objectives.objective import Objective
from lossmith.objectives.wrapped import WrappedObjective
from lossmith.options import is_misspelt, option, strict_options

AutoReduction = Literal["auto"] | Reduction


class LossModifierPipeline(WrappedObjective):
    """An objective with loss modifiers applied to it, in one pass over the vocabulary.

        L = sum_t  scale[t] * (product of the samples' weights) * (the token's loss, as modified)

    Lossmith's own modifiers fill in the one equation, so their order makes no difference. Custom ones
    act in the order of the list: see :class:`lossmith.BaseLossModifier`. With nothing enabled it is
    the objective itself.

    Args:
        modifiers: the modifiers, a list or a single one.
        base: the objective to modify; plain cross-entropy if not given.
        model_mode: what the model predicts; if not given, it follows from the batch: one prediction and one
            target per sequence mean SEQUENCE_SCORER, anything else LANGUAGE_MODEL.
        reduction: any of :class:`lossmith.Objective`, or ``auto``: ``sequence_mean`` if a modifier weighs
            samples, the base objective's own otherwise.

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

    @strict_options
    def __init__(
        self,
        modifiers: Annotated[Any, option("the modifiers, or one")] = (),
        *,
        base: Annotated[Any, option("the objective that is modified")] = None,
        model_mode: Annotated[Any, option("what the model predicts")] = None,
        reduction: AutoReduction = "auto",
    ) -> None:
        base = CrossEntropyLoss() if base is None else base
        if not isinstance(base, Objective):
            raise TypeError(
                f"base must be a lossmith.Objective, such as lossmith.CrossEntropyLoss(); got {base!r}"
            )
        if isinstance(base, LossModifierPipeline):
            raise TypeError("a pipeline cannot be the base of another; give all modifiers to one pipeline")
        super().__init__(base)
        self.modifiers = nn.ModuleList()
        self.model_mode = None if model_mode is None else ModelMode.of(model_mode)
        self.auto_reduction: AutoReduction = reduction
        self._is_disabled = False
        for modifier in listed(modifiers):
            self.add_modifier(modifier)

    # ── what is in it ─────────────────────────────────────────────────────────────────────────────

    def add_modifier(self, modifier: BaseLossModifier) -> None:
        """Append a modifier.

        Raises:
            TypeError: it is not a :class:`lossmith.BaseLossModifier`.
            ValueError: it is in the pipeline already.
        """
        check_modifier(modifier)
        if any(modifier is known for known in self.modifiers):
            raise ValueError(f"this {modifier.name} is in the pipeline already; make another one")
        if modifier.is_on():
            warn_of_modes(modifier, self.model_mode)
        self.modifiers.append(modifier)

    def get_enabled_modifier_names(self) -> list[str]:
        """Class names of the enabled modifiers, in order, without those that cannot act: they are not for the
        pipeline's mode, or have warned that they cannot act on their batches."""
        return [m.name for m in self._enabled(self.model_mode) if m.idle_reason is None]

    def is_empty(self) -> bool:
        """Whether no modifier is enabled for the pipeline's mode."""
        return not self._enabled(self.model_mode)

    def look_at(self, targets: Tensor, *, mask: Tensor | None = None, num_classes: int | None = None) -> None:
        """Show the modifiers a batch's targets before training. Each that cannot act on such batches says so
        in a UserWarning, and leaves the list of enabled names.

        Args:
            targets, mask: as for :meth:`modify_loss`.
            num_classes: V, if known.
        """
        mode = self._mode(None, None, targets)
        if mode is not ModelMode.SEQUENCE_SCORER:  # where it takes more than one batch to tell
            objective = TokenObjective(self.base, self._call(mode, "auto", None))
            objective.look_at(targets, mask=mask, num_classes=num_classes)

    @contextlib.contextmanager
    def temporarily_disabled(self) -> Iterator[LossModifierPipeline]:
        """Inside ``with pipeline.temporarily_disabled():`` the objective is unmodified."""
        before, self._is_disabled = self._is_disabled, True
        try:
            yield self
        finally:
            self._is_disabled = before

    @former("set_temporarily_disabled")
    def set_temporarily_disabled(self, disabled: bool) -> None:
        """A former way to leave the modifiers out until the next call."""
        self._is_disabled = read_switch(disabled, "disabled")

    @former("is_temporarily_disabled")
    def is_temporarily_disabled(self) -> bool:
        """A former way to ask whether the modifiers are temporarily left out."""
        return self._is_disabled

    def _enabled(self, mode: ModelMode | None = None) -> list[BaseLossModifier]:
        modifiers: Any = [] if self._is_disabled else self.modifiers
        return [m for m in modifiers if m.is_on() and (mode is None or m.supports_mode(mode))]

    # ── metrics ───────────────────────────────────────────────────────────────────────────────────

    def get_all_metrics(self) -> dict[str, float]:
        """Every enabled modifier's metrics of its last batch, as ``ClassName.metric``: plain floats.

        Reading them is the only device synchronisation in a pipeline.
        """
        everything, names = Metrics({}), []
        for modifier in self._enabled():
            names.append(modifier.name)
            number = names.count(modifier.name)  # a second modifier of the same name is name_2
            label = modifier.name if number == 1 else f"{modifier.name}_{number}"
            found = modifier.get_metrics()
            if not isinstance(found, Mapping):
                raise TypeError(
                    f"{modifier.name}.get_metrics must return a mapping; got {type(found).__name__}"
                )
            everything |= (found if isinstance(found, Metrics) else Metrics(found)).prefixed(f"{label}.")
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
        """The loss as the enabled modifiers change it; ``loss`` itself if none is enabled.

        ``loss`` also comes back unchanged if the enabled modifiers only measure, and custom modifiers receive
        it. If token losses are modified or weighed, the loss is recomputed from ``per_position_loss`` or,
        without it, from the base objective.

        Args:
            logits: [..., T, V]; for a sequence scorer the predictions [B] in [0, 1].
            targets: [..., T] ids; for a sequence scorer numbers [B].
            loss: the reduced loss so far.
            model_mode: what the model predicts; overrides the pipeline's.
            mask, attention_mask: [..., T] bool or integers, 0 where a target is ignored.
            per_position_loss: [..., T] the loss of each position; replaces the base objective's token loss
                (its further factors, such as a focal weight, and its other terms stay).
            ignore_index: marks a position without a target; the base objective's (-100) if not given.
            stats: :func:`lossmith.token_stats` of these logits at these targets, if already computed.
            denominator, num_items_in_batch: supervised tokens (samples, if samples are weighed) over all
                micro-batches and ranks; :meth:`count` counts a batch's.
            reduction: as for the pipeline; overrides it.
            inputs: ``token_weight``, ``input_ids``, ``segment_ids``, ``shift``, and what the base objective
                and custom modifiers take.

        Raises:
            TypeError: an input that the pipeline, its base and its custom modifiers do not take.
        """
        self._check_inputs(inputs)
        targets = given_targets(targets)
        mode = self._mode(model_mode, logits, targets)
        check_tensor("loss", loss)
        if loss is not None and not self._enabled(mode) and not inputs.get("scalars"):
            return loss
        return self.evaluate(
            logits,
            targets,
            loss=loss,
            model_mode=mode,
            mask=either("mask", mask, "attention_mask", attention_mask),
            per_position_loss=per_position_loss,
            ignore_index=ignore_index,
            stats=stats,
            denominator=denominator,
            num_items_in_batch=num_items_in_batch,
            reduction=reduction,
            **inputs,
        ).total

    def evaluate(  # pyright: ignore[reportIncompatibleMethodOverride]  (it takes more)
        self,
        logits: Tensor | Predictions | None = None,
        targets: Tensor | None = None,
        *,
        model_mode: ModelMode | str | None = None,
        mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        denominator: Denominator | None = None,
        num_items_in_batch: Denominator | None = None,
        loss: Tensor | None = None,
        per_position_loss: Tensor | None = None,
        ignore_index: int | None = None,
        stats: TokenStats | None = None,
        reduction: AutoReduction = "auto",
        **inputs: Any,
    ) -> LossOutput:
        """The loss with its parts and metrics; the arguments are those of :meth:`modify_loss`."""
        self._check_inputs(inputs)
        targets = given_targets(targets)
        inputs["mask"], inputs["attention_mask"] = both_masks(mask, attention_mask)
        inputs["denominator"] = either("denominator", denominator, "num_items_in_batch", num_items_in_batch)
        shown = None if isinstance(logits, Predictions) else logits
        call = self._call(
            self._mode(model_mode, shown, targets),
            reduction,
            ignore_index,
            loss=loss,
            per_position_loss=per_position_loss,
            stats=stats,
            inputs=inputs,
        )
        for modifier in self.modifiers:
            if modifier not in call.modifiers:
                vars(modifier)["_metrics"] = {}  # they belong to an earlier batch
        call.check(targets)
        return self._objective(call).evaluate(logits, targets, **inputs)

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
        """What the pipeline divides by: supervised tokens, or samples if samples are weighed.

        Args:
            targets, mask, model_mode, reduction, ignore_index, shift: as for :meth:`modify_loss`.
        """
        call = self._call(self._mode(model_mode, None, targets), reduction, ignore_index)
        return self._objective(call).count(targets, mask=mask, shift=shift)

    def whole_batch_reason(self) -> str | None:
        active = self._enabled(ModelMode.LANGUAGE_MODEL)
        for modifier in active:
            if modifier.is_custom:
                return f"{modifier.name} looks at logits"
            if modifier.weighs:
                return f"{modifier.name} weighs samples"
        per_token = self._reduction("auto", active) == "none"
        return whole_batch_reason(self.base.terms(), None, self.base.weigh, per_token)

    # ── choices ───────────────────────────────────────────────────────────────────────────────────

    def _call(
        self, mode: ModelMode, reduction: AutoReduction, ignore_index: int | None, **given: Any
    ) -> Call:
        active = self._enabled(mode)
        ignored = self.ignore_index if ignore_index is None else ignore_index
        return Call(active, mode, self._reduction(reduction, active), ignored, **given)

    def _objective(self, call: Call) -> TokenObjective | ScoreObjective:
        return (
            ScoreObjective(call)
            if call.mode is ModelMode.SEQUENCE_SCORER
            else TokenObjective(self.base, call)
        )

    def _mode(self, asked: ModelMode | str | None, logits: Tensor | None, targets: Tensor) -> ModelMode:
        check_tensor("logits", logits)
        check_tensor("targets", targets)
        asked = self.model_mode if asked is None else asked
        if asked is not None:
            return ModelMode.of(asked)
        are_flat = targets.dim() <= 1 and (logits is None or logits.dim() <= 1 or logits.shape[-1] == 1)
        is_scored = targets.is_floating_point() or (logits is not None and logits.shape == targets.shape)
        return ModelMode.SEQUENCE_SCORER if are_flat and is_scored else ModelMode.LANGUAGE_MODEL

    def _reduction(self, asked: AutoReduction, active: Sequence[BaseLossModifier]) -> Reduction:
        if asked == "auto":
            asked = self.auto_reduction
        if asked != "auto":
            check_reduction(asked)
            return asked
        own: Reduction = self.base.reduction
        weighs = any(modifier.weighs for modifier in active)
        return "sequence_mean" if weighs and own in ("mean", "token_mean") else own

    @property
    def resolved_reduction(self) -> Reduction:
        return self._reduction("auto", self._enabled(self.model_mode or ModelMode.LANGUAGE_MODEL))

    def _check_inputs(self, inputs: Iterable[str]) -> None:
        """Refuse unknown inputs. Custom modifiers may take any input whose name is not nearly one of ours."""
        ours = (*OWN_INPUTS, *PIPELINE_INPUTS)
        if any(modifier.is_custom for modifier in self.modifiers):
            known = (*ours, *self.base.input_names)
            inputs = [n for n in inputs if n in known or is_misspelt(n, known)]
        self.base.check_inputs(inputs, more=ours)


PIPELINE_INPUTS = ("loss", "model_mode", "per_position_loss", "ignore_index", "reduction")
