"""The one-call forms: of logits, or of a linear head, hidden states and a weight."""

from __future__ import annotations

from typing import Annotated, Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from lossmith.engine.head.plan import (
    HEAD_OPTIONS,
    LogitsDtype,
    MemoryBudget,
    Plan,
    SkipIgnored,
    SkipSmallGradients,
    Strategy,
)
from lossmith.engine.predictions import Predictions
from lossmith.engine.rows.backends import BackendName
from lossmith.engine.shards.dtensor import head_as_predictions, logits_as_predictions
from lossmith.engine.statistics.raw import Needs
from lossmith.engine.statistics.stats import TokenStats
from lossmith.engine.sweep_options import SweepOptions
from lossmith.equation.batch import check_mask
from lossmith.equation.output import LossOutput
from lossmith.equation.reduction import Denominator, scaled, token_scale
from lossmith.objectives.calls import BatchOptions, Bias, explained
from lossmith.objectives.cross_entropy import CrossEntropyLoss, CrossEntropyOptions
from lossmith.options import option, strict_options
from lossmith.options.shared import Candidates, IgnoreIndex, Mask, Softcap, Temperature, TokenWeight
from lossmith.terms.ranking import ranking

ReturnStats = Annotated[bool, option("also return the statistics")]


@strict_options
def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    candidates: Candidates = None,
    temperature: Temperature = 1.0,
    softcap: Softcap = None,
    ignore_index: IgnoreIndex = -100,
    backend: BackendName = None,
) -> TokenStats:
    """Statistics of each token's distribution and its target: the building blocks of your own loss.

    All differentiable statistics come from one pass over the logits, made when the first is read, and all
    their gradients from one more. ``stats.compute("nll", "entropy")`` declares which ones you want; the
    others then cost nothing.

    Args:
        logits: [..., V] of any stride, fp64, fp32, bf16 or fp16; -inf masks a class.
        targets: [...] ids, or ``ignore_index``.
        candidates: [..., K] further ids to compute statistics of; -1 where there is none.
        temperature: >= 1e-6; the statistics are those of logits / temperature, and ``stats.unscaled`` has
            those of the logits as they are. It gets no gradient.
        softcap: c >= 1e-6 for z <- c tanh(z / c), before the temperature.
        ignore_index: the id that marks a token without a target.
        backend: see :class:`lossmith.Objective`.

    Returns:
        :class:`lossmith.TokenStats`, each statistic [...] in fp32 (fp64 for fp64 logits).

    Raises:
        TypeError: targets or candidates that are not integers, logits that are not floating point, unknown
            options or values of the wrong type.
        ValueError: shapes that do not match, an empty batch, an id or an option out of range.

    Example:
        >>> import torch, lossmith
        >>> logits = torch.tensor([[2.0, 1.0, 4.0, 0.5]])
        >>> stats = lossmith.token_stats(logits, torch.tensor([2]))
        >>> round(stats.normalized_wrong_entropy.item(), 3), stats.correct.item()
        (0.825, True)
    """
    options = SweepOptions(temperature, softcap, backend=backend)
    return _stats(logits_as_predictions(logits), targets, candidates, options, ignore_index)


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
    skip_ignored: SkipIgnored = None,
    logits_dtype: LogitsDtype = "wide",
    skip_small_gradients: SkipSmallGradients = 0.0,
    backend: BackendName = None,
) -> TokenStats:
    """:func:`lossmith.token_stats` of the logits hidden @ weight.T + bias, which never exist all at once.

    It makes the logits of a chunk of tokens, sweeps and drops them, and makes them again in the backward
    pass: four matrix products in all, exact for any loss of yours. ``stats.compute(...)`` declares what you
    want; a statistic asked for later takes another product.

    Args:
        hidden: [..., D], fp64, fp32, bf16 or fp16.
        weight: [V, D], of the same dtype, or of any under ``torch.autocast``.
        targets: [...] ids, or ``ignore_index``.
        bias: [V].
        candidates, temperature, softcap, ignore_index, backend: see :func:`lossmith.token_stats`.
        memory_budget, skip_ignored, logits_dtype, skip_small_gradients: see
            :func:`lossmith.linear_cross_entropy`.

    Returns:
        :class:`lossmith.TokenStats`, each statistic [...] in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: inputs that do not match; the message says which.

    Example:
        >>> import torch, lossmith
        >>> hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
        >>> stats = lossmith.linear_token_stats(hidden, weight, torch.zeros(8, dtype=torch.long))
        >>> loss = (stats.compute("nll", "target_prob").nll * (1 - stats.target_prob) ** 2).mean()
        >>> loss.backward()
    """
    how = {
        "memory_budget": memory_budget,
        "skip_ignored": skip_ignored,
        "logits_dtype": logits_dtype,
        "skip_small_gradients": skip_small_gradients,
    }
    head = head_as_predictions(hidden, weight, bias, **how)
    options = SweepOptions(temperature, softcap, backend=backend)
    return _stats(head, targets, candidates, options, ignore_index)


