"""``perplexity`` of a batch, and ``Perplexity`` of a corpus, which averages tokens and not batch means."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lossmith.engine.rows.backends import BackendName
from lossmith.functional import cross_entropy
from lossmith.options import strict_options
from lossmith.options.shared import IgnoreIndex, Mask, Shift, Softcap


@strict_options
def perplexity(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: IgnoreIndex = -100,
    mask: Mask = None,
    softcap: Softcap = None,
    shift: Shift = False,
    backend: BackendName = None,
) -> Tensor:
    """exp of the mean NLL over the supervised tokens: unsmoothed, at temperature 1.

    Over a corpus, average tokens and not batches: use :class:`lossmith.Perplexity`.

    Args:
        logits, targets, ignore_index, mask, softcap, shift, backend: see :func:`lossmith.cross_entropy`.

    Returns:
        A scalar; 1 if there is no supervised token.

    Example:
        >>> import torch, lossmith
        >>> round(lossmith.perplexity(torch.zeros(1, 4, 10), torch.ones(1, 4, dtype=torch.long)).item(), 4)
        10.0
    """
    return cross_entropy(
        logits, targets, ignore_index=ignore_index, mask=mask, softcap=softcap, shift=shift, backend=backend
    ).exp()


class Perplexity:
    """Token-weighted perplexity of a corpus, accumulated batch by batch.

        exp( sum over all supervised tokens of nll / their number ),   unsmoothed, at temperature 1

    The sums stay on the logits' device, in fp64 if it supports that, until :meth:`compute`.

    Args:
        ignore_index: the id that marks a token without a target.
        softcap: see :func:`lossmith.cross_entropy`.
        shift: whether targets are unshifted labels.
        backend: which arithmetic computes the rows; see :func:`lossmith.cross_entropy`.

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Example:
        >>> import torch, lossmith
        >>> ppl = lossmith.Perplexity()
        >>> for n in (3, 5):
        ...     ppl.update(torch.zeros(n, 10), torch.ones(n, dtype=torch.long))
        >>> round(ppl.compute(), 4), ppl.num_tokens
        (10.0, 8)
    """

    @strict_options
    def __init__(
        self,
        *,
        ignore_index: IgnoreIndex = -100,
        softcap: Softcap = None,
        shift: Shift = False,
        backend: BackendName = None,
    ) -> None:
        self.ignore_index = ignore_index
        self.softcap = softcap
        self.shift = shift
        self.backend: BackendName = backend
        self.reset()

    def __repr__(self) -> str:
        return f"Perplexity({self.compute():.4g} over {self.num_tokens} tokens)"

    def reset(self) -> None:
        """Forget everything seen so far."""
        self._nll: Tensor | float = 0.0
        self._count: Tensor | int = 0

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor, *, mask: Tensor | None = None) -> None:
        """Add the tokens of ``logits`` [..., V] at ``targets`` [...]; no synchronisation."""
        values, stats = cross_entropy(
            logits,
            targets,
            reduction="none",
            ignore_index=self.ignore_index,
            softcap=self.softcap,
            shift=self.shift,
            mask=mask,
            backend=self.backend,
            return_stats=True,
        )
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        self.add(values.sum(dtype=wide), stats.is_valid.sum())

    def add(self, nll_sum: Tensor | float, num_tokens: Tensor | int) -> None:
        """Add tokens whose NLL is already summed, such as another rank's."""
        self._nll = self._nll + nll_sum
        self._count = self._count + num_tokens

    @property
    def nll_sum(self) -> float:
        """The summed NLL of the tokens seen, in nats."""
        return float(self._nll)

    @property
    def num_tokens(self) -> int:
        """How many supervised tokens were seen."""
        return int(self._count)

    def compute(self) -> float:
        """The perplexity; NaN before any token was seen.

        A mean NLL beyond what a float's exponential holds gives inf.
        """
        if self.num_tokens == 0:
            return math.nan
        try:
            return math.exp(self.nll_sum / self.num_tokens)
        except OverflowError:
            return math.inf
