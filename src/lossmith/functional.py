"""The one-call forms."""

from __future__ import annotations

from typing import Annotated, Any, Literal, overload

import torch
from torch import Tensor

from lossmith.engine.predictions import Logits, Predictions
from lossmith.engine.statistics.raw import Needs
from lossmith.engine.statistics.stats import TokenStats
from lossmith.engine.sweep_options import SweepOptions
from lossmith.equation.batch import check_mask
from lossmith.equation.reduction import Denominator, Empty, Reduction, token_scale
from lossmith.objectives.cross_entropy import CrossEntropyLoss
from lossmith.options import option, strict_options
from lossmith.options.shared import (
    Candidates,
    ClassWeight,
    ConfidencePenaltyCoefficient,
    FocalGamma,
    IgnoreIndex,
    LabelSmoothing,
    Mask,
    Shift,
    Softcap,
    SpecialTokens,
    Temperature,
    TokenWeight,
    ZLossCoefficient,
)
from lossmith.terms.cross_entropy import SmoothingMode
from lossmith.terms.ranking import ranking


@strict_options
def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    candidates: Candidates = None,
    temperature: Temperature = 1.0,
    softcap: Softcap = None,
    ignore_index: IgnoreIndex = -100,
) -> TokenStats:
    """What each token's distribution says about its target: the building blocks of your own loss.

    All differentiable statistics come from one pass over the logits, made when the first
    is read, and all their gradients from one more. ``stats.compute("nll", "entropy")``
    announces which ones you want; the others then cost nothing.

    Args:
        logits: [..., V] of any stride, fp64, fp32, bf16 or fp16; -inf masks a class.
        targets: [...] ids, or ``ignore_index``.
        candidates: [..., K] further ids to read the logits of; -1 where there is none.
        temperature: >= 1e-6; the statistics are those of logits / temperature, and
            ``stats.unscaled`` has those of the logits as they are. Not differentiated.
        softcap: c >= 1e-6 for z <- c tanh(z / c), before the temperature.
        ignore_index: the target id of tokens without one.

    Returns:
        :class:`lossmith.TokenStats`, each statistic [...] in fp32 (fp64 for fp64 logits).

    Raises:
        TypeError: targets or candidates are not integers, logits not floating point, unknown options or
            values of another type.
        ValueError: shapes that do not match, an empty batch, an id or an option out of range.

    Example:
        >>> import torch, lossmith
        >>> logits = torch.tensor([[2.0, 1.0, 4.0, 0.5]])
        >>> stats = lossmith.token_stats(logits, torch.tensor([2]))
        >>> round(stats.normalized_wrong_entropy.item(), 3), stats.correct.item()
        (0.825, True)
    """
    return stats_of_predictions(
        Logits(logits), targets, candidates, SweepOptions(temperature, softcap), ignore_index
    )


def stats_of_predictions(
    predictions: Predictions,
    targets: Tensor,
    candidates: Tensor | None,
    options: SweepOptions,
    ignore_index: int,
) -> TokenStats:
    """:func:`token_stats` of any predictions."""
    predictions.check(targets)
    default = Needs.ENTROPY | Needs.SUM | Needs.TOP | Needs.COUNT
    if candidates is not None:
        default |= Needs.CANDIDATES
    return options.stats(
        predictions, targets, ignore_index=ignore_index, candidates=candidates, default_needs=default
    )


