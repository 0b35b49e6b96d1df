"""``NVAMPLoss``: normalised variance-aware max-penalised loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from lossmith.core.distributed import StatsScope, gather_over_ranks, masked_mean, sum_over_ranks
from lossmith.engine.rows.backends import BackendName
from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.batch import TokenBatch
from lossmith.equation.output import LossOutput
from lossmith.equation.reduction import Empty, Reduction
from lossmith.equation.term import Term, TokenLoss
from lossmith.objectives.inputs import either
from lossmith.objectives.objective import Objective
from lossmith.objectives.temperature import AdaptiveTemperature
from lossmith.options import option, strict_options
from lossmith.options.shared import ClassWeight, IgnoreIndex, Shift, Softcap, Temperature


class NVAMPLoss(Objective):
    """Cross-entropy whose unusual tokens count more, plus plain cross-entropy and the largest loss.

        L = (alpha sum_t omega_t ell_t + beta sum_t ell_t) / denominator + gamma mean of the top_k largest ell
        omega_t = (1 + d_t) / (1 + mean d),   d_t = |ell_t - mean ell| / sqrt(var ell + eps)       detached

    Mean and (population) variance are over the supervised tokens of the batch. omega has mean 1, and is 1
    where all losses are equal.

    Args:
        alpha: weight of the variance-aware part.
        beta: weight of plain cross-entropy.
        gamma: weight of the largest losses.
        eps: added to the variance.
        ignore_index: the id that marks a token without a target.
        top_k: how many of the largest losses are averaged.
        legacy: reproduce the published package: alpha (mean d) CE + beta CE + gamma max, with the
            gradients of this formula. As there, the targets are unshifted ``labels``, ignored positions
            count as tokens with a loss of 0, and each micro-batch adds its largest loss in full.
        shift: whether targets are unshifted labels; default: the value of ``legacy``.
        reduction, empty, temperature, softcap, class_weight, backend: see :class:`lossmith.Objective`.
        stats_scope: take mean, variance and largest losses over this rank's batch (``local``) or over all
            ranks' (``global``).

    Raises:
        TypeError: an unknown option (the message names the nearest), or one of the wrong type.
        ValueError: an option out of range.

    Example:
        >>> import torch, lossmith
        >>> criterion = lossmith.NVAMPLoss(alpha=1.0, beta=0.02, gamma=0.001)
        >>> outputs = torch.zeros(2, 3, 5, requires_grad=True)
        >>> round(criterion(outputs, torch.ones(2, 3, dtype=torch.long)).item(), 4)
        1.6432
    """

    @strict_options
    def __init__(
        self,
        alpha: Annotated[float, option("weight of the variance-aware part")] = 1.0,
        beta: Annotated[float, option("weight of plain cross-entropy")] = 0.02,
        gamma: Annotated[float, option("weight of the largest losses")] = 0.001,
        eps: Annotated[float, option("added to the variance", above=0)] = 1e-6,
        ignore_index: IgnoreIndex = -100,
        *,
        top_k: Annotated[int, option("how many of the largest losses are averaged", low=1)] = 1,
        legacy: Annotated[bool, option("the value of the published package")] = False,
        shift: Annotated[Shift | None, option("None is True with legacy, and False without")] = None,
        stats_scope: Annotated[
            StatsScope, option("whether mean, variance and largest losses are those of this rank or of all")
        ] = "local",
        reduction: Reduction = "mean",
        empty: Empty = "zero",
        temperature: Temperature | AdaptiveTemperature = 1.0,
        softcap: Softcap = None,
        class_weight: ClassWeight = None,
        backend: BackendName = None,
    ) -> None:
        super().__init__(
            reduction=reduction,
            ignore_index=ignore_index,
            shift=True if legacy and shift is None else shift,
            empty=empty,
            temperature=temperature,
            softcap=softcap,
            class_weight=class_weight,
            backend=backend,
        )
        self.alpha, self.beta, self.gamma, self.eps = alpha, beta, gamma, eps
        self.top_k = top_k
        self.legacy = legacy
        self.stats_scope: StatsScope = stats_scope

    def terms(self, token_loss: TokenLoss | None = None) -> Sequence[Term]:
        own = self._own_token_loss(token_loss)

        def unusual(stats: TokenStats, batch: TokenBatch) -> Tensor:
            return self._unusual(own(stats, batch), batch)

        def largest(stats: TokenStats, batch: TokenBatch) -> Tensor:
            return self._largest(own(stats, batch), batch)

        share = self._share_of_positions if self.legacy else None
        return [
            Term("variance", own, self.alpha, unusual, own.reads, scope="batch"),
            Term(
                "cross_entropy",
                own,
                self.beta,
                share,
                reads=own.reads,
                scope="token" if share is None else "batch",
            ),
            Term("max", own, self.gamma, largest, own.reads, scope="batch"),
        ]

    def evaluate(  # pyright: ignore[reportIncompatibleMethodOverride]  (it takes one more)
        self,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> LossOutput:
        """As in :class:`lossmith.Objective`; with ``legacy``, ``labels`` is another name for the targets."""
        if labels is not None and not self.legacy:
            raise TypeError(
                "NVAMPLoss takes targets, which logits[t] predict, and no labels. Of unshifted labels pass "
                "targets=labels to NVAMPLoss(shift=True); the published package's value, which is of labels, "
                "is that of NVAMPLoss(legacy=True)"
            )
        return super().evaluate(logits, either("targets", targets, "labels", labels), **inputs)

    def _unusual(self, loss: Tensor, batch: TokenBatch) -> Tensor:
        """[N] omega; with ``legacy``, the single factor of the published formula."""
        counted = _positions(batch) if self.legacy else batch.valid
        loss = torch.where(batch.valid, loss, 0.0)
        mean = masked_mean(loss, counted, self.stats_scope)
        variance = masked_mean((loss - mean).square(), counted, self.stats_scope)
        distance = (loss - mean).abs() / (variance + self.eps).sqrt()
        mean_distance = masked_mean(distance, counted, self.stats_scope)
        if self.legacy:
            return (mean_distance * self._share_of_positions(None, batch)).expand_as(loss)
        return (1 + distance) / (1 + mean_distance)

    def _share_of_positions(self, _: TokenStats | None, batch: TokenBatch) -> Tensor:
        """[N] the factor that turns a mean over supervised tokens into one over all positions; else 1."""
        share = batch.scale.new_ones(())
        if self.reduction in ("mean", "token_mean") and not isinstance(batch.share, Tensor):
            share = batch.valid.to(share.dtype).sum() / _positions(batch).sum().clamp(min=1)
        return share.expand_as(batch.scale)

    def _largest(self, loss: Tensor, batch: TokenBatch) -> Tensor:
        """[N] the subgradient of the mean of the largest losses. That mean is not a sum over tokens, so the
        division that every term undergoes is undone; a micro-batch counts for its share of the batch."""
        values = torch.where(batch.valid, loss, -torch.inf)
        top = values.topk(min(self.top_k, len(values)))
        chosen = torch.zeros_like(loss).scatter(0, top.indices, 1.0) * batch.valid
        if self.stats_scope == "global":
            everyone = gather_over_ranks(top.values, self.top_k)
            chosen = chosen * (values >= everyone.topk(min(self.top_k, len(everyone))).values[-1])
            # without a denominator each rank's loss is its own mean, and the ranks' losses are averaged
            own = torch.stack([chosen.sum(), batch.share * loss.new_ones(())])
            count, total = sum_over_ranks(own, "global").unbind()
            in_full = self.legacy and isinstance(batch.share, Tensor)
            share = chosen / count.clamp(min=1) * (1 if in_full else total)
        else:
            share = chosen / chosen.sum().clamp(min=1) * (1 if self.legacy else batch.share)
        return share / torch.where(batch.scale == 0, 1.0, batch.scale)

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {name: getattr(self, name) for name in ("alpha", "beta", "gamma", "top_k")}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


def _positions(batch: TokenBatch) -> Tensor:
    """[N] bool, the positions that can have a target, ignored or not."""
    num_columns = batch.rows(batch.valid).shape[-1]
    of_row = torch.arange(num_columns, device=batch.valid.device) < batch.num_positions
    return of_row.expand_as(batch.rows(batch.valid)).reshape(-1)
