"""MoE routers: ``MoEBalance`` evens out the use of experts, ``RouterZLoss`` keeps router logits small."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from lossmith.components.component import Component
from lossmith.components.masks import masked, mean_of_kept, token_mask
from lossmith.components.routers import (
    are_numbers,
    check_gate,
    checked_indices,
    count_experts,
    router_layers,
    shares_of,
)
from lossmith.core.distributed import StatsScope, sum_over_ranks
from lossmith.core.metrics import Source
from lossmith.core.stepping import Stepped
from lossmith.engine.rows.blocks import accumulation_dtype
from lossmith.equation.output import LossOutput
from lossmith.options import option, strict_options
from lossmith.options.shared import BalanceMode, ExpertsPerToken, ExpertUsage, NumExperts, NumRouters

Scoring = Annotated[Literal["softmax", "sigmoid"], option("what of the gate logits the scores are")]


class MoEBalance(Component, Stepped):
    """Evens out how much the experts of a mixture are used: by a loss, or by a bias and no loss.

        L   = sum_e f_e P_e / pi_e                                       mode "loss", a mean over layers
        b_e <- b_e + u sign(pi_e sum_i count_i - count_e)                mode "bias", once per optimizer step

    count_e is the number of tokens that chose expert e, f_e = count_e / sum_i count_i (a constant to
    backpropagation), P_e the mean over tokens of the probability p_e, and pi the target usage. L is 1 at
    balance for any number k of experts per token.

    In mode ``bias`` there is no loss and no gradient: ``expert_bias`` shifts the choice that :meth:`select`
    makes for the model. Counts are collected while gradients are enabled, over all micro-batches and ranks.

    Inputs:
        gate_logits: [B, T, E] or [N, E] the router's logits, or a list of them, one per layer.
        expert_indices: [..., k] each token's experts, or a list; default: the ``top_k`` of the scores.
        attention_mask: [B, T], 0 at padding, which is not counted, and 1 elsewhere; default: the objective's
            mask, or all tokens.

    Args:
        num_experts: E.
        target_expert_usage: pi: one share for all, or E shares that sum to 1; default 1/E.
        mode: ``loss`` or ``bias``.
        top_k: experts per token where ``expert_indices`` are not given; default 1.
        bias_update_rate: u.
        stats_scope: whether f counts this rank's tokens or all ranks'. The bias always counts all ranks'.
        scoring: scores are ``softmax`` or ``sigmoid`` of the gate logits; p are the scores over their sum.
        num_layers: how many routers there are, each with its own bias; default: one.

    Attributes:
        expert_bias: [E], or [num_layers, E] if ``num_layers`` is given; None in mode ``loss``. Stays fp32.
        expert_counts: [E], or [L, E] for several layers: how often each expert was chosen in the last batch,
            in evaluation too; on this rank, or on all with stats_scope ``global`` in mode ``loss``. None
            before the first batch.
        expert_usage: the counts as shares, which sum to 1.

    Metrics:
        max_violation: max_e f_e / pi_e - 1 of the last batch, 0 at balance; the worst of several layers.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: a number out of range, an unknown mode, a usage that does not sum to 1.

    Example:
        >>> import torch, lossmith
        >>> balance = lossmith.MoEBalance(num_experts=4, top_k=2)
        >>> criterion = lossmith.ComposedLoss(
        ...     lossmith.CrossEntropyLoss(), components={"balance": lossmith.Weighted(balance, 0.1)}
        ... )
        >>> logits, targets = torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.long)
        >>> parts = criterion(logits, targets, gate_logits=torch.zeros(2, 3, 4), return_detailed=True)
        >>> round(parts["balance"].item(), 4)
        0.1

    Source: Fedus et al., Switch Transformers, 2021 (loss); Wang et al., Auxiliary-Loss-Free Load Balancing
    Strategy for Mixture-of-Experts, 2024 (bias).
    """

    required = ("gate_logits",)
    optional = ("expert_indices", "attention_mask")
    per_token = ("gate_logits", "expert_indices")

    expert_bias: Tensor | None
    target_usage: Tensor | None

    @strict_options
    def __init__(
        self,
        num_experts: NumExperts,
        *,
        target_expert_usage: ExpertUsage = None,
        mode: BalanceMode = "loss",
        top_k: ExpertsPerToken = None,
        bias_update_rate: Annotated[float, option("how far the bias moves in a step", low=0)] = 0.001,
        stats_scope: StatsScope = "local",
        scoring: Scoring = "softmax",
        num_layers: NumRouters = None,
    ) -> None:
        super().__init__()
        top_k = 1 if top_k is None else top_k
        _check_count("top_k", top_k, most=num_experts)
        usage = _checked_usage(target_expert_usage, num_experts)
        self.num_experts = num_experts
        self.mode: BalanceMode = mode
        self.top_k = top_k
        self.bias_update_rate = bias_update_rate
        self.stats_scope: StatsScope = stats_scope
        self.scoring: Scoring = scoring
        self.num_layers = num_layers
        shape = (num_experts,) if num_layers is None else (num_layers, num_experts)
        self.register_buffer("expert_bias", torch.zeros(shape) if mode == "bias" else None)
        # Not buffers: DDP would overwrite them with the first rank's.
        self._counts: Tensor | None = None  # since the last step
        self.expert_counts: Tensor | None = None
        self.register_buffer("target_usage", None if usage is None else torch.tensor(usage), persistent=False)

    def scalar(self, inputs: Mapping[str, Any], output: LossOutput) -> Tensor | None:
        layers = router_layers(inputs["gate_logits"], self.num_experts)
        self._check_layers(len(layers))
        kept = [token_mask(inputs.get("attention_mask"), z.shape[:-1], z.device) for z in layers]
        chosen = self._chosen(layers, inputs.get("expert_indices"))
        found = [
            count_experts(i, k & are_numbers(z), self.num_experts)
            for i, k, z in zip(chosen, kept, layers, strict=True)
        ]
        counts = torch.stack([c.to(layers[0].device) for c in found])
        if self.mode == "loss":
            counts = sum_over_ranks(counts, self.stats_scope)
        self.expert_counts = counts[0] if self.num_layers is None and len(counts) == 1 else counts
        if self.mode == "bias":
            if torch.is_grad_enabled():
                self._collect(counts, output.total)
            return None
        usage = shares_of(counts.to(accumulation_dtype(layers[0].dtype)))
        probabilities = [
            mean_of_kept(self._probabilities(masked(z.reshape(-1, self.num_experts), k)), k)
            for z, k in zip(layers, kept, strict=True)
        ]
        per_layer = load_balance(
            torch.stack([p.to(usage.device) for p in probabilities]), usage, self.target_usage
        )
        return per_layer.mean().to(output.total.device)

    @property
    def expert_usage(self) -> Tensor | None:
        return None if self.expert_counts is None else shares_of(self.expert_counts)

    def metrics(self) -> Mapping[str, Source]:
        if self.expert_counts is None:
            return {}
        return {"max_violation": partial(max_violation, self.expert_counts, self.target_usage)}

    def select(
        self, gate_logits: Tensor, k: int | None = None, *, layer: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k experts of each token by score plus bias, and their scores.

        Args:
            gate_logits: [..., E].
            k: how many; default ``top_k``.
            layer: which router this is, if there are several.

        Returns:
            ``indices`` [..., k], and ``weights`` [..., k]: the scores without the bias, in fp32 at least,
            with a gradient. They are not normalised to sum to 1: with k = 1 the router would then get no
            gradient.

        Raises:
            ValueError: k is not in 1..E, or there is no such layer.
        """
        check_gate(gate_logits, self.num_experts)
        k = self.top_k if k is None else k
        _check_count("k", k, most=self.num_experts)
        scores = self._scores(gate_logits)
        indices = (scores.detach() + self._bias(layer, scores.device)).topk(k, dim=-1).indices
        return indices, scores.gather(-1, indices)

    def advance(self) -> None:
        """Move the bias one step, by the counts of all ranks since the last step."""
        assert self.expert_bias is not None
        assert self._counts is not None
        counts = sum_over_ranks(self._counts, "global")
        total = counts.sum(-1, keepdim=True)
        if self.target_usage is None:  # in integers: rounding 1/E would tell equal counts apart
            missing = total - self.num_experts * counts
        else:
            missing = total * self.target_usage - counts
        self.expert_bias += self.bias_update_rate * missing.sign()
        self._counts = None

    def _check_layers(self, num_layers: int) -> None:
        if self.num_layers is None and self.mode == "bias" and num_layers > 1:
            raise ValueError(
                f"gate_logits are of {num_layers} layers, but one expert_bias balances one router; "
                f"pass num_layers={num_layers}"
            )
        if self.num_layers not in (None, num_layers):
            raise ValueError(
                f"expected gate_logits of num_layers={self.num_layers} layers; got {num_layers}. "
                "Pass a list of them, one a layer"
            )

    def _chosen(self, layers: Sequence[Tensor], given: Any) -> list[Tensor]:
        """[N, k] the experts that the tokens of each layer chose."""
        if given is None:
            at = [None if self.num_layers is None else i for i in range(len(layers))]
            found = [self.select(z, layer=i)[0] for i, z in zip(at, layers, strict=True)]
            return [indices.reshape(-1, self.top_k) for indices in found]
        given = list(given) if isinstance(given, (list, tuple)) else [given]
        if len(given) != len(layers):
            raise ValueError(
                f"expert_indices must be of as many layers as gate_logits, {len(layers)}; got {len(given)}. "
                "Pass lists of the same length, one tensor a layer"
            )
        return [checked_indices(i, z) for i, z in zip(given, layers, strict=True)]

    def _scores(self, gate_logits: Tensor) -> Tensor:
        z = gate_logits.to(accumulation_dtype(gate_logits.dtype))
        return z.softmax(-1) if self.scoring == "softmax" else z.sigmoid()

    def _probabilities(self, gate_logits: Tensor) -> Tensor:
        scores = self._scores(gate_logits)
        if self.scoring == "softmax":
            return scores
        # where all scores underflow, their sum is 0
        return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)

    def _bias(self, layer: int | None, device: torch.device) -> Tensor | float:
        if self.expert_bias is None:
            return 0.0
        if self.num_layers is None and layer is None:
            return self.expert_bias.to(device)
        if self.num_layers is None or layer is None or not 0 <= layer < self.num_layers:
            known = "left out" if self.num_layers is None else f"in [0, {self.num_layers})"
            raise ValueError(f"layer must be {known} with num_layers={self.num_layers}; got {layer}")
        return self.expert_bias[layer].to(device)

    def _collect(self, counts: Tensor, loss: Tensor) -> None:
        """Record the counts [L, E] of a micro-batch with this loss."""
        assert self.expert_bias is not None
        if self.expert_bias.device != counts.device:
            raise ValueError(
                f"gate_logits are on {counts.device} but expert_bias on {self.expert_bias.device}; "
                f"move the objective with .to({str(counts.device)!r})"
            )
        counts = counts.reshape(self.expert_bias.shape)
        self._counts = counts if self._counts is None else self._counts + counts
        self.take_note(loss)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MoEBalance:
        """As usual, but keep fp32 tensors in fp32: a bf16 bias of 0.5 would lose a step of 0.001."""
        before = {name: getattr(self, name) for name in ("expert_bias", "target_usage")}
        super()._apply(fn, recurse)
        for name, value in before.items():
            if value is not None and getattr(self, name).dtype != torch.float32:
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, mode={self.mode!r}, top_k={self.top_k}"


