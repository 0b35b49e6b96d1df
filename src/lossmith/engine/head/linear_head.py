"""``LinearHead``: hidden states and an unembedding in place of logits, which are never there all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lossmith.engine.checks import check_head, check_targets_of_hidden
from lossmith.engine.head.chunks import Chunks
from lossmith.engine.head.factors import Factors
from lossmith.engine.head.graph_sweep import SweptInGraph, sweep_in_graph, why_not_in_a_graph
from lossmith.engine.head.one_sweep import SweptOnce, sweep_once
from lossmith.engine.head.packing import Packing
from lossmith.engine.head.plan import HeadOptions, Plan
from lossmith.engine.head.sizes import Sizes
from lossmith.engine.head.two_sweeps import head_stats_op, stats_of_head
from lossmith.engine.predictions import LossOf, Predictions
from lossmith.engine.rows import triton_rows
from lossmith.engine.rows.backends import looks_at_ids
from lossmith.engine.sampling import draw, random_numbers
from lossmith.engine.sweep import Sweep
from lossmith.options import kind_of
from lossmith.options.shared import Softcap

_SOFTCAP = kind_of(Softcap, "the model's softcap")


@dataclass(frozen=True)
class LinearHead(HeadOptions, Predictions):
    """Logits that would be hidden @ weight.T + bias.

    Args:
        hidden: [..., D].
        weight: [V, D].
        bias: [V], or None.
        strategy: ``one_sweep``: a chunk's logits become their own gradient at once, three products in all;
            only where a token's weight depends on that token alone. ``two_sweep``: they are made for the
            statistics and again for the gradient, four products. ``auto``: one where that is possible.
        memory_budget: bytes of logits held at a time; None for the device's default.
        skip_ignored: whether tokens without a target are left out of the products; None for a CPU alone.
        logits_dtype: ``wide``: a chunk's logits are fp32 at least. ``input``: they have the dtype of the
            products.
        skip_small_gradients: the share of the gradient of the logits that may be left out of the products.
        softcap: c for c tanh(z / c), or None; a part of the model, before whatever an objective does.

    Attributes:
        compute_dtype: that of the products: autocast's, where it is on, or the hidden states'.

    Raises:
        TypeError, ValueError: they do not belong together; the message says which.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    compute_dtype: torch.dtype = field(init=False)

    is_costly = True

    def __post_init__(self) -> None:
        HeadOptions.__post_init__(self)
        check_head(
            self.hidden, self.weight, self.bias, is_autocast=lambda: _autocast_dtype(self.hidden) is not None
        )
        _SOFTCAP.check(self.softcap)
        if self.skip_small_gradients and self.device.type != "cpu":
            raise ValueError(
                "skip_small_gradients works on a CPU alone: on another device the host would wait in every "
                f"chunk to know what to leave out; got a head on {self.device.type}, so leave it at 0.0"
            )
        # of now, not of when a statistic is read
        object.__setattr__(self, "compute_dtype", _autocast_dtype(self.hidden) or self.hidden.dtype)

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self.factors.wide

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        return {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}

    @property
    def factors(self) -> Factors:
        """What its logits are the product of."""
        return Factors(
            *(self.hidden, self.weight, self.bias),
            self.compute_dtype,
            self.memory_budget,
            self.skip_ignored,
            narrow_logits=self.logits_dtype == "input",
            sums_weight=self.needed[1],
            skip_small_gradients=self.skip_small_gradients,
        )

    @property
    def needed(self) -> tuple[bool, bool, bool]:
        """Which of hidden states, weight and bias have a gradient."""
        enabled = torch.is_grad_enabled()
        bias = self.bias is not None and self.bias.requires_grad
        return enabled and self.hidden.requires_grad, enabled and self.weight.requires_grad, enabled and bias

    def check(self, targets: Tensor) -> None:
        check_targets_of_hidden(self.hidden, targets)

    def logits(self) -> Tensor:
        self._refuse("the logits are asked for as a whole")
        logits = F.linear(self.hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def capped(self, softcap: float | None) -> float | None:
        """
        Raises:
            ValueError: both the model and the objective cap the logits.
        """
        if self.softcap is not None and softcap is not None:
            raise ValueError(
                f"the model caps its logits at {self.softcap} and the objective at {softcap}; leave the "
                "objective's softcap out, or pass it logits"
            )
        return self.softcap if softcap is None else softcap

    @torch.no_grad()
    def sample(self, softcap: float | None) -> Tensor:
        softcap, shape = self.capped(softcap), self.hidden.shape[:-1]
        targets = torch.zeros(shape.numel(), dtype=torch.long, device=self.device)
        chunks = Chunks(replace(self, skip_ignored=None, logits_dtype="wide").factors, targets, -100)
        numbers = random_numbers(shape.numel(), self.dtype, self.device)
        drawn = [draw(chunks.logits(chunks.inputs(rows)), numbers[rows], softcap) for rows in chunks.all()]
        return torch.cat(drawn).reshape(shape)

    def fetch(self, sweep: Sweep) -> Sequence[Tensor]:
        factors = self.factors
        if torch.compiler.is_compiling():
            *arguments, backend = sweep.arguments
            return head_stats_op(
                *factors.tensors,
                *arguments,
                factors.compute_dtype,
                factors.memory_budget,
                backend=backend,
                skip_ignored=factors.skip_ignored,
                narrow_logits=factors.narrow_logits,
                skip_small_gradients=factors.skip_small_gradients,
            )
        self._check_ids(sweep)
        return stats_of_head(factors, sweep)

    def sweep_once(
        self, sweep: Sweep, loss_of: LossOf, unless: str | None, scale: Tensor
    ) -> SweptOnce | SweptInGraph | None:
        if self._why_not_once(unless) is not None:
            return None
        if torch.compiler.is_compiling():
            return sweep_in_graph(self.factors, sweep, loss_of, self.needed, scale)
        self._check_ids(sweep)
        return sweep_once(self.factors, sweep, loss_of, self.needed, scale)

    def _check_ids(self, sweep: Sweep) -> None:
        on_gpu = self.device.type == "cuda" and sweep.backend in (None, "triton")
        by_kernels = on_gpu and looks_at_ids(triton_rows, self.device, sweep)
        by_kernels = by_kernels and triton_rows.runs_on(self.device, self.dtype)
        sweep.check_ids(self.num_classes, self.hidden.shape[:-1], by_kernels=by_kernels)

    # ── the choice ────────────────────────────────────────────────────────────────────────────────

    def _why_not_once(self, unless: str | None) -> str | None:
        """Why two sweeps it is, or None.

        Raises:
            ValueError: one was asked for, and cannot be.
        """
        if not any(self.needed):
            return "no gradient is asked for"
        if self.strategy == "two_sweep":
            return "it was asked for"
        problem = unless
        if problem is None and torch.compiler.is_compiling():
            problem = why_not_in_a_graph(self.factors, self.hidden.shape[:-1].numel())
        if problem is not None:
            self._refuse(problem)
        return problem

    def _refuse(self, problem: str) -> None:
        if self.strategy == "one_sweep":
            raise ValueError(
                f"strategy='one_sweep' is not possible: {problem}. Pass strategy='two_sweep', or 'auto'"
            )

    def plan(self, targets: Tensor, ignore_index: int, unless: str | None) -> Plan:
        """What sweeping the head at ``targets`` [...] will be.

        Args:
            unless: what forbids one sweep, in words, if anything does.
        """
        Sweep(targets, ignore_index=ignore_index).check_ids(self.num_classes, self.hidden.shape[:-1])
        reason = self._why_not_once(unless)
        packing = Packing.of(targets.reshape(-1), ignore_index, self.skip_ignored)
        num_tokens = targets.numel() if packing.positions is None else packing.positions.numel()
        sizes = Sizes.of(self.factors, num_tokens, packing)
        products = 1.0 + sum(self.needed[:2])
        if reason is not None and any(self.needed):
            products += 1 - (num_tokens - sizes.rows * (sizes.num_chunks - 1)) / max(num_tokens, 1)
        return Plan.of(
            sizes,
            self.weight,
            strategy="one_sweep" if reason is None else "two_sweep",
            reason="every token's weight depends on that token alone" if reason is None else reason,
            num_products=products,
            skip_small_gradients=self.skip_small_gradients if any(self.needed[:2]) else 0.0,
        )


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
