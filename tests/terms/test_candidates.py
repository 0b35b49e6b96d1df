"""Candidates against a search by hand, token by token."""

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given, strategies as st

from lossmith.equation.batch import TokenBatch, align
from lossmith.terms.candidates import early_eos_candidates, immediate_candidates, ngram_candidates
from reference_components import contexts, repeated, repeating, too_early, without_targets

IGNORE = -100


def as_sets(candidates: torch.Tensor, shape) -> list[list[set[int]]]:
    rows = candidates.reshape(*shape, -1).tolist()
    for row in rows:
        for ids in row:
            kept = [c for c in ids if c != -1]
            assert len(kept) == len(set(kept)), "a candidate is there twice"
    return [[{c for c in ids if c != -1} for ids in row] for row in rows]


@dataclass
class Case:
    """A random batch, and its rows as lists: aligned targets, what was read, documents."""

    batch: TokenBatch
    targets: list[list[int]]
    read: list[list[int | None]]
    segments: list[list[int]]

    def by_hand(self, find) -> list[list[set[int]]]:
        """What ``find`` (what was read, documents) gives for each row, without targets."""
        return [
            without_targets(find(x, segments), row)
            for x, segments, row in zip(self.read, self.segments, self.targets, strict=True)
        ]


@st.composite
def cases(draw, shortest: int = 1) -> Case:
    num_rows, length, vocab = (
        draw(st.integers(1, 2)),
        draw(st.integers(shortest, 16)),
        draw(st.integers(2, 4)),
    )
    has_inputs, has_segments, shift = draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 2))
    # the classes decide how many tokens one number can hold: from all of them to one
    num_classes = draw(st.sampled_from([None, vocab, 50, 2**20, 2**31, 2**40]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    given = torch.randint(vocab, (num_rows, length), generator=rng)
    given[torch.rand(num_rows, length, generator=rng) < 0.15] = IGNORE
    inputs = torch.randint(vocab, (num_rows, length), generator=rng) if has_inputs else None
    segments = (torch.rand(num_rows, length, generator=rng) < 0.2).cumsum(-1) if has_segments else None
    batch = align(given, input_ids=inputs, segment_ids=segments, shift=shift, num_classes=num_classes)
    targets = [[*row[shift:], *[IGNORE] * min(shift, length)] for row in given.tolist()]
    rows = [None] * num_rows if inputs is None else inputs.tolist()
    return Case(
        batch,
        targets,
        [contexts(row, x, max(shift, 1)) for row, x in zip(targets, rows, strict=True)],
        (torch.zeros_like(given) if segments is None else segments).tolist(),
    )


@given(cases(shortest=4), st.integers(1, 6), st.integers(0, 8))
def test_ngrams_are_those_of_a_search_by_hand(case, n, more):
    expected = case.by_hand(lambda x, segments: repeating(x, segments, n, n + more))
    found = ngram_candidates(case.batch, ngram_size=n, window=n + more)
    assert as_sets(found, case.batch.shape) == expected
    # listed where everything has one shape, as an accelerator does
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        found = ngram_candidates(case.batch, ngram_size=n, window=n + more)
    assert as_sets(found, case.batch.shape) == expected


@given(cases(), st.integers(1, 4))
def test_immediate_repetition_is_a_run_that_ends_here(case, threshold):
    found = as_sets(immediate_candidates(case.batch, threshold=threshold), case.batch.shape)
    assert found == case.by_hand(lambda x, segments: repeated(x, segments, threshold))


@given(cases(), st.integers(0, 6))
def test_an_end_is_early_before_so_many_supervised_tokens(case, min_length):
    found = early_eos_candidates(case.batch, eos_token_id=1, min_length=min_length)
    expected = [
        without_targets(too_early(row, segments, 1, min_length), row)
        for row, segments in zip(case.targets, case.segments, strict=True)
    ]
    assert as_sets(found, case.batch.shape) == expected


@pytest.mark.parametrize("num_classes", [4, 100, 2**40])
def test_the_same_tokens_in_another_order_are_another_ngram(num_classes):
    """After "a b x b a" there is no x, and after "a b x a b" there is one."""
    for read, expected in (([0, 1, 3, 1, 0], set()), ([0, 1, 3, 0, 1], {3})):
        batch = align(torch.full((1, 5), 2), input_ids=torch.tensor([read]), num_classes=num_classes)
        found = ngram_candidates(batch, ngram_size=3, window=50)
        assert as_sets(found, (1, 5))[0][-1] == expected


def test_long_ngrams_differ_by_their_first_token():
    """A number that held them all would overflow, and forget the first."""
    for first, expected in ((1, {5}), (2, set())):
        read = [1, 0, 0, 0, 0, 0, 0, 5, first, 0, 0, 0, 0, 0, 0]
        batch = align(torch.full((1, 15), 4), input_ids=torch.tensor([read]), num_classes=2**16)
        assert as_sets(ngram_candidates(batch, ngram_size=8, window=50), (1, 15))[0][-1] == expected


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
