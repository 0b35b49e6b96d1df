"""``SequenceScoringJudgeWeightModifier``: weighs samples by a judge's score of the model's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from numbers import Integral
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lossmith.equation.batch import TokenBatch
from lossmith.modifiers.base import ModelMode, given_parameters
from lossmith.modifiers.idle import one_limit
from lossmith.modifiers.summary import Spread
from lossmith.modifiers.tokens.mask_ratio import mask_ratio
from lossmith.modifiers.tokens.token_modifier import Measure, Measured, SampleWeigher
from lossmith.options import check_order, option

Judge = Callable[[Tensor], Tensor]


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def expected_wrongness(ratio: Tensor) -> Tensor:
    """y(x) = x^4 - 2 x^3 + 2 x, the score that a sequence scorer learns for a corrupted share x."""
    return ((ratio - 2) * ratio**2 + 2) * ratio


@dataclass(frozen=True)
class Settings:
    """Parameters of :class:`SequenceScoringJudgeWeightModifier`."""

    checkpoint: Annotated[
        str, option("folder of a trained sequence scorer, or a `.pt` of weights and configuration")
    ] = ""
    exponent: Annotated[
        float, option("exponent of wrongness over its expectation; 0 is no weighting", low=0)
    ] = 1.0
    min_factor: Annotated[float, option("smallest factor", low=0)] = 0.1
    max_factor: Annotated[float, option("largest factor", above=0)] = 10.0
    eps: Annotated[float, option("smallest expectation to divide by", above=0)] = 1e-6

    def check(self, key_of: Callable[[str], str]) -> None:
        check_order(self, "min_factor", "max_factor", key_of)


class SequenceScoringJudgeWeightModifier(SampleWeigher):
    """Weighs samples by how wrong a judge finds what the model would write at the supervised positions.

        x[b] = supervised tokens of sample b / its positions
        s[b] = clamp((wrongness[b] / max(y(x[b]), eps))^exponent, min_factor, max_factor)
        y(x) = x^4 - 2 x^3 + 2 x

    One token is sampled at every supervised position, at temperature 1. Elsewhere the known token stays if
    ``input_ids`` are given, and one is sampled if not. The judge reads the result, after its CLS token if it
    has one, up to its maximum length.

    Args:
        config, parameters: in a mapping or by name, ``enabled`` and the parameters ``checkpoint``,
            ``exponent``, ``min_factor``, ``max_factor``, ``eps``; ``device`` and ``dtype`` for the judge;
            or ``judge``, a callable ids [B, L] -> wrongness [B] in [0, 1], instead of a checkpoint. It may
            have the attributes ``cls_token_id``, ``block_size`` and ``vocab_size``.

    Raises:
        ValueError: neither a checkpoint nor a judge, or one that cannot be used; the message names it.
        TypeError: a judge that is not callable.

    Example:
        >>> import torch, lossmith
        >>> def judge(ids):  # a sequence scorer: ids [B, L] -> wrongness [B]
        ...     return torch.full((len(ids),), 0.5)
        >>> modifier = lossmith.SequenceScoringJudgeWeightModifier({"judge": judge})
        >>> loss = modifier.modify_loss(torch.randn(4, 8, 100), torch.randint(100, (4, 8)))
        >>> modifier.get_metrics()["mean_factor"]
        0.5
    """

    Settings = Settings
    prefix = "judge_weight_"
    enabled_key = "judge_weight_modifier_enabled"
    modes = (ModelMode.LANGUAGE_MODEL,)
    reads = ()
    favours_sparse = True

    settings: Settings
    judge: Judge | None

    def __init__(self, config: Mapping[str, Any] | None = None, **parameters: Any) -> None:
        given = dict(given_parameters(type(self).__name__, config, parameters))
        judge, device, dtype = given.pop("judge", None), given.pop("device", None), given.pop("dtype", None)
        super().__init__(given)
        if judge is not None and not callable(judge):
            raise TypeError(
                f"judge must be a callable ids [B, L] -> wrongness [B]; got {judge!r}. A trained judge is "
                "loaded from its folder: pass a path as checkpoint"
            )
        self._place = {"device": device, "dtype": dtype}
        # Not a submodule: the judge is neither trained nor saved with the loss.
        object.__setattr__(self, "judge", judge)
        if judge is None and self.enabled:
            self._load()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return state | {"judge": None} if self.settings.checkpoint else state

    def _load(self) -> None:
        if not self.settings.checkpoint:
            raise ValueError(
                f"{self.name} needs a judge: pass checkpoint (in a flat configuration "
                "judge_weight_checkpoint), the folder of a sequence scorer"
            )
        # Reading checkpoints needs Hugging Face's transformers, on which the core does not depend.
        integration = import_module("lossmith.integrations.judge")
        judge = integration.load_judge(self.settings.checkpoint, **self._place)
        object.__setattr__(self, "judge", judge)

    @property
    def weighs(self) -> bool:
        return self.settings.exponent != 0

    def on_batch(self, batch: TokenBatch, draw: Callable[[], Tensor]) -> Measure:
        if not self.weighs:
            return lambda stats: Measured()  # without drawing a random number
        s = self.settings
        if self.judge is None:  # it was disabled, or is a copy
            self._load()
        self._check_judge(batch)
        wrongness = self._wrongness(self._sequences(batch, draw())).to(batch.scale)
        expected = expected_wrongness(mask_ratio(batch)).clamp(min=s.eps)
        factor = (wrongness / expected).pow(s.exponent).clamp(s.min_factor, s.max_factor)
        counts = batch.row_counts > 0
        metrics = Spread(wrongness, counts).metrics(
            "mean_wrongness", "min_wrongness", "max_wrongness", "wrongness_std"
        ) | Spread(factor, counts).metrics("mean_factor", "min_factor", "max_factor", "factor_std")
        return lambda stats: Measured(factor, metrics)

    def idle_because(self, batch: TokenBatch) -> str | None:
        has_one = self.weighs and self.settings.min_factor == self.settings.max_factor
        return one_limit("min_factor", "max_factor") if has_one else None

    def _check_judge(self, batch: TokenBatch) -> None:
        """Refuse a judge with impossible attributes, or one that does not know the model's vocabulary."""
        for name in ("vocab_size", "block_size"):
            value = getattr(self.judge, name, None)
            if value is not None and not (_is_whole(value) and value >= 1):
                raise ValueError(f"the judge's {name} must be None or a whole number >= 1; got {value!r}")
        known, cls = getattr(self.judge, "vocab_size", None), getattr(self.judge, "cls_token_id", None)
        if cls is not None and not (_is_whole(cls) and cls >= 0):
            raise ValueError(f"the judge's cls_token_id must be None or a token id, >= 0; got {cls!r}")
        if cls is not None and known is not None and cls >= known:
            raise ValueError(f"the judge's cls_token_id={cls} is outside its vocabulary of {known}")
        if known is not None and batch.num_classes is not None and batch.num_classes > known:
            raise ValueError(
                f"the judge knows {known} tokens and the model writes {batch.num_classes}; "
                "train the judge with the model's tokenizer"
            )

    def _sequences(self, batch: TokenBatch, drawn: Tensor) -> Tensor:
        """[B, L] what the model would write at the supervised positions."""
        drawn = batch.rows(drawn)[:, : batch.num_positions]
        if batch.input_ids is None:
            return drawn
        ahead = batch.shift  # what is drawn at t stands at t + ahead
        known, is_supervised = batch.rows(batch.input_ids), batch.rows(batch.valid)
        rest = torch.where(is_supervised[:, : batch.num_positions], drawn, known[:, ahead:])
        return torch.cat([known[:, :ahead], rest], -1)

    @torch.no_grad()
    def _wrongness(self, ids: Tensor) -> Tensor:
        """[B] the judge's score, in [0, 1]."""
        assert self.judge is not None
        cls_token_id = getattr(self.judge, "cls_token_id", None)
        if cls_token_id is not None:
            ids = torch.cat([ids.new_full((len(ids), 1), cls_token_id), ids], -1)
        block_size = getattr(self.judge, "block_size", None)
        if isinstance(self.judge, nn.Module) and self.judge.training:
            self.judge.eval()
        wrongness = self.judge(ids[:, :block_size])
        if not isinstance(wrongness, Tensor):
            raise TypeError(
                "the judge must return a tensor, one number in [0, 1] a sequence; "
                f"got {type(wrongness).__name__}. "
                "A Hugging Face model is made one by lossmith.integrations.judge.SequenceJudge(model)"
            )
        if wrongness.shape != ids.shape[:1]:
            raise ValueError(
                f"the judge must return one number a sequence, [{len(ids)}]; got {list(wrongness.shape)}"
            )
        return wrongness.detach().clamp(0, 1)
