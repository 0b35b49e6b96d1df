"""One sweep: each chunk's logits become their own gradient at once, so that they are made a single time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.checks import refuse_batched
from lossmith.engine.differentiable_once import once
from lossmith.engine.head.chunks import Chunks, HeadGradient
from lossmith.engine.head.factors import Factors
from lossmith.engine.head.two_sweeps import Needed, stats_of_head
from lossmith.engine.head.upstream import times
from lossmith.engine.predictions import LossOf
from lossmith.engine.rows.backends import gradient_of_rows, stats_of_rows
from lossmith.engine.statistics.raw_stats import ByView, RawStats
from lossmith.engine.statistics.stats import TokenStats
from lossmith.engine.sweep import Rows, Sweep


class OtherGradient(Exception):
    """The loss of some tokens has a gradient in something else than their statistics, which one sweep would
    lose."""


@dataclass
class SweptOnce:
    """What one sweep leaves: the gradient of one loss, and the statistics.

    Attributes:
        known: the raw statistics, with gradients (by a second sweep, if they are needed).
        of_parts: the same statistics in a graph of their own, which ``part`` may go through again and again.
        shares: [K, N] what each token adds to each term; 0 for those that were not swept.
        sweep: what they are statistics of.
        gradients: of hidden states, weight and bias, times ``lift`` if there is one.
    """

    known: ByView
    of_parts: ByView
    shares: Tensor
    sweep: Sweep
    factors: Factors
    gradients: list[Tensor | None]
    lift: Tensor | None

    def loss(self, sums: Tensor) -> Tensor:
        """The loss, whose gradient is known, from the sums of its terms [K]."""
        return _KnownGradient.apply(sums.sum(), self.gradients, self.lift, *self.factors.tensors)

    def part(self, value: Tensor, again: Callable[[TokenStats], Tensor]) -> Tensor:
        """``value``, a part of the loss that ``again`` computes from the statistics; its own gradient takes a
        second sweep, if it is ever needed."""
        stats = self.stats(self.of_parts)
        return _LazyGradient.apply(value.detach(), lambda: again(stats), *self.factors.tensors)

    def stats(self, views: ByView) -> TokenStats:
        """Statistics by name, of raw ones that are known."""
        return TokenStats(RawStats(self.sweep, lambda *_: views))


def lift_for(scale: Tensor) -> Tensor:
    """The power of two that gradients in fp16 are multiplied by until the upstream gradient is known: a token
    whose share is the largest has one near 16. At shares of 1 / N most of the gradient would be 0."""
    largest = scale.detach().abs().amax().clamp(min=2.0**-100)
    return torch.exp2(4 - largest.log2().ceil())


def sweep_once(
    factors: Factors, sweep: Sweep, loss_of: LossOf, needed: Needed, scale: Tensor
) -> SweptOnce | None:
    """Sweep a head's logits once, for the statistics and for the gradient of ``loss_of``; None where there
    are no tokens to do it for.

    Args:
        factors, sweep: what the logits are made of, and which statistics to compute.
        loss_of: the loss of some tokens.
        needed: which gradients are.
        scale: [N] the tokens' shares of the loss.

    Raises:
        OtherGradient: the loss has gradients that would be lost.
    """
    with torch.no_grad():
        chunks = Chunks(factors, sweep.targets, sweep.ignore_index)
        if not chunks.num_rows:
            return None
        result = HeadGradient(chunks, needed)
        lift = lift_for(scale) if factors.is_lifted else None
        outputs, shares = sweep.blank(factors.wide, factors.hidden.device), None
        for rows in chunks.all():
            x, some = chunks.inputs(rows), sweep.of(rows)
            z = chunks.logits(x)
            raw = stats_of_rows(z, some)
            for out, value in zip(outputs, raw, strict=True):
                out[rows] = value
            grads, own_shares = _gradients(some, rows, raw, loss_of, lift)
            if shares is None:
                shares = own_shares.new_zeros(len(own_shares), len(sweep.targets))
            shares[:, rows] = own_shares
            if any(g is not None for g in grads):
                result.add(rows, x, gradient_of_rows(z, some, raw, grads, in_place=True))
            else:
                result.add_nothing(rows)
            del x, z  # their memory, before the next chunk's hidden states or the gradients take more
        gradients = list(result.finish(is_rounded=lift is None))

    def known() -> ByView:
        return sweep.by_view(stats_of_head(factors, sweep, [out.detach() for out in outputs]))

    assert shares is not None
    return SweptOnce(known(), known(), shares, sweep, factors, gradients, lift)


def _gradients(
    sweep: Sweep, rows: Rows, raw: list[Tensor], loss_of: LossOf, lift: Tensor | None
) -> tuple[list[Tensor | None], Tensor]:
    """The gradients of a chunk's statistics, times the lift, by autograd on [n] tensors; the shares of its
    terms."""
    leaves = [value.requires_grad_() if value.is_floating_point() else value for value in raw]
    views = sweep.by_view(leaves)
    with torch.enable_grad():
        loss, shares = loss_of(TokenStats(RawStats(sweep, lambda *_: views)), rows)
    if not loss.requires_grad:
        return [None] * len(raw), shares
    ours = [value for value in leaves if value.requires_grad]
    if _depends_on_more(loss, ours):
        raise OtherGradient
    upstream = None if lift is None else lift.to(loss.dtype)
    found = iter(torch.autograd.grad(loss, ours, upstream, allow_unused=True))
    grads = [next(found) if value.requires_grad else None for value in leaves]
    for value in ours:
        value.requires_grad_(False)
    return grads, shares


def _depends_on_more(loss: Tensor, leaves: list[Tensor]) -> bool:
    """Whether the loss has a gradient in a leaf other than these."""
    ours = {id(leaf) for leaf in leaves}
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) not in ours:
            return True
        waiting.extend(parent for parent, _ in node.next_functions)
    return False


class _KnownGradient(torch.autograd.Function):
    """A number with known gradients, to be multiplied by the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: list[Tensor | None], lift: Tensor | None, *inputs: Tensor | None
    ) -> Tensor:
        ctx.gradients, ctx.lift = gradients, lift
        ctx.dtypes = [None if given is None else given.dtype for given in inputs]
        ctx.inputs_with_gradient = [given for given in inputs if given is not None]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_batched(upstream)
        gradients: list[Tensor | None] = ctx.gradients
        if not gradients:
            raise RuntimeError(
                "the gradient of this loss was given away by the backward before; pass retain_graph=True to "
                "the first of several"
            )
        stays = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore
        scaled: list[Tensor | None] = []
        # Nothing is multiplied where it would not change, if looking does not wait for a device.
        is_one = ctx.lift is None and upstream.device.type == "cpu" and upstream.item() == 1
        factor = upstream if ctx.lift is None else upstream / ctx.lift
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
            if gradient is None or (is_one and not stays):
                scaled.append(gradient)
            else:
                is_free = not stays and gradient.dtype == dtype
                into = gradient if is_free else torch.empty_like(gradient, dtype=dtype)
                scaled.append(times(gradient, factor, into=into))
        if not stays:
            gradients.clear()
        return (None, None, None, *once(scaled, (upstream, *ctx.inputs_with_gradient)))


class _LazyGradient(torch.autograd.Function):
    """A number whose gradients are computed only if they are needed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, again: Callable[[], Tensor], *inputs: Tensor | None) -> Tensor:
        ctx.again, ctx.inputs = again, inputs
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_batched(upstream)
        with torch.enable_grad():
            value = ctx.again()
        wanted = [given for given in ctx.inputs if given is not None and given.requires_grad]
        found = iter(torch.autograd.grad(value, wanted, upstream, retain_graph=True, allow_unused=True))
        grads = [next(found) if given is not None and given.requires_grad else None for given in ctx.inputs]
        return (None, None, *once(grads, (upstream, *wanted)))
