"""The one-call forms over a linear head: hidden states and a weight in place of logits."""

from __future__ import annotations

from typing import Annotated, Any, Literal, overload

from torch import Tensor

from lossmith.engine.head.linear_head import LinearHead
from lossmith.engine.head.plan import MemoryBudget, Plan, Strategy
from lossmith.engine.statistics.stats import TokenStats
from lossmith.engine.sweep_options import SweepOptions
from lossmith.equation.reduction import Denominator, Empty, Reduction
from lossmith.functional import stats_of_predictions
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

Bias = Annotated[Tensor | None, option("the head's bias [V]")]


@strict_options
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Bias = None,
    candidates: Candidates = None,
    temperature: Temperature = 1.0,
    softcap: Softcap = None,
    ignore_index: IgnoreIndex = -100,
    memory_budget: MemoryBudget = None,
) -> TokenStats:
    """:func:`lossmith.token_stats` of the logits hidden @ weight.T + bias, which are never there all at once.

    The logits of a chunk of tokens are made, swept and dropped, and made again on the way back: four matrix
    products in all, right for any loss of yours. ``stats.compute(...)`` announces what you want; a statistic
    that is asked for later takes another product.

    Args:
        hidden: [..., D], fp64, fp32, bf16 or fp16.
        weight: [V, D], of the same dtype, or of any under ``torch.autocast``.
        targets: [...] ids, or ``ignore_index``; tokens that have none take no part in any product.
        bias: [V].
        candidates, temperature, softcap, ignore_index: see :func:`lossmith.token_stats`.
        memory_budget: bytes of logits held at a time; default 52 MiB on a CPU, 512 MiB elsewhere.

    Returns:
        :class:`lossmith.TokenStats`, each statistic [...] in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: inputs that do not belong together; the message says which.

    Example:
        >>> import torch, lossmith
        >>> hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
        >>> stats = lossmith.linear_token_stats(hidden, weight, torch.zeros(8, dtype=torch.long))
        >>> loss = (stats.compute("nll", "target_prob").nll * (1 - stats.target_prob) ** 2).mean()
        >>> loss.backward()
    """
    head = LinearHead(hidden, weight, bias, memory_budget=memory_budget)
    options = SweepOptions(temperature, softcap)
    return stats_of_predictions(head, targets, candidates, options, ignore_index)


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, return_stats: Literal[True], **options: Any
) -> tuple[Tensor, TokenStats]: ...
@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, return_stats: Literal[False] = False, **options: Any
) -> Tensor: ...
@strict_options
def linear_cross_entropy(  # pyright: ignore[reportInconsistentOverload]  (they differ in return_stats alone)
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Bias = None,
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
    strategy: Strategy = "auto",
    memory_budget: MemoryBudget = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """:func:`lossmith.cross_entropy` of the logits hidden @ weight.T + bias, never there all at once.

    Chunk by chunk the logits are made and turned into their own gradient: three matrix products, which is
    what they cost with all the logits in memory. Tokens without a target take no part in any. The loss, and
    the sum of the weight's gradient over chunks, are fp32 at least, whatever the dtype.

    Args:
        hidden: [..., D], fp64, fp32, bf16 or fp16, of any stride.
        weight: [V, D], of the same dtype, or of any under ``torch.autocast``.
        targets: [...] ids, or ``ignore_index``.
        bias: [V].
        reduction, denominator, ignore_index, mask, label_smoothing, smoothing_mode, special_tokens,
            class_weight, token_weight, temperature, softcap, z_loss, focal_gamma, confidence_penalty, shift,
            empty, return_stats: see :func:`lossmith.cross_entropy`.
        strategy: ``one_sweep``: as above, where every token's gradient depends on that token alone; asked for
            where that is not so, it is an error. ``two_sweep``: the logits are made again on the way back,
            four products. ``auto``: one sweep where it can be; :func:`linear_cross_entropy.explain` says
            which.
        memory_budget: bytes of logits held at a time; default 52 MiB on a CPU, 512 MiB elsewhere.

    Returns:
        The loss, a scalar or [...] with ``reduction="none"``; with ``return_stats`` (loss, TokenStats).

    Raises:
        TypeError: targets that are not integers, unknown options, dtypes that do not match.
        ValueError: shapes that do not match, an empty batch, an id or an option out of range, or a strategy
            that cannot be.

    Example:
        >>> import torch, lossmith
        >>> hidden = torch.randn(2, 6, 16, requires_grad=True)
        >>> weight = torch.randn(100, 16, requires_grad=True)
        >>> labels = torch.randint(100, (2, 6))
        >>> loss = lossmith.linear_cross_entropy(hidden, weight, labels, shift=True, label_smoothing=0.1)
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
        targets=targets,
        mask=mask,
        token_weight=token_weight,
        denominator=denominator,
        hidden_states=hidden,
        lm_head_weight=weight,
        lm_head_bias=bias,
        strategy=strategy,
        memory_budget=memory_budget,
    )
    if not return_stats:
        return output.total
    assert output.stats is not None
    return output.total, output.stats


@strict_options(also=linear_cross_entropy, name="linear_cross_entropy")
def explain(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Plan:
    """What :func:`linear_cross_entropy` will do with these arguments, and what it costs; nothing is computed.

    Args:
        hidden, weight, targets, options: those of :func:`linear_cross_entropy`.

    Returns:
        :class:`lossmith.Plan`; printed, it is a sentence.

    Raises:
        TypeError: an unknown option, where the message names the nearest, or one of a wrong type.
        ValueError: an option out of range, or a strategy that cannot be.
    """
    of_head = {
        "lm_head_bias": options.pop("bias", None),
        **{name: options.pop(name) for name in ("mask", "strategy", "memory_budget") if name in options},
    }
    for name in ("token_weight", "denominator", "return_stats"):
        options.pop(name, None)
    criterion = CrossEntropyLoss(**options)
    return criterion.plan(hidden_states=hidden, lm_head_weight=weight, targets=targets, **of_head)


linear_cross_entropy.explain = explain  # type: ignore[attr-defined]