@overload
def cross_entropy(
    logits: Tensor, targets: Tensor, *, return_stats: Literal[True], **options: Any
) -> tuple[Tensor, TokenStats]: ...
@overload
def cross_entropy(
    logits: Tensor, targets: Tensor, *, return_stats: Literal[False] = False, **options: Any
) -> Tensor: ...
@strict_options
def cross_entropy(  # pyright: ignore[reportInconsistentOverload]  (the overloads differ in return_stats alone)
    logits: Tensor,
    targets: Tensor,
    *,
    reduction: Reduction = "mean",
    denominator: Denominator | None = None,
    ignore_index: IgnoreIndex = -100,
    mask: Mask = None,
    label_smoothing: LabelSmoothing = 0.0,
    smoothing_mode: SmoothingMode = "uniform",
    special_tokens: SpecialTokens = (),
    class_weight: ClassWeight = None,
    token_weight: TokenWeight = None,
    temperature: Temperature = 1.0,
    softcap: Softcap = None,
    z_loss: ZLossCoefficient = 0.0,
    focal_gamma: FocalGamma = 0.0,
    confidence_penalty: ConfidencePenaltyCoefficient = 0.0,
    shift: Shift = False,
    empty: Empty = "zero",
    return_stats: Annotated[bool, option("also return the statistics")] = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Cross-entropy with everything people add to it, in one pass over the logits each way.

    ``logits[t]`` predict ``targets[t]``. Unshifted labels, as Hugging Face has them, want ``shift=True``:
    without it the model learns to copy its input.

        (1 - p_y)^focal_gamma * smoothed cross-entropy  +  z_loss * logsumexp^2  -  confidence_penalty * H(p)

    averaged over the supervised tokens. With defaults it equals
    ``torch.nn.functional.cross_entropy``, except that a batch without a supervised token
    gives 0. Any option left at its default leaves the result bit-identical.

    Args:
        logits: [..., V] of any stride, fp64, fp32, bf16 or fp16; the loss is at least fp32.
        targets: [...] ids, or ``ignore_index``.
        reduction: ``mean`` (= ``token_mean``) over supervised tokens, ``sequence_mean`` (the
            mean over samples, [..., T], of each one's mean), ``sum``, or ``none`` ([...] values).
        denominator: number of supervised tokens (or samples) over all micro-batches and ranks,
            to divide by instead of this batch's own.
        ignore_index: the target id of tokens without one.
        mask: [...] bool or integers, 0 where a target does not count.
        label_smoothing: eps in [0, 1), taken from the target and spread over the classes.
        smoothing_mode: ``uniform``: eps/V on every class (PyTorch); ``exclude_target``:
            eps/(V-1) on the wrong ones.
        special_tokens: target ids that are not smoothed, in [0, V).
        class_weight: [V]; a mean divides by the summed weights of the targets, and z-loss and
            confidence penalty of a token are weighed alike.
        token_weight: [...] what each token's loss is multiplied by; not in the denominator.
        temperature: >= 1e-6, divides the logits; z-loss is that of the logits as they are.
        softcap: c >= 1e-6 for z <- c tanh(z / c), before everything.
        z_loss: coefficient of logsumexp^2.
        focal_gamma: >= 0; tokens count (1 - p_y)^gamma.
        confidence_penalty: coefficient of the negative entropy.
        shift: True: targets are labels as Hugging Face has them, logits[t] predict targets[t + 1]; a number:
            targets[t + shift].
        empty: a batch without a supervised token gives ``zero`` (with zero gradients) or ``nan``.
        return_stats: also return the statistics, in the targets' shape.

    Returns:
        The loss, a scalar or [...] with ``none``; with ``return_stats`` (loss, TokenStats).

    Raises:
        TypeError: targets that are not integers, logits not floating point, unknown options or values of
            another type.
        ValueError: shapes that do not match, an empty batch, an id or an option out of range.

    Example:
        >>> import torch, lossmith
        >>> logits = torch.randn(2, 6, 32, requires_grad=True)
        >>> labels = torch.randint(32, (2, 6))
        >>> loss = lossmith.cross_entropy(logits, labels, shift=True, label_smoothing=0.1, z_loss=1e-4)
        >>> loss.backward()
    """
    criterion = CrossEntropyLoss(
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        smoothing_mode=smoothing_mode,
        special_tokens=special_tokens,
        class_weight=class_weight,
        temperature=temperature,
        softcap=softcap,
        z_loss=z_loss,
        focal_gamma=focal_gamma,
        confidence_penalty=confidence_penalty,
        shift=shift,
        empty=empty,
    )
    output = criterion.evaluate(
        logits, targets, mask=mask, token_weight=token_weight, denominator=denominator
    )
    if not return_stats:
        return output.total
    assert output.stats is not None
    return output.total, output.stats


@strict_options
def perplexity(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: IgnoreIndex = -100,
    mask: Mask = None,
    softcap: Softcap = None,
    shift: Shift = False,
) -> Tensor:
    """exp of the mean NLL over the supervised tokens: unsmoothed, at temperature 1.

    Over a corpus, average tokens and not batches: use :class:`lossmith.Perplexity`.

    Args:
        logits, targets, ignore_index, mask, softcap, shift: see :func:`lossmith.cross_entropy`.

    Returns:
        A scalar; 1 where there is no supervised token.

    Example:
        >>> import torch, lossmith
        >>> round(lossmith.perplexity(torch.zeros(1, 4, 10), torch.ones(1, 4, dtype=torch.long)).item(), 4)
        10.0
    """
    return cross_entropy(
        logits, targets, ignore_index=ignore_index, mask=mask, softcap=softcap, shift=shift
    ).exp()


@strict_options
def ranking_loss(
    positive: Annotated[Tensor, option("scores of what should rank higher")],
    negative: Annotated[Tensor, option("scores of what should rank lower")],
    *,
    margin: Annotated[float, option("by how much it should", low=0)] = 1.0,
    mask: Annotated[Tensor | None, option("which pairs count")] = None,
    reduction: Annotated[Literal["mean", "sum", "none"], option("how pairs are averaged")] = "mean",
    denominator: Denominator | None = None,
) -> Tensor:
    """relu(margin - s_pos + s_neg), averaged over the pairs.

    Args:
        positive: [...] scores of what should rank higher.
        negative: [...] scores of what should rank lower, broadcastable to ``positive``.
        margin: >= 0.
        mask: [...] bool, which pairs count.
        reduction: ``mean``, ``sum`` or ``none``.
        denominator: number of pairs over all micro-batches and ranks.

    Raises:
        TypeError: scores that are no tensors, or an option of a wrong type.
        ValueError: an option out of range, or shapes that do not broadcast.

    Example:
        >>> import torch, lossmith
        >>> lossmith.ranking_loss(torch.tensor([2.0, 0.5]), torch.tensor([0.0, 0.0])).item()
        0.25
    """
    try:
        torch.broadcast_shapes(positive.shape, negative.shape)
    except RuntimeError:
        raise ValueError(
            "positive and negative must be scores of the same pairs, up to broadcasting; got shapes "
            f"{list(positive.shape)} and {list(negative.shape)}"
        ) from None
    if mask is not None:
        check_mask("mask", mask)
    values = ranking(positive, negative, margin=margin)
    valid = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool().expand_as(values)
    scale = token_scale(valid, reduction, denominator=denominator, dtype=values.dtype)
    shares = torch.where(valid, values, 0.0) * scale
    return shares if reduction == "none" else shares.sum()
