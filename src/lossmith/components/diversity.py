"""``ExpertDiversity``: penalises experts whose outputs for the same token are alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lossmith.components.component import Component
from lossmith.components.masks import masked, mean_of_kept, token_mask
from lossmith.engine.rows.blocks import accumulation_dtype
from lossmith.equation.output import LossOutput


class ExpertDiversity(Component):
    """Squared cosine between two experts' outputs for the same token, averaged over pairs and tokens.

        L = mean_t  2 / (E (E - 1))  sum_{i < j} cos(o_ti, o_tj)^2

    0 where outputs are orthogonal, 1 where they are parallel or opposite; 0 with fewer than two experts. An
    output of zeros, as for an expert that was not chosen, has cosine 0 and no gradient.

    Inputs:
        expert_outputs: [B, T, E, D] or [N, E, D] each expert's output for each token, before the routing
            weights; or a list of E tensors [..., D], one per expert. E may be the k chosen experts.
        attention_mask: [B, T], 0 at padding, which is not counted, and 1 elsewhere; default: the objective's
            mask, or all tokens.

    Example:
        >>> import torch, lossmith
        >>> criterion = lossmith.ComposedLoss(
        ...     lossmith.CrossEntropyLoss(), components={"diversity": lossmith.ExpertDiversity()}
        ... )
        >>> logits, targets = torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.long)
        >>> alike = torch.ones(2, 3, 4, 8)  # 4 experts of 8 numbers
        >>> parts = criterion(logits, targets, expert_outputs=alike, return_detailed=True)
        >>> round(parts["diversity"].item(), 4)
        1.0

    Source: the orthogonality of experts in Liu et al., Diversifying the Mixture-of-Experts Representation for
    Language Models with Orthogonal Optimizer, 2023; the squared cosine as a penalty in Bansal et al., Can We
    Gain More from Orthogonality Regularizations in Training Deep CNNs?, 2018.
    """

    required = ("expert_outputs",)
    optional = ("attention_mask",)

    def scalar(self, inputs: Mapping[str, Any], output: LossOutput) -> Tensor:
        outputs = _as_experts(inputs["expert_outputs"])
        kept = token_mask(inputs.get("attention_mask"), outputs.shape[:-2], outputs.device)
        per_token = squared_cosine(masked(outputs.flatten(0, -3), kept))
        return mean_of_kept(per_token, kept).to(output.total.device)


def squared_cosine(vectors: Tensor) -> Tensor:
    """Mean over the pairs i < j of cos(v_i, v_j)^2, [...]; 0 without a pair.

    Args:
        vectors: [..., E, D].
    """
    num = vectors.shape[-2]
    pairs = cosines(vectors, vectors).square().triu(1)
    return pairs.sum((-2, -1)) / max(num * (num - 1) // 2, 1)


def cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """[..., M, N] cosine of each of ``rows`` [..., M, D] and of ``columns`` [..., N, D], in fp32 at least."""
    with torch.autocast(rows.device.type, enabled=False):
        return unit_vectors(rows) @ unit_vectors(columns).transpose(-1, -2)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Vectors [..., D] over their norm, in fp32 at least; zero vectors stay 0, without a gradient.

    Args:
        vectors: [..., D]. The squares of large or small entries neither overflow nor vanish.
    """
    x = vectors.to(accumulation_dtype(vectors.dtype))
    largest = x.detach().abs().amax(-1, keepdim=True)
    is_zero = largest < torch.finfo(x.dtype).tiny
    # the scale needs no gradient: the direction does not depend on it
    x = torch.where(is_zero, 0.0, x / torch.where(is_zero, 1.0, largest))
    # the squared norm is now at least 1, or 0, where rsqrt would make the gradient NaN
    return x * x.square().sum(-1, keepdim=True).clamp(min=0.5).rsqrt()


def _as_experts(outputs: Any) -> Tensor:
    """[..., E, D] expert outputs, checked.

    Raises:
        TypeError: neither a floating-point tensor nor a list of them.
        ValueError: another shape, no expert, or experts of different shapes.
    """
    experts = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    for expert in experts:
        if not isinstance(expert, Tensor) or not expert.is_floating_point():
            got = expert.dtype if isinstance(expert, Tensor) else type(expert).__name__
            raise TypeError(
                f"expert_outputs must be a floating-point tensor [B, T, E, D] or [N, E, D], or a list of E "
                f"tensors [..., D]; got {got}"
            )
    if isinstance(outputs, Tensor):
        if outputs.dim() not in (3, 4):
            raise ValueError(
                f"expert_outputs must be [B, T, E, D] or [N, E, D]; got {list(outputs.shape)}. "
                "Stack the outputs of the experts in the last dimension but one"
            )
        return outputs
    shapes = sorted({tuple(expert.shape) for expert in experts})
    if len(shapes) != 1 or len(shapes[0]) not in (2, 3):
        raise ValueError(
            f"expert_outputs in a list must be E tensors of one shape, [B, T, D] or [N, D]; got "
            f"{[list(shape) for shape in shapes]}. Pass what every expert made of every token, zeros where "
            "it was not asked"
        )
    return torch.stack(experts, dim=-2)
