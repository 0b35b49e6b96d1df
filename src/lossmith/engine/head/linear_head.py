"""``LinearHead``: hidden states and an unembedding in place of logits, which are never there all at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lossmith.engine.checks import check_head, check_targets_of_hidden
from lossmith.engine.head.chunks import Chunks, pack
from lossmith.engine.head.one_sweep import LossOf, SweptOnce, sweep_once
from lossmith.engine.head.plan import Plan, Strategy, check_strategy, rows_of_a_chunk
from lossmith.engine.head.two_sweeps import HeadStats, HeadSweep, head_stats_op
from lossmith.engine.predictions import Predictions
from lossmith.engine.rows.blocks import accumulation_dtype
from lossmith.engine.sampling import draw, uniform_numbers
from lossmith.engine.statistics.raw import Needs
from lossmith.engine.statistics.raw_stats import AskedFor, RawStats
from lossmith.engine.statistics.stats import TokenStats
from lossmith.engine.sweep import Unchanged, by_view, check_all_ids, flat_ids
from lossmith.options import kind_of
from lossmith.options.shared import Softcap

_SOFTCAP = kind_of(Softcap, "the model's softcap")


@dataclass(frozen=True)
class LinearHead(Predictions):
    """Logits that would be hidden @ weight.T + bias.

    Args:
        hidden: [..., D].
        weight: [V, D].
        bias: [V], or None.
        strategy: ``one_sweep``: a chunk's logits become their own gradient at once, three products in all;
            only where a token's weight depends on that token alone. ``two_sweep``: they are made for the
            statistics and again for the gradient, four products. ``auto``: one where that is possible.
        memory_budget: bytes of logits held at a time; None for the device's default.
        softcap: c for c tanh(z / c), or None; a part of the model, before whatever an objective does.

    Raises:
        TypeError, ValueError: they do not belong together; the message says which.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    strategy: Strategy = "auto"
    memory_budget: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        check_strategy(self.strategy, self.memory_budget)
        check_head(self.hidden, self.weight, self.bias, is_autocast=lambda: self._autocast_dtype is not None)
        _SOFTCAP.check(self.softcap)

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.compute_dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """That of the products: the hidden states', or autocast's."""
        return self._autocast_dtype or self.hidden.dtype

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        kind = self.hidden.device.type
        if self.hidden.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
            return None
        return torch.get_autocast_dtype(kind)

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

    def _capped_once(self, softcap: float | None) -> float | None:
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
        softcap = self._capped_once(softcap)
        flat = self.hidden.reshape(-1, self.hidden.shape[-1])
        chunks = self._chunks(torch.zeros(len(flat), dtype=torch.long, device=self.device))
        uniform = uniform_numbers(len(flat), self.dtype, self.device)
        drawn = [draw(chunks.logits(chunks.inputs(rows)), uniform[rows], softcap) for rows in chunks.all()]
        return torch.cat(drawn).reshape(self.hidden.shape[:-1])

    def _chunks(self, targets: Tensor) -> Chunks:
        return Chunks(
            self.hidden.reshape(-1, self.hidden.shape[-1]),
            self.weight,
            self.bias,
            targets,
            ignore_index=-100,
            compute_dtype=self.compute_dtype,
            memory_budget=self.memory_budget,
        )

    def stats(
        self,
        targets: Tensor,
        *,
        candidates: Tensor | None,
        class_weight: Tensor | None,
        temperature: Tensor | None,
        softcap: float | None,
        ignore_index: int,
        default_needs: Needs,
    ) -> TokenStats:
        softcap = self._capped_once(softcap)
        read = Unchanged(
            hidden=self.hidden,
            weight=self.weight,
            bias=self.bias,
            targets=targets,
            candidates=candidates,
            class_weight=class_weight,
            temperature=temperature,
        )
        compute_dtype = self.compute_dtype  # autocast's is that of now, not of when a statistic is read

        def asked(needs: Needs, needs_unscaled: Needs | None) -> HeadSweep:
            read.check()
            return HeadSweep(
                targets.reshape(-1),
                flat_ids(candidates),
                class_weight,
                temperature,
                softcap,
                ignore_index,
                int(needs),
                -1 if needs_unscaled is None else int(needs_unscaled),
                compute_dtype,
                self.memory_budget,
            )

        def fetch(needs: Needs, needs_unscaled: Needs | None) -> tuple[dict, dict | None]:
            sweep = asked(needs, needs_unscaled)
            if torch.compiler.is_compiling():
                values = head_stats_op(self.hidden, self.weight, self.bias, *sweep.options)
            else:
                check_all_ids(targets, candidates, self.num_classes, ignore_index)
                values = HeadStats.apply(sweep, None, self.hidden, self.weight, self.bias)
            scaled, unscaled = by_view(values, sweep.needs, sweep.needs_unscaled)
            return scaled, None if needs_unscaled is None else unscaled

        def make(targets: Tensor, candidates: Tensor | None, fetch: Callable[..., Any]) -> RawStats:
            return RawStats(
                targets,
                fetch,
                ignore_index=ignore_index,
                candidates=candidates,
                has_temperature=temperature is not None,
                dtype=accumulation_dtype(compute_dtype),
                default_needs=default_needs,
            )

        def once(needs: AskedFor, loss_of: LossOf, unless: str | None) -> SweptOnce | None:
            if self._why_not_once(unless) is not None:
                return None
            check_all_ids(targets, candidates, self.num_classes, ignore_index)
            sweep = asked(needs[0] or Needs.CORE, needs[1])
            return sweep_once(sweep, self.hidden, self.weight, self.bias, loss_of, self.needed, make)

        raw = make(targets, candidates, fetch)
        raw.once = once
        return TokenStats(raw)

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
            problem = "torch.compile needs a graph that does not depend on the objective's own autograd"
        dtypes = (self.compute_dtype, self.hidden.dtype, self.weight.dtype)
        if problem is None and torch.float16 in dtypes:
            problem = "in float16 a gradient that was made before the loss was scaled would underflow"
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
        check_all_ids(targets, None, self.num_classes, ignore_index)
        reason = self._why_not_once(unless)
        packed = pack(targets.reshape(-1), ignore_index)
        num_tokens = targets.numel() if packed is None else packed.numel()
        itemsize = self.dtype.itemsize
        rows = rows_of_a_chunk(num_tokens, self.num_classes, itemsize, self.device, self.memory_budget)
        num_chunks = -(-num_tokens // rows)
        wanted = sum(self.needed[:2])
        products = 1.0 + wanted
        if reason is not None and any(self.needed):
            products += 1 - (num_tokens - rows * (num_chunks - 1)) / max(num_tokens, 1)
        is_wider = self.needed[1] and self.weight.dtype != self.dtype
        return Plan(
            "one_sweep" if reason is None else "two_sweep",
            "every token's weight depends on that token alone" if reason is None else reason,
            num_tokens=num_tokens,
            hidden_size=self.weight.shape[1],
            num_classes=self.num_classes,
            chunk_rows=rows,
            num_chunks=num_chunks,
            num_products=products,
            logits_bytes=rows * self.num_classes * itemsize,
            accumulator_bytes=self.weight.numel() * self.dtype.itemsize if is_wider else 0,
        )
