"""Router logits and the experts they chose, checked and counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def router_layers(gate_logits: Any, num_experts: int | None = None) -> list[Tensor]:
    """One tensor per layer, checked.

    Raises:
        TypeError: neither a floating-point tensor nor a list of them.
        ValueError: no layer, or a shape other than [B, T, E] or [N, E].
    """
    layers = list(gate_logits) if isinstance(gate_logits, (list, tuple)) else [gate_logits]
    if not layers:
        raise ValueError(
            "gate_logits must hold at least one layer; got an empty list. Have the model return its router's "
            "logits (output_router_logits=True in Hugging Face)"
        )
    for z in layers:
        check_gate(z, num_experts)
        if z.dim() not in (2, 3):
            raise ValueError(
                f"gate_logits must be [B, T, E] or [N, E]; got {list(z.shape)}. Pass several layers as a list"
            )
    return layers


def check_gate(gate_logits: Any, num_experts: int | None) -> None:
    """
    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another number of experts.
    """
    if not isinstance(gate_logits, Tensor) or not gate_logits.is_floating_point():
        got = gate_logits.dtype if isinstance(gate_logits, Tensor) else type(gate_logits).__name__
        raise TypeError(f"gate_logits must be floating-point tensors [B, T, E] or [N, E]; got {got}")
    size = gate_logits.shape[-1] if gate_logits.dim() else 0
    if size == 0 or num_experts not in (None, size):
        wanted = ">= 1" if num_experts is None else f"= num_experts={num_experts}"
        raise ValueError(f"gate_logits must be [..., E] with E {wanted}; got {list(gate_logits.shape)}")


def checked_indices(indices: Any, gate_logits: Tensor) -> Tensor:
    """[N, k] int64 ids of experts; [B, T] and [N] mean k = 1.

    Raises:
        TypeError: not an integer tensor.
        ValueError: the wrong number of tokens, or an id that is not an expert's.
    """
    if not isinstance(indices, Tensor) or indices.is_floating_point() or indices.dtype == torch.bool:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"expert_indices must be integer tensors [..., k]; got {got}")
    num_tokens, num_experts = gate_logits.shape[:-1].numel(), gate_logits.shape[-1]
    k = indices.shape[-1] if indices.dim() and indices.numel() != num_tokens else 1
    if indices.numel() != num_tokens * k:
        raise ValueError(
            f"expert_indices must be [..., k] for the {num_tokens} tokens of gate_logits "
            f"{list(gate_logits.shape)}; got {list(indices.shape)}"
        )
    indices = indices.reshape(num_tokens, k).long()
    # an accelerator raises by itself, later
    if indices.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = indices[(indices < 0) | (indices >= num_experts)]
        if len(outside):
            raise ValueError(
                f"expert_indices must be in [0, {num_experts}), E of the gate_logits; got {int(outside[0])}"
            )
    return indices


def are_numbers(gate_logits: Tensor) -> Tensor:
    """[N] bool, False where a token's router logits are unusable: NaN, +inf, or -inf for every expert. The
    top k of such a row would be arbitrary."""
    return gate_logits.amax(-1).reshape(-1).isfinite()


def count_experts(indices: Tensor, kept: Tensor, num_experts: int) -> Tensor:
    """[E] how many of the kept tokens chose each expert.

    Args:
        indices: [N, k] the experts each token chose.
        kept: [N] bool.
        num_experts: E.
    """
    ones = kept.long().unsqueeze(-1).expand_as(indices).reshape(-1)
    counts = torch.zeros(num_experts, dtype=torch.long, device=indices.device)
    return counts.scatter_add_(0, indices.reshape(-1), ones)  # bincount and one_hot wait for the device


def shares_of(counts: Tensor) -> Tensor:
    """[..., E] counts as shares; they sum to 1 unless nothing was counted."""
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)