class RouterZLoss(Component):
    """Keeps router logits small: the squared log-partition function, averaged over tokens and layers.

        L = mean_t logsumexp(z_t)^2

    Inputs:
        gate_logits: [B, T, E] or [N, E], or a list of them, one per layer.
        attention_mask: [B, T], 0 at padding, which is not counted, and 1 elsewhere; default: the objective's
            mask, or all tokens.

    Example:
        >>> import torch, lossmith
        >>> criterion = lossmith.ComposedLoss(
        ...     lossmith.CrossEntropyLoss(), components={"router_z": lossmith.RouterZLoss()}
        ... )
        >>> logits, targets = torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.long)
        >>> parts = criterion(logits, targets, gate_logits=torch.zeros(2, 3, 4), return_detailed=True)
        >>> round(parts["router_z"].item(), 4)  # log(4)^2
        1.9218

    Source: Zoph et al., ST-MoE: Designing Stable and Transferable Sparse Expert Models, 2022.
    """

    required = ("gate_logits",)
    optional = ("attention_mask",)
    per_token = ("gate_logits",)

    def scalar(self, inputs: Mapping[str, Any], output: LossOutput) -> Tensor:
        losses = []
        for z in router_layers(inputs["gate_logits"]):
            kept = token_mask(inputs.get("attention_mask"), z.shape[:-1], z.device)
            per_token = router_z(masked(z.reshape(-1, z.shape[-1]), kept))
            losses.append(mean_of_kept(per_token, kept).to(output.total.device))
        return torch.stack(losses).mean()