def _stats(
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
    logits: Tensor, targets: Tensor, *, return_stats: Literal[True], **options: Unpack[BatchOptions]
) -> tuple[Tensor, TokenStats]: ...
@overload
def cross_entropy(
    logits: Tensor, targets: Tensor, *, return_stats: Literal[False] = False, **options: Unpack[BatchOptions]
) -> Tensor: ...
@strict_options(also=CrossEntropyLoss, name="cross_entropy")
def cross_entropy(  # pyright: ignore[reportInconsistentOverload]  (they take the objective's options alike)
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Mask = None,
    token_weight: TokenWeight = None,
    denominator: Denominator | None = None,
    return_stats: ReturnStats = False,
    **options: Unpack[CrossEntropyOptions],
) -> Tensor | tuple[Tensor, TokenStats]:
    """Cross-entropy with everything people add to it, in one pass over the logits each way.

    ``logits[t]`` predict ``targets[t]``. Pass ``shift=True`` with unshifted labels, as Hugging Face has them;
    without it the model learns to copy its input.

        (1 - p_y)^focal_gamma * smoothed cross-entropy  +  z_loss * logsumexp^2  -  confidence_penalty * H(p)

    The loss is averaged over the supervised tokens. With the defaults it equals
    ``torch.nn.functional.cross_entropy``, except that a batch without a supervised token gives 0. An option
    left at its default leaves the result bit-identical.

    Args:
        logits: [..., V] of any stride, fp64, fp32, bf16 or fp16; the loss is at least fp32.
        targets: [...] ids, or ``ignore_index``.
        reduction: ``mean`` (= ``token_mean``) over supervised tokens, ``sequence_mean`` (the mean over
            samples, [..., T], of each sample's mean), ``sum``, or ``none`` ([...] values).
        denominator: number of supervised tokens (or samples) over all micro-batches and ranks, to divide by
            instead of this batch's own.
        ignore_index: the id that marks a token without a target.
        mask: [...] bool or integers, 0 where a target is ignored.
        label_smoothing: eps in [0, 1), taken from the target and spread over the classes.
        smoothing_mode: ``uniform``: eps/V on every class (PyTorch); ``exclude_target``:
            eps/(V-1) on the wrong ones.
        special_tokens: target ids that are not smoothed, in [0, V).
        class_weight: [V]; a mean divides by the summed weights of the targets. They also multiply a token's
            z-loss and confidence penalty.
        token_weight: [...] multiplies each token's loss; not in the denominator.
        temperature: >= 1e-6, divides the logits; z-loss takes the logits as they are.
        softcap: c >= 1e-6 for z <- c tanh(z / c), before everything else.
        z_loss: coefficient of logsumexp^2.
        focal_gamma: >= 0; weighs tokens by (1 - p_y)^gamma.
        confidence_penalty: coefficient of the negative entropy.
        shift: True: targets are unshifted labels, as Hugging Face has them: logits[t] predict targets[t + 1].
            A number: logits[t] predict targets[t + shift].
        empty: the loss of a batch without a supervised token: ``zero`` (with zero gradients) or ``nan``.
        backend: which arithmetic computes the rows: ``native``, ``triton`` or ``torch``; an error if it
            does not take the logits. None for the first that does.
        return_stats: also return the statistics, in the targets' shape.

    Returns:
        The loss, a scalar or [...] with ``none``; with ``return_stats`` (loss, TokenStats).

    Raises:
        TypeError: targets that are not integers, logits that are not floating point, unknown options or
            values of the wrong type.
        ValueError: shapes that do not match, an empty batch, an id or an option out of range.

    Example:
        >>> import torch, lossmith
        >>> logits = torch.randn(2, 6, 32, requires_grad=True)
        >>> labels = torch.randint(32, (2, 6))
        >>> loss = lossmith.cross_entropy(logits, labels, shift=True, label_smoothing=0.1, z_loss=1e-4)
        >>> loss.backward()
    """
    criterion = CrossEntropyLoss(**options)
    if not return_stats and mask is None and token_weight is None and denominator is None:
        return criterion(logits, targets)
    output = criterion.evaluate(
        logits, targets, mask=mask, token_weight=token_weight, denominator=denominator
    )
    return _with_stats(output) if return_stats else output.total


