"""Unlikelihood penalties on tokens that should not come next: repeated n-grams and tokens, an early EOS."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from lossmith.components.component import Component
from lossmith.equation.batch import TokenBatch
from lossmith.equation.term import Term
from lossmith.options import strict_options
from lossmith.options.shared import MinLength, NgramSize, NgramWindow, RepetitionThreshold, TokenId
from lossmith.terms.candidates import early_eos_candidates, immediate_candidates, ngram_candidates
from lossmith.terms.unlikelihood import unlikelihood


class _Unlikely(Component):
    """sum_t M[t] sum over c in C[t] of -log(1 - p_c), divided by the denominator of all terms."""

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
    """Unlikelihood of the tokens that would complete a repeated n-gram.

        C[t] = { x[j+n-1] : max(0, m-w) <= j <= m-n,  x[j..j+n-2] = x[m-n+1..m-1] },   m = t + 1 tokens seen

    without the target and padding. The context is ``input_ids``, or without them the preceding targets.
    No match crosses a change of ``segment_ids``.

    Args:
        ngram_size: n >= 1; 1 penalises every token in the window.
        window_size: w >= n, how many of the last tokens it looks at.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: n < 1 or w < n.

    Source: Welleck et al., Neural Text Generation with Unlikelihood Training, 2019.
    """

    @strict_options
    def __init__(self, ngram_size: NgramSize = 4, window_size: NgramWindow = 50) -> None:
        super().__init__()
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
    """Unlikelihood of the last token once it has come ``threshold`` times in a row.

        C[t] = { x[t] } if the run of equal tokens that ends at t has length >= threshold

    Args:
        threshold: with 2, after "time time" a third is penalised.

    Raises:
        TypeError: a threshold that is not a whole number.
        ValueError: a threshold below 1.
    """

    @strict_options
    def __init__(self, threshold: RepetitionThreshold = 2) -> None:
        super().__init__()
        self.threshold = threshold

    def candidates(self) -> Callable[[TokenBatch], Tensor]:
        return partial(immediate_candidates, threshold=self.threshold)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


class EarlyEOS(_Unlikely):
    """Unlikelihood of the end of sequence before ``min_length`` supervised tokens of the document.

    Args:
        eos_token_id: the id of the end of sequence.
        min_length: the end is early before this many supervised tokens.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: a negative length or id; in the forward pass, an id outside the vocabulary.
    """

    @strict_options
    def __init__(self, eos_token_id: TokenId, min_length: MinLength = 20) -> None:
        super().__init__()
        self.eos_token_id = eos_token_id
        self.min_length = min_length

    def candidates(self) -> Callable[[TokenBatch], Tensor]:
        return partial(early_eos_candidates, eos_token_id=self.eos_token_id, min_length=self.min_length)

    def extra_repr(self) -> str:
        return f"eos_token_id={self.eos_token_id}, min_length={self.min_length}"
