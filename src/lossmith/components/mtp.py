"""``MTP``: multi-token prediction, by heads on the hidden states that predict further ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lossmith.components.component import Component
from lossmith.engine.head.linear_head import LinearHead
from lossmith.engine.head.plan import HEAD_OPTIONS
from lossmith.engine.predictions import Logits, Predictions
from lossmith.engine.sweep_options import SweepOptions
from lossmith.equation.batch import TokenBatch
from lossmith.equation.evaluation import evaluate
from lossmith.equation.output import LossOutput
from lossmith.equation.term import Reads, Term
from lossmith.options import option, strict_options
from lossmith.options.shared import (
    ConfidenceThreshold,
    HiddenSize,
    NumFutureTokens,
    SharedProjection,
    VocabSize,
    WeightRange,
)
from lossmith.terms.confidence_weight import SCORES, check_weight_range, confidence, confidence_weight

# Of the model's own head, for the further ones: a token's loss depends on that token alone, so they need no
# strategy.
HOW = tuple(name for name in HEAD_OPTIONS if name != "strategy")


class MTP(Component):
    """Cross-entropy of heads k = 1..K on hidden[t] that predict y[t+k]; the main loss predicts y[t].

        1/K sum_k sum_t scale[t+k] w[t] nll_k[t]

    scale is the main loss's own factor of each target: a target that is masked there is masked here. No
    head predicts across rows or segments.

    Args:
        vocab_size: V.
        hidden_size: D; not needed if the model has its own heads and passes ``additional_logits``.
        num_future_tokens: K.
        shared_projection: all heads share one unembedding, each after its own transform [D, D]. It is the
            model's if ``lm_head_weight`` is given, else one more matrix. If False, K unembeddings.
        adaptive: weigh each token by the confidence of the main prediction; see
            :func:`lossmith.terms.confidence_weight.confidence_weight`.
        threshold, weight_range: parameters of that weight.

    Inputs: ``hidden_states`` [B, T, D], or ``additional_logits``: K tensors [B, T, V] (or one [K, B, T, V]);
    ``lm_head_weight`` [V, D]; ``confidence_scores`` [B, T].

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Source: Gloeckle et al., Better & Faster Large Language Models via Multi-token Prediction, 2024.
    """

    optional = ("hidden_states", "additional_logits", "lm_head_weight", *HOW, SCORES)
    per_position = (SCORES,)
    of_own_positions = ("hidden_states", "additional_logits", "lm_head_weight", *HOW)

    @strict_options
    def __init__(
        self,
        vocab_size: VocabSize,
        hidden_size: HiddenSize = None,
        *,
        num_future_tokens: NumFutureTokens = 3,
        shared_projection: SharedProjection = False,
        adaptive: Annotated[bool, option("weigh each token by the confidence of the main loss")] = False,
        threshold: ConfidenceThreshold = 0.7,
        weight_range: WeightRange = (0.5, 1.5),
    ) -> None:
        super().__init__()
        check_weight_range(weight_range)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_future_tokens = num_future_tokens
        self.shared_projection = shared_projection
        self.adaptive, self.threshold, self.weight_range = adaptive, threshold, weight_range
        self.heads = nn.ModuleList()
        self.unembedding: nn.Linear | None = None
        if hidden_size is None:
            return
        if shared_projection:
            self.heads.extend(nn.Linear(hidden_size, hidden_size) for _ in range(num_future_tokens))
            self.unembedding = nn.Linear(hidden_size, vocab_size, bias=False)
        else:
            self.heads.extend(
                nn.Linear(hidden_size, vocab_size, bias=False) for _ in range(num_future_tokens)
            )

    @property
    def reads(self) -> Reads:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("unscaled.top_prob",) if self.adaptive else ()

    def also_read(self, batch: TokenBatch, inputs: Mapping[str, Any]) -> Tensor | None:
        """Positions where a head has a target: the confidence there weighs its loss, even if the main
        prediction has no target."""
        if not self.adaptive or SCORES in batch.features:
            return None
        return self._where_used(batch)

    def _where_used(self, batch: TokenBatch) -> Tensor:
        """[N] bool, positions at which a head has a target."""
        used = [_further_ahead(batch, k)[0] != batch.ignore_index for k in self._steps()]
        return torch.stack(used).any(0)

    def _steps(self) -> range:
        return range(1, self.num_future_tokens + 1)

    def token_sum(self, inputs: Mapping[str, Any], output: LossOutput) -> Tensor:
        batch, stats = output.batch, output.all_stats
        assert batch is not None
        assert stats is not None
        weight = None
        if self.adaptive:
            certainty = confidence(stats.detach(), batch)
            weight = confidence_weight(certainty, threshold=self.threshold, weight_range=self.weight_range)
        total = torch.zeros((), dtype=batch.scale.dtype, device=batch.scale.device)
        for ahead, predictions in enumerate(self._heads(inputs, batch), start=1):
            targets, scale = _further_ahead(batch, ahead)
            scale = scale if weight is None else scale * weight
            valid = targets != batch.ignore_index
            tokens = replace(batch, targets=targets, scale=scale, valid=valid, also_read=None)
            total = total + evaluate([NLL], batch.predicted(predictions), tokens, SweepOptions()).total
        return total / self.num_future_tokens

    def _heads(self, inputs: Mapping[str, Any], batch: TokenBatch) -> Iterator[Predictions]:
        """What each head predicts at every position [N] that this rank has."""
        given, hidden = inputs.get("additional_logits"), inputs.get("hidden_states")
        if given is not None:
            yield from (Logits(self._checked(logits, batch)) for logits in self._of_model(given))
            return
        if hidden is None or not self.heads:
            raise ValueError(
                "multi-token prediction needs hidden_states=[B, T, D] (and hidden_size=D when the loss is "
                "made), or the logits of the model's own heads as additional_logits"
            )
        if not isinstance(hidden, Tensor):
            raise ValueError(
                f"hidden_states must be one tensor, [..., T, D]; got {type(hidden).__name__}. Of the states "
                "of all layers pass the last, hidden_states[-1]"
            )
        is_used = batch.own(self._where_used(batch)).unsqueeze(-1)
        if hidden.shape[-1] != self.hidden_size or hidden[..., 0].numel() != len(is_used):
            raise ValueError(
                f"hidden_states must be [..., T, D] with D = hidden_size = {self.hidden_size} at the "
                f"targets' positions {list(batch.own_shape)}; got {list(hidden.shape)}"
            )
        # What stands at positions without a prediction must not spread, forward or backward.
        flat = torch.where(is_used, hidden.reshape(-1, hidden.shape[-1]), 0.0)
        for head in range(self.num_future_tokens):
            how = {name: inputs[name] for name in HOW if inputs.get(name) is not None}
            yield self.predict(head, flat, inputs.get("lm_head_weight"), **how)

    def _of_model(self, given: Any) -> list[Tensor]:
        logits = list(given)
        if len(logits) != self.num_future_tokens:
            raise ValueError(
                f"additional_logits must be the logits of num_future_tokens={self.num_future_tokens} heads; "
                f"got {len(logits)}"
            )
        return logits

    def _checked(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        if logits.shape[:-1] != batch.own_shape:
            raise ValueError(
                f"additional_logits must be [K, ..., T, V] at the targets' positions "
                f"{list(batch.own_shape)}; got {list(logits.shape)} for a head"
            )
        return logits.reshape(-1, logits.shape[-1])

    def predict(
        self,
        head: int,
        hidden: Tensor,
        lm_head_weight: Tensor | None,
        **how: Any,
    ) -> LinearHead:
        """What a head predicts from hidden [N, D], swept as ``how`` says."""
        own: Any = self.heads[head]
        hidden = hidden.to(own.weight.dtype)
        if not self.shared_projection:
            return LinearHead(hidden=hidden, weight=own.weight, **how)
        hidden = hidden + own(hidden)  # starts near the identity, the model's own prediction
        if lm_head_weight is None:
            assert self.unembedding is not None
            lm_head_weight = self.unembedding.weight
        return LinearHead(hidden=hidden.to(lm_head_weight.dtype), weight=lm_head_weight, **how)


NLL = Term("nll", lambda stats, _: stats.nll, reads=("nll",), scope="token")


def _further_ahead(batch: TokenBatch, ahead: int) -> tuple[Tensor, Tensor]:
    """Targets [N] and scales [N] ``ahead`` positions further on, in the same row and segment."""
    targets, scale = batch.rows(batch.targets), batch.rows(batch.scale)
    valid = batch.rows(batch.valid)
    if batch.segment_ids is not None:
        segments = batch.rows(batch.segment_ids)
        valid = valid & (segments == segments.roll(ahead, -1))  # same segment here and there
    moved = [_earlier(values, ahead, fill) for values, fill in ((targets, batch.ignore_index), (scale, 0.0))]
    is_there = _earlier(valid, ahead, False)
    return (
        moved[0].masked_fill(~is_there, batch.ignore_index).reshape(-1),
        moved[1].masked_fill(~is_there, 0.0).reshape(-1),
    )


def _earlier(values: Tensor, by: int, fill: float | bool) -> Tensor:
    """values[:, t + by] at t, and ``fill`` at the end."""
    out = torch.full_like(values, fill)
    if by < values.shape[-1]:
        out[:, :-by] = values[:, by:]
    return out
