"""How a mixture of experts uses its experts."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmith.components.routers import count_experts, shares_of


def expert_usage(chosen: Tensor, num_experts: int, kept: Tensor | None = None) -> Tensor:
    """The share of the tokens' choices that each expert got, [E]; they sum to 1.

        f_e = (number of times that a token chose e) / (number of choices)

    Args:
        chosen: [N, k] or [N] the experts that each token was sent to.
        num_experts: E.
        kept: [N] which tokens count; default all.

    Example:
        >>> import torch
        >>> from lossmith.analysis import expert_usage
        >>> expert_usage(torch.tensor([[0, 1], [0, 2]]), num_experts=4).tolist()
        [0.5, 0.25, 0.25, 0.0]

    Source: Fedus et al., Switch Transformers, 2021, whose f_i this is.
    """
    chosen = chosen.reshape(len(chosen), -1)
    kept = torch.ones(len(chosen), dtype=torch.bool, device=chosen.device) if kept is None else kept
    return shares_of(count_experts(chosen, kept, num_experts))


def usage_entropy(usage: Tensor) -> float:
    """The entropy of the experts' shares relative to that of equal ones: 1 at balance, 0 if one gets all.

        -sum_e f_e log f_e / log E;   1 for a single expert

    Args:
        usage: [E] shares.

    Example:
        >>> import torch
        >>> from lossmith.analysis import usage_entropy
        >>> usage_entropy(torch.tensor([0.5, 0.5, 0.0, 0.0]))
        0.5
    """
    if len(usage) < 2:
        return 1.0
    entropy = torch.special.entr(usage.double()).sum()
    return (entropy / torch.tensor(float(len(usage)), dtype=torch.float64).log()).item()
