"""The one equation, evaluated.

    L = sum_j lambda_j sum_t scale[t] omega_j[t] f_j(stats[t])  +  sum_k lambda_k a_k

``f_j`` is a per-token term, a differentiable function of a token's statistics; ``omega_j``
a detached weight, any function of the batch's statistics; ``scale`` the token's share of
the one denominator; ``a_k`` scalars of other tensors. Objectives, modifiers and components
are ways to fill it in.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lossmith.batch import TokenBatch, align
from lossmith.engine.blocks import accumulation_dtype
from lossmith.engine.checks import check_logits
from lossmith.engine.raw import Needs
from lossmith.engine.stats import TokenStats
from lossmith.engine.sweep import logits_stats
from lossmith.metrics import Metrics
from lossmith.reduction import Denominator, Empty, Reduction, check_reduction

PerToken = Callable[[TokenStats, TokenBatch], Tensor]


@dataclass(frozen=True)
class Term:
    """One per-token term of an objective: ``coefficient * weight * loss``.

    Args:
        name: what the term is called in ``LossOutput.parts``.
        loss: (stats, batch) -> [N], differentiable, never reduced.
        coefficient: lambda; a term whose coefficient is the number 0 is as good as absent.
        weight: (stats, batch) -> [N] or a scalar; sees detached statistics, since a weight
            that could be lowered by gradient descent would be lowered instead of the loss.
        scope: ``token`` if a token's weight depends on that token alone, ``batch`` if on others.
        candidates: batch -> [N, K] ids (-1 pads) whose logits ``loss`` reads.
    """

    name: str
    loss: PerToken
    coefficient: float | Tensor = 1.0
    weight: PerToken | None = None
    scope: Literal["token", "batch"] = "token"
    candidates: Callable[[TokenBatch], Tensor] | None = None

    @property
    def is_off(self) -> bool:
        return not isinstance(self.coefficient, Tensor) and self.coefficient == 0

    def values(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[N] coefficient * weight * loss of each token, before the batch's scale."""
        values = self.loss(stats, batch)
        if values.shape != batch.targets.shape:
            raise ValueError(
                f"term {self.name!r} must return a value per token, {list(batch.targets.shape)}, and leave "
                f"averaging to the objective; got {list(values.shape)}"
            )
        if self.weight is not None:
            weight = self.weight(stats.detach(), batch).detach()
            # an infinite loss of weight 0 is 0
            values = torch.where(weight == 0, 0.0, values * weight)
        return values * self.coefficient


