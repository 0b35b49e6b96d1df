"""``NVAMPLoss``: normalised variance-aware max-penalised loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lossmith.batch import TokenBatch
from lossmith.distributed import (
    STATS_SCOPES,
    StatsScope,
    gather_over_ranks,
    masked_mean,
    num_ranks,
    sum_over_ranks,
)
from lossmith.engine.stats import TokenStats
from lossmith.equation import PerToken, Term
from lossmith.objective import Objective
from lossmith.options import strict_options
from lossmith.reduction import Empty, Reduction


class NVAMPLoss(Objective):
    """Cross-entropy whose unusual tokens count more, plus plain cross-entropy and the largest loss.

        L = alpha sum_t omega_t ell_t / D + beta sum_t ell_t / D + gamma mean of the top_k largest ell
        omega_t = (1 + d_t) / (1 + mean d),   d_t = |ell_t - mean ell| / sqrt(var ell + eps)       detached

    with mean and (population) variance over the supervised tokens of the batch. omega averages 1,
    and is 1 where all losses are equal.

    Args:
        alpha: weight of the variance-aware part.
        beta: weight of plain cross-entropy.
        gamma: weight of the largest losses.
        eps: added to the variance.
        ignore_index: the target id of tokens without one.
        top_k: how many of the largest losses are averaged.
        legacy: the value of the published package, alpha (mean d) CE + beta CE + gamma max, with the
            gradients that this formula has.
        shift, reduction, empty, temperature, softcap, class_weight: see :class:`lossmith.Objective`.
        stats_scope: mean, variance and largest losses of this rank's batch (``local``) or of all ranks'
            (``global``).

    Raises:
        TypeError: an unknown option; the message names the nearest.
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
        alpha: float = 1.0,
        beta: float = 0.02,
        gamma: float = 0.001,
        eps: float = 1e-6,
        ignore_index: int = -100,
        *,
        top_k: int = 1,
        legacy: bool = False,
        shift: bool | int | None = None,
        stats_scope: StatsScope = "local",
        reduction: Reduction = "mean",
        empty: Empty = "zero",
        temperature: float = 1.0,
        softcap: float | None = None,
        class_weight: Tensor | None = None,
    ) -> None:
        super().__init__(
            reduction=reduction,
            ignore_index=ignore_index,
            shift=shift,
            empty=empty,
            temperature=temperature,
            softcap=softcap,
            class_weight=class_weight,
        )
        for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            if not abs(value) < math.inf:
                raise ValueError(f"{name} must be a finite weight; got {value}")
        if not 0 < eps < math.inf:
            raise ValueError(f"eps must be > 0; got {eps}")
        if not (isinstance(top_k, int) and top_k >= 1):
            raise ValueError(f"top_k must be a whole number >= 1; got {top_k}")
        if stats_scope not in STATS_SCOPES:
            raise ValueError(f"stats_scope must be 'local' or 'global'; got {stats_scope!r}")
        self.alpha, self.beta, self.gamma, self.eps = alpha, beta, gamma, eps
        self.top_k = top_k
        self.legacy = legacy
        self.stats_scope: StatsScope = stats_scope

    def terms(self, token_loss: PerToken | None = None) -> Sequence[Term]:
        own = token_loss or self.token_loss

        def unusual(stats: TokenStats, batch: TokenBatch) -> Tensor:
            return self._unusual(own(stats, batch), batch)

        def largest(stats: TokenStats, batch: TokenBatch) -> Tensor:
            return self._largest(own(stats, batch), batch)

        return [
            Term("variance", own, self.alpha, unusual, scope="batch"),
            Term("cross_entropy", own, self.beta),
            Term("max", own, self.gamma, largest, scope="batch"),
        ]

    def _unusual(self, loss: Tensor, batch: TokenBatch) -> Tensor:
        """[N] omega, or the one number that the published formula multiplies by."""
        mean = masked_mean(loss, batch.valid, self.stats_scope)
        variance = masked_mean((loss - mean).square(), batch.valid, self.stats_scope)
        distance = (loss - mean).abs() / (variance + self.eps).sqrt()
        mean_distance = masked_mean(distance, batch.valid, self.stats_scope)
        return mean_distance.expand_as(loss) if self.legacy else (1 + distance) / (1 + mean_distance)

    def _largest(self, loss: Tensor, batch: TokenBatch) -> Tensor:
        """[N] the subgradient of the mean of the largest losses. It is no sum over tokens, so what every
        term is divided by is undone; a part of a larger batch counts for its share."""
        values = torch.where(batch.valid, loss, -torch.inf)
        top = values.topk(min(self.top_k, len(values)))
        chosen = torch.zeros_like(loss).scatter(0, top.indices, 1.0) * batch.valid
        if self.stats_scope == "global":
            everyone = gather_over_ranks(top.values)
            chosen = chosen * (values >= everyone.topk(min(self.top_k, len(everyone))).values[-1])
            count = sum_over_ranks(chosen.sum(), "global").clamp(min=1)
            # without a denominator each rank's loss is a mean of its own, and those are averaged
            share = chosen / count * (1 if isinstance(batch.share, Tensor) else num_ranks())
        else:
            share = chosen / chosen.sum().clamp(min=1) * batch.share
        return share / torch.where(batch.scale == 0, 1.0, batch.scale)

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {name: getattr(self, name) for name in ("alpha", "beta", "gamma", "top_k")}
        return ", ".join(f"{name}={value}" for name, value in shown.items())
