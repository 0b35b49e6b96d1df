"""Logits to raw statistics and back: one pass over memory each way.

Two custom operators, so that autograd, autocast and ``torch.compile(fullgraph=True)``
see one opaque step: ``lossmith::row_stats`` and its backward ``lossmith::row_grad``. The
arithmetic is ``native_rows``'s where that takes the rows, and ``torch_rows``'s elsewhere.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.checks import check_ids, refuse_batched
from lossmith.engine.rows.backends import fill_stats, gradient as gradient_of_rows
from lossmith.engine.rows.blocks import accumulation_dtype
from lossmith.engine.statistics.raw import Needs, View, ignored_fill, raw_dtype, raw_names
from lossmith.engine.statistics.raw_stats import RawStats
from lossmith.engine.statistics.stats import TokenStats

# What the backward reads; the rest it can do without.
SAVED = ("reference", "wrong_log_sum", "wrong_entropy", "top_wrong_id", "rest_log_sum")


def logits_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    candidates: Tensor | None = None,
    class_weight: Tensor | None = None,
    temperature: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    default_needs: Needs = Needs.CORE,
) -> TokenStats:
    """Lazy statistics of ``logits`` [..., V] at ``targets`` [...], with ``candidates`` [..., K].

    Rows whose target is ``ignore_index`` are not read: their statistics are those of a
    token that the model gets right with certainty (all 0, ``wrong_log_sum`` -inf), and
    their gradient is exactly 0.
    """

    read = Unchanged(
        logits=logits,
        targets=targets,
        candidates=candidates,
        class_weight=class_weight,
        temperature=temperature,
    )

    def fetch(needs: Needs, needs_unscaled: Needs | None) -> tuple[dict, dict | None]:
        read.check()
        groups = (int(needs), -1 if needs_unscaled is None else int(needs_unscaled))
        flat = row_stats_op(
            logits, targets, candidates, class_weight, temperature, softcap, ignore_index, *groups
        )  # fmt: skip
        scaled, unscaled = by_view(flat, *groups)
        return scaled, None if needs_unscaled is None else unscaled

    raw = RawStats(
        targets,
        fetch,
        ignore_index=ignore_index,
        candidates=candidates,
        has_temperature=temperature is not None,
        dtype=accumulation_dtype(logits.dtype),
        default_needs=default_needs,
    )
    return TokenStats(raw)


class Unchanged:
    """The tensors that statistics are computed from, some of these perhaps much later.

    Args:
        read: the tensors by name, None where there is none.
    """

    def __init__(self, **read: Tensor | None) -> None:
        self._read = {name: tensor for name, tensor in read.items() if tensor is not None}
        self._versions = {name: _version(tensor) for name, tensor in self._read.items()}

    def check(self) -> None:
        """
        Raises:
            RuntimeError: one of them has changed.
        """
        for name, tensor in self._read.items():
            if _version(tensor) != self._versions[name]:
                raise RuntimeError(
                    f"{name}: modified in place (by an optimizer step, perhaps) after these statistics were "
                    "first asked for, so that further ones would be of something else; announce what you "
                    "need with stats.compute(...) before"
                )


def _version(tensor: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def by_view(values: Sequence[Any], needs: int, needs_unscaled: int) -> tuple[dict, dict]:
    """Values listed in the operators' order, as {name: value} for each view that is asked for."""
    names = raw_names(needs)
    unscaled_names = raw_names(needs_unscaled) if needs_unscaled >= 0 else ()
    scaled = dict(zip(names, values[: len(names)], strict=True))
    return scaled, dict(zip(unscaled_names, values[len(names) :], strict=True))


@torch.library.custom_op("lossmith::row_stats", mutates_args=())
def row_stats_op(
    logits: Tensor,
    targets: Tensor,
    candidates: Tensor | None,
    class_weight: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    needs: int,
    needs_unscaled: int,
) -> typing.List[Tensor]:  # noqa: UP006, the one that PyTorch 2.6 reads in an operator's signature
    check_all_ids(targets.reshape(logits.shape[:-1]), candidates, logits.shape[-1], ignore_index)
    outputs = allocate(logits, targets, candidates, needs, needs_unscaled)
    views = make_views(temperature, needs, needs_unscaled, outputs)
    ids = flat_ids(candidates)
    fill_stats(logits, targets.reshape(-1), ids, class_weight, softcap, ignore_index, views)
    return outputs


@torch.library.custom_op("lossmith::row_grad", mutates_args=())
def row_grad_op(
    logits: Tensor,
    targets: Tensor,
    candidates: Tensor | None,
    class_weight: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    needs: int,
    needs_unscaled: int,
    raw: typing.Sequence[Tensor | None],
    grads: typing.Sequence[Tensor | None],
) -> Tensor:
    """Gradient of the logits from those of the raw statistics, listed as ``row_stats`` returns them."""
    views = make_views(temperature, needs, needs_unscaled, raw, grads)
    ids = flat_ids(candidates)
    result = gradient_of_rows(logits, targets.reshape(-1), ids, class_weight, softcap, ignore_index, views)
    return result.view(logits.shape)