@explained
@strict_options(also=CrossEntropyLoss, name="linear_cross_entropy")
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Bias = None,
    mask: Mask = None,
    token_weight: TokenWeight = None,
    denominator: Denominator | None = None,
    return_stats: ReturnStats = False,
    strategy: Strategy = "auto",
    memory_budget: MemoryBudget = None,
    skip_ignored: SkipIgnored = None,
    logits_dtype: LogitsDtype = "wide",
    skip_small_gradients: SkipSmallGradients = 0.0,
    **options: Unpack[CrossEntropyOptions],
) -> Tensor | tuple[Tensor, TokenStats]:
    """:func:`lossmith.cross_entropy` of the logits hidden @ weight.T + bias, which never exist all at once.

    It makes the logits chunk by chunk and turns each chunk into its own gradient: three matrix products, as
    many as with all the logits in memory. The loss, and sums over chunks, are fp32 at least.

    Args:
        hidden: [..., D], fp64, fp32, bf16 or fp16, of any stride.
        weight: [V, D], of the same dtype, or of any under ``torch.autocast``.
        targets: [...] ids, or ``ignore_index``.
        bias: [V].
        reduction, denominator, ignore_index, mask, label_smoothing, smoothing_mode, special_tokens,
            class_weight, token_weight, temperature, softcap, z_loss, focal_gamma, confidence_penalty, shift,
            empty, backend, return_stats: see :func:`lossmith.cross_entropy`.
        strategy: ``one_sweep``: as above, if every token's gradient depends on that token alone; otherwise an
            error. ``two_sweep``: make the logits again in the backward pass, four products. ``auto``: one
            sweep where possible; :func:`linear_cross_entropy.explain` says which.
        memory_budget: bytes of logits held at a time; default 52 MiB on a CPU, 512 MiB or more elsewhere.
        skip_ignored: whether tokens without a target are left out of the products; an accelerator makes the
            host wait once. None: on a CPU alone.
        logits_dtype: of a chunk: ``wide`` (fp32, fp64 for fp64), or ``input``, that of the products.
        skip_small_gradients: on a CPU, the share of the logits' gradient, by the sum of its absolute values,
            that is left out of the products where it is small; 0.0 leaves out nothing.

    Returns:
        The loss, a scalar or [...] with ``reduction="none"``; with ``return_stats`` (loss, TokenStats).

    Raises:
        TypeError: targets that are not integers, unknown options, dtypes that do not match.
        ValueError: shapes that do not match, an empty batch, an id or an option out of range, or a strategy
            that is impossible here.

    Example:
        >>> import torch, lossmith
        >>> hidden = torch.randn(2, 6, 16, requires_grad=True)
        >>> weight = torch.randn(100, 16, requires_grad=True)
        >>> labels = torch.randint(100, (2, 6))
        >>> loss = lossmith.linear_cross_entropy(hidden, weight, labels, shift=True, label_smoothing=0.1)
        >>> loss.backward()
    """
    output = CrossEntropyLoss(**options).evaluate(
        targets=targets,
        mask=mask,
        token_weight=token_weight,
        denominator=denominator,
        hidden_states=hidden,
        lm_head_weight=weight,
        lm_head_bias=bias,
        strategy=strategy,
        memory_budget=memory_budget,
        skip_ignored=skip_ignored,
        logits_dtype=logits_dtype,
        skip_small_gradients=skip_small_gradients,
    )
    return _with_stats(output) if return_stats else output.total


def _with_stats(output: LossOutput) -> tuple[Tensor, TokenStats]:
    assert output.stats is not None
    return output.total, output.stats


@strict_options(also=linear_cross_entropy, name="linear_cross_entropy")
def explain(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Plan:
    """What :func:`linear_cross_entropy` will do with these arguments, and at what cost; computes nothing.

    Args:
        hidden, weight, targets, options: those of :func:`linear_cross_entropy`.

    Returns:
        :class:`lossmith.Plan`; printed, it is a sentence.

    Raises:
        TypeError: an unknown option (the message names the nearest), or one of the wrong type.
        ValueError: an option out of range, or a strategy that is impossible here.
    """
    given = {name: options.pop(name) for name in ("mask", *HEAD_OPTIONS) if name in options}
    given["lm_head_bias"] = options.pop("bias", None)
    for name in ("token_weight", "denominator", "return_stats"):
        options.pop(name, None)
    criterion = CrossEntropyLoss(**options)
    return criterion.plan(hidden_states=hidden, lm_head_weight=weight, targets=targets, **given)


linear_cross_entropy.explain = explain  # pyright: ignore[reportAttributeAccessIssue]


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
        TypeError: scores that are not tensors, or an option of the wrong type.
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
    scale, _ = token_scale(valid, reduction, denominator=denominator, dtype=values.dtype)
    shares = scaled(values, scale)
    return shares if reduction == "none" else shares.sum()
