"""Candidates against a search by hand, token by token."""

import pytest
import torch
from hypothesis import given, strategies as st

from lossmith.equation.batch import align
from lossmith.terms.candidates import early_eos_candidates, immediate_candidates, ngram_candidates

IGNORE = -100


def contexts(row: list[int], inputs: list[int] | None) -> list[int]:
    """x[0..T-1]: what is read at each position; None where unknown."""
    if inputs is not None:
        return list(inputs)
    return [None, *[None if y == IGNORE else y for y in row[:-1]]]


def by_hand(x, segments, targets, n, w):
    """The sets of the formula, one a position."""
    found = []
    for t in range(len(x)):
        m = t + 1
        here = set()
        for j in range(max(0, m - w), m - n + 1):
            block = range(j, j + n)
            tail = range(m - n + 1, m)
            known = all(x[i] is not None for i in (*block, *tail))
            together = all(segments[i] == segments[t] for i in (*block, *tail))
            if known and together and all(x[j + i] == x[m - n + 1 + i] for i in range(n - 1)):
                here.add(x[j + n - 1])
        found.append(set() if targets[t] == IGNORE else here - {targets[t]})
    return found


def as_sets(candidates: torch.Tensor, shape) -> list[list[set[int]]]:
    rows = candidates.reshape(*shape, -1).tolist()
    for row in rows:
        for ids in row:
            kept = [c for c in ids if c != -1]
            assert len(kept) == len(set(kept)), "a candidate is there twice"
    return [[{c for c in ids if c != -1} for ids in row] for row in rows]


batches = st.tuples(
    st.integers(1, 2),  # B
    st.integers(1, 14),  # T
    st.integers(1, 4),  # n
    st.integers(0, 8),  # w - n
    st.integers(2, 4),  # V
    st.booleans(),  # input ids
    st.booleans(),  # segments
    st.integers(0, 2**31),
)


def make(case):
    num_rows, length, n, more, vocab, has_inputs, has_segments, seed = case
    rng = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocab, (num_rows, length), generator=rng)
    targets[torch.rand(num_rows, length, generator=rng) < 0.15] = IGNORE
    inputs = torch.randint(vocab, (num_rows, length), generator=rng) if has_inputs else None
    segments = (torch.rand(num_rows, length, generator=rng) < 0.2).cumsum(-1) if has_segments else None
    batch = align(targets, input_ids=inputs, segment_ids=segments)
    flat = torch.zeros_like(targets) if segments is None else segments
    return batch, targets.tolist(), None if inputs is None else inputs.tolist(), flat.tolist(), n, n + more


@given(batches)
def test_ngrams_are_those_of_a_search_by_hand(case):
    batch, targets, inputs, segments, n, w = make(case)
    found = as_sets(ngram_candidates(batch, ngram_size=n, window=w), batch.shape)
    for b, row in enumerate(targets):
        x = contexts(row, None if inputs is None else inputs[b])
        assert found[b] == by_hand(x, segments[b], row, n, w)


@given(batches, st.integers(1, 4))
def test_immediate_repetition_is_a_run_that_ends_here(case, threshold):
    batch, targets, inputs, segments, _, _ = make(case)
    found = as_sets(immediate_candidates(batch, threshold=threshold), batch.shape)
    for b, row in enumerate(targets):
        x = contexts(row, None if inputs is None else inputs[b])
        for t in range(len(row)):
            run = range(t - threshold + 1, t + 1)
            is_run = run[0] >= 0 and all(
                x[i] is not None and x[i] == x[t] and segments[b][i] == segments[b][t] for i in run
            )
            expected = {x[t]} - {row[t]} if is_run and row[t] != IGNORE else set()
            assert found[b][t] == expected


@given(batches, st.integers(0, 6))
def test_an_end_is_early_before_so_many_supervised_tokens(case, min_length):
    batch, targets, _, segments, _, _ = make(case)
    found = as_sets(early_eos_candidates(batch, eos_token_id=1, min_length=min_length), batch.shape)
    for b, row in enumerate(targets):
        for t in range(len(row)):
            start = t
            while start > 0 and segments[b][start - 1] == segments[b][t]:
                start -= 1
            seen = sum(y != IGNORE for y in row[start:t])
            expected = {1} - {row[t]} if seen < min_length and row[t] != IGNORE else set()
            assert found[b][t] == expected


def test_the_documented_examples():
    """After "time time" a third is a candidate; after "a b c a b" a c is."""
    time = align(torch.tensor([[5, 9]]), input_ids=torch.tensor([[7, 7]]))
    assert immediate_candidates(time, threshold=2).tolist() == [[-1], [7]]
    abc = align(torch.tensor([[1, 2, 3, 4, 5]]), input_ids=torch.tensor([[10, 11, 12, 10, 11]]))
    found = ngram_candidates(abc, ngram_size=3, window=50)
    assert [sorted(set(ids) - {-1}) for ids in found.tolist()] == [[], [], [], [], [12]]


def test_padding_is_never_a_candidate():
    ids = torch.tensor([[3, 0, 0, 3, 0]])
    batch = align(torch.tensor([[1, 1, 1, 1, 1]]), input_ids=ids, pad_token_id=0)
    assert 0 not in ngram_candidates(batch, ngram_size=1, window=4)
    assert 0 not in immediate_candidates(batch, threshold=2)
    both = align(torch.tensor([[1, 1, 1, 1, 1]]), input_ids=ids, pad_token_id=0, eos_token_id=0)
    assert 0 in ngram_candidates(both, ngram_size=1, window=4)  # only the mask can tell


@pytest.mark.parametrize("length", [1, 2, 200])
def test_windows_longer_than_the_text(length):
    batch = align(torch.zeros(1, length, dtype=torch.long), input_ids=torch.ones(1, length, dtype=torch.long))
    found = ngram_candidates(batch, ngram_size=4, window=50)
    assert found.shape[1] <= min(47, length)
    assert (found == 1).any() == (length > 4)