def flat_ids(candidates: Tensor | None) -> Tensor | None:
    """Candidates [..., K] as [N, K]."""
    return (
        None
        if candidates is None
        else candidates.reshape(candidates.shape[:-1].numel(), candidates.shape[-1])
    )


def check_all_ids(targets: Tensor, candidates: Tensor | None, num_classes: int, ignore_index: int) -> None:
    """Targets and candidates are int64, a row of candidates for every target, and classes, or the ids that
    stand for none.

    Raises:
        TypeError: ids of another dtype, which only a caller of the operators can have.
        ValueError: an id out of range, or candidates of other tokens.
    """
    for name, ids in (("targets", targets), ("candidates", candidates)):
        if ids is not None and ids.dtype != torch.int64:
            raise TypeError(f"the operators take {name} as torch.int64; got {ids.dtype}")
    if candidates is not None and candidates.shape[:-1].numel() != targets.numel():
        raise ValueError(f"candidates {list(candidates.shape)} are not of targets {list(targets.shape)}")
    check_ids("targets", targets, num_classes, exempt=ignore_index, exempt_name="ignore_index")
    if candidates is not None:
        check_ids("candidates", candidates, num_classes, exempt=-1, exempt_name="-1")


def make_views(
    temperature: Tensor | None,
    needs: int,
    needs_unscaled: int,
    raw: Sequence[Tensor | None],
    grads: Sequence[Tensor | None] | None = None,
) -> list[View]:
    """The views that raw statistics, listed in the operators' order, belong to; given their gradients, those
    views alone that have any."""
    known = by_view(raw, needs, needs_unscaled)
    upstream = by_view([None] * len(raw) if grads is None else grads, needs, needs_unscaled)
    groups = (Needs(needs), Needs(max(needs_unscaled, 0)))
    views = [
        View(divisor, group, _present(values), _present(given))
        for divisor, group, values, given in zip((temperature, None), groups, known, upstream, strict=True)
    ]
    if needs_unscaled < 0:
        views.pop()
    return views if grads is None else [view for view in views if view.grads]


def _present(values: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if value is not None}


def _save_for_backward(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    *tensors, softcap, ignore_index, needs, needs_unscaled = inputs
    ctx.options = (softcap, ignore_index, needs, needs_unscaled)
    ctx.is_saved = [
        name in SAVED for view in by_view(output, needs, needs_unscaled) for name in view
    ]  # fmt: skip
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *(out for out, saved in zip(output, ctx.is_saved, strict=True) if saved))


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    refuse_batched(*grads)
    logits, targets, candidates, class_weight, temperature, *saved = ctx.saved_tensors
    gradient = None
    if ctx.needs_input_grad[0] and any(g is not None for g in grads):
        rest = iter(saved)
        raw = [next(rest) if is_saved else None for is_saved in ctx.is_saved]
        gradient = row_grad_op(
            logits, targets, candidates, class_weight, temperature, *ctx.options, raw, grads
        )  # fmt: skip
        if torch.is_grad_enabled():  # create_graph: whoever differentiates through this is told
            gradient = DifferentiableOnce.apply(gradient.detach(), logits, *grads)
    return gradient, None, None, None, None, None, None, None, None


class DifferentiableOnce(torch.autograd.Function):
    """The identity on a gradient, connected to all that it depends on, whose own gradient is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_depends_on: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(
            "lossmith's losses can be differentiated once, not twice: the gradient of their gradient is not "
            "implemented. Use torch.nn.functional.cross_entropy where a second derivative is needed"
        )


row_stats_op.register_autograd(_backward, setup_context=_save_for_backward)


@row_stats_op.register_fake
def _(logits, targets, candidates, class_weight, temperature, softcap, ignore_index, needs, needs_unscaled):
    return allocate(logits, targets, candidates, needs, needs_unscaled)


@row_grad_op.register_fake
def _(logits, *_unused):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def allocate(
    logits: Tensor, targets: Tensor, candidates: Tensor | None, needs: int, needs_unscaled: int
) -> list[Tensor]:
    """Raw statistics [N] of ignored rows, to be filled in; ``logits`` tell the dtype and the device."""
    outputs = []
    for group in (needs, needs_unscaled):
        for name in raw_names(group) if group >= 0 else ():
            shape = [targets.numel()]
            if name == "candidate_logits":
                assert candidates is not None
                shape.append(candidates.shape[-1])
            dtype = raw_dtype(name, accumulation_dtype(logits.dtype))
            outputs.append(torch.full(shape, ignored_fill(name), dtype=dtype, device=logits.device))
    return outputs
