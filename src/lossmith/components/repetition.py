"""Penalties on what should not come next, by unlikelihood: n-grams and tokens again, an early end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from lossmith.batch import TokenBatch
from lossmith.components.component import Component
from lossmith.equation import Term
from lossmith.terms.candidates import early_eos_candidates, immediate_candidates, ngram_candidates
from lossmith.terms.unlikelihood import unlikelihood


class _Unlikely(Component):
    """sum_t M[t] sum over c in C[t] of -log(1 - p_c), over the denominator of all terms."""

    def candidates(self) -> Callable[[TokenBatch], Tensor]:
        """batch -> [N, K] ids."""
        raise NotImplementedError

    def term(self) -> Term:
        return Term(
            "unlikelihood",
            lambda stats, _: unlikelihood(stats),
            reads=("unscaled.candidate_log1m_prob",),
            scope="token",
            candidates=self.candidates(),
        )


class NgramRepetition(_Unlikely):
    """Unlikelihood of the tokens that would complete an n-gram a second time.

        C[t] = { x[j+n-1] : max(0, m-w) <= j <= m-n,  x[j..j+n-2] = x[m-n+1..m-1] },   m = t + 1 tokens seen

    without the target and padding. The context is ``input_ids``, or without them the targets before.
    Matches end where ``segment_ids`` change.

    Args:
        ngram_size: n >= 1; 1 penalises every token of the window.
        window_size: w >= n, how many of the last tokens are looked at.

    Raises:
        ValueError: n < 1 or w < n.

    Source: Welleck et al., Neural Text Generation with Unlikelihood Training, 2019.
    """

    def __init__(self, ngram_size: int = 4, window_size: int = 50) -> None:
        super().__init__()
        if ngram_size < 1:
            raise ValueError(f"ngram_size must be >= 1; got {ngram_size}")
        if window_size < ngram_size:
            raise ValueError(
                f"window_size={window_size} holds no n-gram of {ngram_size}; "
                "expected window_size >= ngram_size"
            )
        self.ngram_size = ngram_size
        self.window_size = window_size

    def candidates(self) -> Callable[[TokenBatch], Tensor]:
        return partial(ngram_candidates, ngram_size=self.ngram_size, window=self.window_size)

    def extra_repr(self) -> str:
        return f"ngram_size={self.ngram_size}, window_size={self.window_size}"


class ImmediateRepetition(_Unlikely):
    """Unlikelihood of the last token, where it has come ``threshold`` times in a row already.

        C[t] = { x[t] } if the run of equal tokens that ends at t has length >= threshold

    Args:
        threshold: 2: after "time time", a third is penalised.

    Raises:
        ValueError: a threshold below 1.
    """

    def __init__(self, threshold: int = 2) -> None:
        super().__init__()
        if threshold < 1:
            raise ValueError(f"threshold must be >= 1; got {threshold}")
        self.threshold = threshold

    def candidates(self) -> Callable[[TokenBatch], Tensor]:
        return partial(immediate_candidates, threshold=self.threshold)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


class EarlyEOS(_Unlikely):
    """Unlikelihood of the end of sequence before ``min_length`` supervised tokens of the document.

    Args:
        eos_token_id: the end of sequence.
        min_length: supervised tokens before which it is early.

    Raises:
        ValueError: a negative length or id.
    """

    def __init__(self, eos_token_id: int, min_length: int = 20) -> None:
        super().__init__()
        if not isinstance(eos_token_id, int):
            raise TypeError(
                f"eos_token_id must be one id; got {eos_token_id!r}. Of several, pass the one that ends "
                "a text"
            )
        if min_length < 0 or eos_token_id < 0:
            raise ValueError(f"min_length and eos_token_id must be >= 0; got {min_length} and {eos_token_id}")
        self.eos_token_id = eos_token_id
        self.min_length = min_length

    def candidates(self) -> Callable[[TokenBatch], Tensor]:
        return partial(early_eos_candidates, eos_token_id=self.eos_token_id, min_length=self.min_length)

    def extra_repr(self) -> str:
        return f"eos_token_id={self.eos_token_id}, min_length={self.min_length}"