@dataclass(frozen=True)
class SweepOptions:
    """How the logits are read: z <- softcap tanh(z / softcap), then over the temperature."""

    temperature: float | Tensor = 1.0
    softcap: float | None = None
    class_weight: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, Tensor) and not self.temperature > 0:
            raise ValueError(f"temperature must be > 0; got {self.temperature}")
        if isinstance(self.temperature, Tensor) and self.temperature.numel() != 1:
            raise ValueError(
                f"temperature must be one number for all tokens; got a tensor {list(self.temperature.shape)}"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be > 0, or None for none; got {self.softcap}")

    def stats(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        ignore_index: int,
        candidates: Tensor | None = None,
        default_needs: Needs = Needs.CORE,
    ) -> TokenStats:
        """Lazy statistics of ``logits`` [..., V] read this way."""
        return logits_stats(
            logits,
            targets,
            candidates=candidates,
            class_weight=self.checked_class_weight(logits),
            temperature=self._temperature_tensor(logits),
            softcap=self.softcap,
            ignore_index=ignore_index,
            default_needs=default_needs,
        )

    def _temperature_tensor(self, logits: Tensor) -> Tensor | None:
        dtype = accumulation_dtype(logits.dtype)
        if isinstance(self.temperature, Tensor):
            return self.temperature.detach().to(logits.device, dtype).reshape(())
        if self.temperature == 1:
            return None
        return torch.full((), self.temperature, dtype=dtype, device=logits.device)

    def checked_class_weight(self, logits: Tensor) -> Tensor | None:
        if self.class_weight is None:
            return None
        if self.class_weight.shape != logits.shape[-1:]:
            raise ValueError(
                f"class_weight must be [V] = [{logits.shape[-1]}]; got {list(self.class_weight.shape)}"
            )
        return self.class_weight.detach().to(accumulation_dtype(logits.dtype))


@dataclass(frozen=True)
class LossOutput:
    """What an objective made of a batch.

    Attributes:
        total: the loss; the sum of ``parts``. [..., T] per token where the reduction is ``none``.
        parts: each term's contribution, weights and denominator included, by name.
        num_tokens: how many tokens were supervised (0-dimensional tensor).
        stats: the statistics of every token, flat [N]; asking for one that no term used costs
            another pass over the logits.
        metrics: ``loss``, each part, ``nll`` (unsmoothed, temperature 1, a mean over tokens),
            ``perplexity`` and ``accuracy``; computed when they are read.
    """

    total: Tensor
    parts: dict[str, Tensor]
    num_tokens: Tensor
    stats: TokenStats
    metrics: Metrics = field(repr=False)

    def as_dict(self) -> dict[str, Tensor]:
        """The parts, and the loss as ``total_loss``."""
        return {**self.parts, "total_loss": self.total}


def evaluate(
    terms: Sequence[Term],
    stats_of: Callable[[Tensor | None], TokenStats],
    batch: TokenBatch,
    *,
    scalars: Mapping[str, Tensor] | None = None,
    per_token: bool = False,
) -> LossOutput:
    """The equation: terms over the statistics, plus scalars.

    Args:
        terms: the per-token terms; their names are distinct.
        stats_of: candidates [N, K] or None -> flat lazy statistics of the batch.
        batch: the aligned batch.
        scalars: weighted scalars of other tensors, by name.
        per_token: return [..., T] values (the reduction ``none``) rather than their sum.
    """
    terms = [term for term in terms if not term.is_off]
    names = [term.name for term in terms] + list(scalars or ())
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the parts of an objective need distinct names; {twice!r} is there twice")
    candidates, columns = _gather_candidates(terms, batch)
    stats = stats_of(candidates)
    views = [stats if c is None else stats.with_candidates(c) for c in columns]

    def values(of: TokenStats) -> list[Tensor]:
        return [
            term.values(of if c is None else of.with_candidates(c), batch)
            for term, c in zip(terms, columns, strict=True)
        ]

    stats.announce(values)
    parts = {}
    for term, view in zip(terms, views, strict=True):
        shares = torch.where(batch.scale == 0, 0.0, term.values(view, batch) * batch.scale)
        parts[term.name] = shares.reshape(batch.shape) if per_token else shares.sum()
    for name, value in (scalars or {}).items():
        parts[name] = value * batch.share
    total = reduce(operator.add, parts.values()) if parts else _nothing(stats, batch, per_token)
    return LossOutput(total, parts, batch.num_tokens, stats, Metrics(_metrics(total, parts, stats, batch)))


def _nothing(stats: TokenStats, batch: TokenBatch, per_token: bool) -> Tensor:
    """0, connected to the logits: an objective whose terms are all off can still be trained with."""
    zeros = torch.where(batch.valid, 0.0, stats.nll)
    return zeros.reshape(batch.shape) if per_token else zeros.sum()


def _gather_candidates(terms: Sequence[Term], batch: TokenBatch) -> tuple[Tensor | None, list[slice | None]]:
    """All terms' candidate ids side by side [N, K], and each term's columns."""
    found: list[Tensor] = []
    columns: list[slice | None] = []
    width = 0
    for term in terms:
        if term.candidates is None:
            columns.append(None)
            continue
        found.append(term.candidates(batch))
        columns.append(slice(width, width + found[-1].shape[-1]))
        width += found[-1].shape[-1]
    return (torch.cat(found, -1) if found else None), columns


def _metrics(
    total: Tensor, parts: Mapping[str, Tensor], stats: TokenStats, batch: TokenBatch
) -> dict[str, Callable[[], Tensor]]:
    def mean(of: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: (of().detach() * batch.valid).sum() / batch.num_tokens.clamp(min=1)

    nll = mean(lambda: stats.unscaled.nll)
    return {
        "loss": total.sum,
        **{name: part.sum for name, part in parts.items()},
        "nll": nll,
        "perplexity": lambda: nll().exp(),
        "accuracy": mean(lambda: stats.unscaled.correct),
    }


class Objective(nn.Module):
    """A training objective: terms, how the logits are read, and how the tokens are averaged.

    Args:
        terms: the per-token terms.
        reduction: ``mean`` (= ``token_mean``), ``sequence_mean``, ``sum`` or ``none``.
        ignore_index: the target id of tokens without one.
        shift: whether targets are unshifted labels, as Hugging Face has them.
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

    def __init__(
        self,
        terms: Sequence[Term] = (),
        *,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        shift: bool = False,
        empty: Empty = "zero",
        temperature: float = 1.0,
        softcap: float | None = None,
        class_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction, empty)
        SweepOptions(temperature, softcap)
        self.reduction: Reduction = reduction
        self.ignore_index = ignore_index
        self.shift = shift
        self.empty: Empty = empty
        self.temperature = temperature
        self.softcap = softcap
        self.register_buffer("class_weight", class_weight)
        self._terms = tuple(terms)
        self._shift_was_checked = False

    def terms(self) -> Sequence[Term]:
        """The per-token terms of the next batch."""
        return self._terms

    def evaluate(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        mask: Tensor | None = None,
        token_weight: Tensor | None = None,
        input_ids: Tensor | None = None,
        denominator: Denominator | None = None,
        scalars: Mapping[str, Tensor] | None = None,
    ) -> LossOutput:
        """The loss of ``logits`` [..., V] at ``targets`` [...], with its parts and metrics.

        Args:
            logits: [..., T, V].
            targets: [..., T] ids, or unshifted labels with ``shift``.
            mask: [..., T] bool or integers, 0 where a target does not count.
            token_weight: [..., T] weights of the targets; they do not enter the denominator.
            input_ids: [..., T] what the logits were computed from.
            denominator: supervised tokens (or samples) over all micro-batches and ranks.
            scalars: weighted scalars of other tensors to add, by name.
        """
        check_logits(logits, targets)
        options = SweepOptions(self.temperature, self.softcap, self.class_weight)
        batch = align(
            targets,
            ignore_index=self.ignore_index,
            mask=mask,
            token_weight=token_weight,
            input_ids=input_ids,
            num_classes=logits.shape[-1],
            shift=self.shift,
            reduction=self.reduction,
            denominator=denominator,
            class_weight=options.checked_class_weight(logits),
            empty=self.empty,
            dtype=accumulation_dtype(logits.dtype),
        )

        self._warn_if_unshifted(batch)

        def stats_of(candidates: Tensor | None) -> TokenStats:
            return options.stats(logits, batch.targets, ignore_index=self.ignore_index, candidates=candidates)

        return evaluate(self.terms(), stats_of, batch, scalars=scalars, per_token=self.reduction == "none")

    def _warn_if_unshifted(self, batch: TokenBatch) -> None:
        """Once, on the first batch: it is a mistake in the wiring, and looking waits for the device."""
        if self._shift_was_checked or batch.input_ids is None:
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
        logits: Tensor,
        targets: Tensor,
        *,
        mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_weight: Tensor | None = None,
        input_ids: Tensor | None = None,
        denominator: Denominator | None = None,
        num_items_in_batch: Denominator | None = None,
        return_detailed: bool = False,
        **inputs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The loss; with ``return_detailed`` a dict of the parts and ``total_loss``.

        ``attention_mask`` is another name of ``mask``, ``num_items_in_batch`` of ``denominator``.
        """
        output = self.evaluate(
            logits,
            targets,
            mask=_either("mask", mask, "attention_mask", attention_mask),
            token_weight=token_weight,
            input_ids=input_ids,
            denominator=_either("denominator", denominator, "num_items_in_batch", num_items_in_batch),
            **inputs,
        )
        return output.as_dict() if return_detailed else output.total


def _either(name: str, value: Any, alias: str, aliased: Any) -> Any:
    if value is not None and aliased is not None:
        raise TypeError(f"{alias} is another name of {name}; pass one of them")
    return aliased if value is None else value
