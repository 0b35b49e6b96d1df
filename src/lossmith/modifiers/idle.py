"""What a modifier says that cannot act on what it is given, and how it finds out."""

from __future__ import annotations

import torch
from torch import Tensor

# How many batches have to be alike before that is taken for their nature, and no longer for chance.
PATIENCE = 8

# Said after a modifier's name.
ALIKE = "weighs all samples alike"
ALONE = (
    "has no effect: every batch so far was a single sample, and {what}; use larger micro-batches, or "
    "stats_scope='global' over several ranks"
)


def one_limit(low: str, high: str) -> str:
    """Said where two limits leave a single value."""
    return f"{ALIKE}: {low} and {high} are equal; set them apart, or leave it out"


class Singles:
    """Whether there has never been more than one sample to compare."""

    def __init__(self) -> None:
        self._num_batches = 0
        self._has_seen_several = False

    def are_all(self, num_samples: int) -> bool:
        """Whether every batch so far, this one of ``num_samples`` included, was a single sample; False as
        long as that may be chance."""
        self._num_batches += 1
        self._has_seen_several |= num_samples != 1
        return not self._has_seen_several and self._num_batches >= PATIENCE


class Shares:
    """Whether all samples have the same supervised share, by the first few batches.

    A batch without a single position left out settles it at once: that is how causal training looks, and
    a batch of masked text does not. Looking waits for the device, so it is done twice at most.
    """

    def __init__(self) -> None:
        self._num_batches = 0
        self._are_same = False
        self._low = self._high = torch.zeros(())

    def are_same(self, share: Tensor, counts: Tensor) -> bool:
        """Whether they are, as far as can be told after this batch.

        Args:
            share: [B] the supervised share of each sample.
            counts: [B] bool, the samples that count.
        """
        if self._num_batches < PATIENCE and share.numel():
            self._take_in(share, counts)
        return self._are_same

    def _take_in(self, share: Tensor, counts: Tensor) -> None:
        low, high = (
            torch.where(counts, share, torch.inf).amin(),
            torch.where(counts, share, -torch.inf).amax(),
        )
        is_first, self._num_batches = not self._num_batches, self._num_batches + 1
        self._low = low if is_first else torch.minimum(self._low.to(low), low)
        self._high = high if is_first else torch.maximum(self._high.to(high), high)
        if is_first and len(share) > 1:
            self._are_same = _holds((self._low == 1) & (self._high == 1))
        elif self._num_batches == PATIENCE:
            self._are_same = _holds(self._low == self._high)


def _holds(condition: Tensor) -> bool:
    """Whether a 0-dimensional condition is true. Waits for the device."""
    return condition.nonzero().shape[0] > 0