def load_balance(probability: Tensor, usage: Tensor, target_usage: Tensor | None = None) -> Tensor:
    """sum_e f_e P_e / pi_e, [...]: 1 at balance.

    Args:
        probability: [..., E] P, the mean over tokens of the probability of each expert.
        usage: [..., E] f, each expert's share of the choices; a constant to backpropagation.
        target_usage: [E] pi; default 1/E.
    """
    products = usage.detach() * probability
    if target_usage is None:
        return products.sum(-1) * probability.shape[-1]
    return (products / target_usage.to(probability)).sum(-1)


def max_violation(counts: Tensor, target_usage: Tensor | None = None) -> Tensor:
    """max_e f_e / pi_e - 1, over all layers: 0 at balance, and if nothing was counted.

    Args:
        counts: [..., E] how often each expert was chosen.
        target_usage: [E] pi; default 1/E.
    """
    usage = shares_of(counts)
    load = usage * usage.shape[-1] if target_usage is None else usage / target_usage.to(usage)
    return (load.amax(-1) - 1).clamp(min=0).max()


def router_z(gate_logits: Tensor) -> Tensor:
    """logsumexp(z)^2, [...], in fp32 at least.

    Args:
        gate_logits: [..., E].
    """
    return gate_logits.to(accumulation_dtype(gate_logits.dtype)).logsumexp(-1).square()


def _check_count(name: str, value: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number; got {value!r}")
    if value < 1 or (most is not None and value > most):
        upper = "" if most is None else f" and <= num_experts={most}"
        raise ValueError(f"{name} must be >= 1{upper}; got {value}")


def _checked_usage(usage: float | Sequence[float] | None, num_experts: int) -> list[float] | None:
    """[E] shares, or None if all are equal."""
    if usage is None:
        return None
    shares = [float(usage)] * num_experts if isinstance(usage, int | float) else [float(u) for u in usage]
    if len(shares) != num_experts:
        raise ValueError(
            f"target_expert_usage must be one share or num_experts={num_experts}; got {len(shares)}"
        )
    if not all(0 < share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-3:
        raise ValueError(
            f"target_expert_usage must be shares > 0 that sum to 1 over num_experts={num_experts}; "
            f"got {usage}, a sum of {sum(shares):g}. Leave it out for {1 / num_experts:g} each, at any top_k"
        )
    return None if min(shares) == max(shares) else shares
