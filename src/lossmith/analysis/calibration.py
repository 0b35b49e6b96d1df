"""Calibration: whether a model that is 80 % sure is right 80 % of the time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram; a bin without predictions is left out.

    Attributes:
        ece: the expected calibration error.
        confidence: the mean confidence of each bin.
        accuracy: the share of its predictions that are right.
        num_tokens: how many they are.
    """

    ece: float
    confidence: list[float]
    accuracy: list[float]
    num_tokens: list[int]


def reliability(confidence: Tensor, correct: Tensor, num_bins: int = 15) -> Reliability:
    """Accuracy as a function of confidence, in bins of equal width, and the expected calibration error.

        ECE = sum_k n_k / N |accuracy_k - confidence_k|,   k the bins ((k - 1) / K, k / K] of the confidence

    Args:
        confidence: [N] the probability of the prediction, in [0, 1].
        correct: [N] whether it is right.
        num_bins: K.

    Raises:
        ValueError: there are no predictions, or no bins.

    Example:
        >>> import torch
        >>> from lossmith.analysis import reliability
        >>> found = reliability(torch.tensor([0.9, 0.9, 0.2]), torch.tensor([True, False, False]), num_bins=2)
        >>> found.accuracy, round(found.ece, 4)
        ([0.0, 0.5], 0.3333)

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017; Naeini et al., 2015.
    """
    if not len(confidence) or num_bins < 1:
        raise ValueError(
            f"expected predictions and num_bins >= 1; got {len(confidence)} of them, num_bins={num_bins}"
        )
    confidence = confidence.double()
    bins = ((confidence * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
    num = torch.bincount(bins, minlength=num_bins)
    kept = num.nonzero().flatten()
    mean, right = (
        torch.bincount(bins, weights=values.double(), minlength=num_bins)[kept] / num[kept]
        for values in (confidence, correct)
    )
    ece = (num[kept] / len(confidence) * (right - mean).abs()).sum()
    return Reliability(ece.item(), mean.tolist(), right.tolist(), num[kept].tolist())
