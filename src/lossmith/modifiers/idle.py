"""How a modifier finds out that it cannot act on its batches, and what it says then."""

from __future__ import annotations

import torch
from torch import Tensor

# How many batches must be alike before that is taken as the nature of the data and not as chance.
PATIENCE = 8

# These follow a modifier's name.
ALIKE = "weighs all samples alike"
ALONE = (
    "has no effect: every batch so far was a single sample, and {what}; use larger micro-batches, or "
    "stats_scope='global' over several ranks"
)


def one_limit(low: str, high: str) -> str:
    """The message if two limits leave a single value."""
    return f"{ALIKE}: {low} and {high} are equal; set them apart, or leave it out"


class Seen:
    """What a modifier remembers of the batches so far, to tell the nature of the data from chance."""

    def __init__(self) -> None:
        self.is_told_of_sparse_weights = False
        self._num_batches = 0
        self._had_several = self._are_same = False
        self._low = self._high = torch.zeros(())

    def only_singles(self, num_samples: int) -> bool:
        """Whether every batch, with this one, was a single sample; False while that may be chance."""
        self._num_batches += 1
        self._had_several |= num_samples != 1
        return not self._had_several and self._num_batches >= PATIENCE

    def only_one_share(self, share: Tensor, counts: Tensor) -> bool:
        """Whether all samples have the same supervised share, as far as this and earlier batches tell.

        One batch in which every position is supervised settles it: causal training looks like that, and
        masked text does not. The check waits for the device, so it runs at most twice.

        Args:
            share: [B] the supervised share of each sample.
            counts: [B] bool, the samples that count.
        """
        if self._num_batches == PATIENCE or not share.numel():
            return self._are_same
        low = torch.where(counts, share, torch.inf).amin()
        high = torch.where(counts, share, -torch.inf).amax()
        is_first, self._num_batches = not self._num_batches, self._num_batches + 1
        self._low = low if is_first else torch.minimum(self._low.to(low), low)
        self._high = high if is_first else torch.maximum(self._high.to(high), high)
        if is_first and len(share) > 1:
            self._are_same = _holds((self._low == 1) & (self._high == 1))
        elif self._num_batches == PATIENCE:
            self._are_same = _holds(self._low == self._high)
        return self._are_same


def _holds(condition: Tensor) -> bool:
    """Whether a 0-dimensional condition is true. Waits for the device."""
    return condition.nonzero().shape[0] > 0
