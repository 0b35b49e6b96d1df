"""``Contrastive``: pulls two views of a sample together, or pushes the tokens of a row apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lossmith.components.component import Component
from lossmith.components.diversity import cosines
from lossmith.components.masks import token_mask
from lossmith.equation.output import LossOutput
from lossmith.options import strict_options
from lossmith.options.shared import CosineMargin, PairTemperature


class Contrastive(Component):
    """Contrastive loss of two views of each sample or, without views, of the tokens in each row.

        s_ij = cos(a_i, b_j) / temperature
        L    = -1/2B sum_i ( log softmax_j(s_ij)[i] + log softmax_j(s_ji)[i] )              two views
        L    = mean_rows  1 / (n (n - 1)) sum_{i != j} max(0, margin - 1 + cos(h_i, h_j))   n tokens of a row

    The first is InfoNCE in both directions: the sample's other view against those of the rest of the batch. A
    batch of 1 gives 0. The second pushes the hidden states of a row apart: cosines up to 1 - margin cost
    nothing. Rows of fewer than two tokens are ignored; if there are no others, it is 0.

    Inputs:
        contrastive_pairs: (view_a, view_b), [B, D] each; row i of both is the same sample.
        hidden_states: [B, T, D] of one layer, used if there are no pairs.
        attention_mask: [B, T], 0 at padding, which is not counted, and 1 elsewhere; default: the objective's
            mask, or all tokens.

    Args:
        temperature: divides the cosines of two views, > 0.
        margin: by how much a token's cosine with itself, 1, should exceed its cosine with others, >= 0.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range; in the forward pass, neither pairs nor hidden states.

    Example:
        >>> import torch, lossmith
        >>> criterion = lossmith.ComposedLoss(
        ...     lossmith.CrossEntropyLoss(), components={"contrastive": lossmith.Contrastive()}
        ... )
        >>> logits, targets = torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.long)
        >>> alike = torch.ones(2, 8)  # both samples look the same in both views
        >>> parts = criterion(logits, targets, contrastive_pairs=(alike, alike), return_detailed=True)
        >>> round(parts["contrastive"].item(), 4)  # log 2
        0.6931

    Source: van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018, in the
    symmetric form of Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
    2021; Su et al., A Contrastive Framework for Neural Text Generation, 2022 (tokens).
    """

    optional = ("contrastive_pairs", "hidden_states", "attention_mask")

    @strict_options
    def __init__(self, temperature: PairTemperature = 0.07, margin: CosineMargin = 0.5) -> None:
        super().__init__()
        self.temperature = temperature
        self.margin = margin

    def scalar(self, inputs: Mapping[str, Any], output: LossOutput) -> Tensor:
        pairs, hidden = inputs.get("contrastive_pairs"), inputs.get("hidden_states")
        if pairs is not None:
            loss = info_nce(*_checked_views(pairs), temperature=self.temperature)
        elif hidden is not None:
            _check_hidden(hidden)
            kept = token_mask(inputs.get("attention_mask"), hidden.shape[:-1], hidden.device)
            loss = token_contrast(hidden, kept.reshape(hidden.shape[:-1]), margin=self.margin)
        else:
            raise ValueError(
                "Contrastive needs contrastive_pairs, two views [B, D] of each sample, or hidden_states "
                "[B, T, D]; got neither. Pass one of them, or give the component a weight of 0"
            )
        return loss.to(output.total.device)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, margin={self.margin}"


def info_nce(view_a: Tensor, view_b: Tensor, *, temperature: float = 0.07) -> Tensor:
    """InfoNCE of cosines in both directions, averaged over the batch; 0 for a batch of 1.

    Args:
        view_a, view_b: [B, D]; row i of both is the same sample.
        temperature: > 0.
    """
    scores = cosines(view_a, view_b) / temperature
    losses = (scores.logsumexp(0) + scores.logsumexp(1)) / 2 - scores.diagonal()
    return losses.sum() / max(len(losses), 1)


def token_contrast(hidden: Tensor, kept: Tensor | None = None, *, margin: float = 0.5) -> Tensor:
    """max(0, margin - 1 + cos(h_i, h_j)), averaged over the pairs i != j of each row, then over rows.

    Args:
        hidden: [B, T, D].
        kept: [B, T] bool, which tokens count; rows with fewer than two are ignored. Default: all.
        margin: >= 0.
    """
    num_tokens = hidden.shape[1]
    if kept is None:
        kept = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    alike = cosines(*[torch.where(kept.unsqueeze(-1), hidden, 0.0)] * 2)  # [B, T, T]
    is_pair = kept.unsqueeze(1) & kept.unsqueeze(2)
    is_pair &= ~torch.eye(num_tokens, dtype=torch.bool, device=hidden.device)
    costs = torch.where(is_pair, torch.relu(alike + (margin - 1)), 0.0)
    num_pairs = is_pair.sum((1, 2))
    per_row = costs.sum((1, 2)) / num_pairs.clamp(min=1)
    return per_row.sum() / (num_pairs > 0).sum().clamp(min=1)


def _checked_views(pairs: Any) -> tuple[Tensor, Tensor]:
    """
    Raises:
        TypeError: not two floating-point tensors.
        ValueError: their shapes differ or are not [B, D].
    """
    is_pair = isinstance(pairs, (list, tuple)) and len(pairs) == 2
    if not is_pair or not all(isinstance(v, Tensor) and v.is_floating_point() for v in pairs):
        raise TypeError(
            "contrastive_pairs must be two floating-point tensors (view_a, view_b), [B, D] each; got "
            f"{_describe(pairs)}"
        )
    first, second = pairs
    if first.dim() != 2 or first.shape != second.shape:
        raise ValueError(
            f"contrastive_pairs must be two views of one shape [B, D]; got {list(first.shape)} and "
            f"{list(second.shape)}. Pool over positions first, for example hidden_states.mean(1)"
        )
    return first, second


def _check_hidden(hidden: Any) -> None:
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise TypeError(
            f"hidden_states must be a floating-point tensor [B, T, D]; got {_describe(hidden)}. "
            "Of the tuple that Hugging Face returns, pass the last: hidden_states[-1]"
        )
    if hidden.dim() != 3:
        raise ValueError(f"hidden_states must be [B, T, D]; got {list(hidden.shape)}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
