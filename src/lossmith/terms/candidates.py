"""Tokens that would repeat something: candidate ids [N, K] for unlikelihood, -1 where there is none.

Vectorised over offsets into the past: integer tensors [B, T, offsets], no loop over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lossmith.equation.batch import TokenBatch

NONE = -1


def context(batch: TokenBatch) -> tuple[Tensor, Tensor | None]:
    """The token read at each position, x [B, T], and the document of the row it belongs to, [B, T], or None
    if each row is one document.

    x[t] is the last token seen when y[t] is predicted: the input or, without inputs, the preceding target.
    It is -1, which matches nothing, where the token is unknown.
    """
    if batch.input_ids is not None:
        tokens = batch.rows(batch.input_ids)
    else:
        targets = batch.rows(batch.targets)
        ahead = max(batch.shift, 1)  # aligned targets are already the next tokens
        before = torch.roll(targets, ahead, dims=-1)
        before[:, :ahead] = NONE
        tokens = before.masked_fill(before == batch.ignore_index, NONE)
    return tokens, None if batch.segment_ids is None else batch.rows(batch.segment_ids)


def ngram_candidates(batch: TokenBatch, *, ngram_size: int, window: int) -> Tensor:
    """[N, at most window - ngram_size + 1] tokens that would repeat an n-gram of the last ``window`` tokens.

        { x[j+n-1] : max(0, m-w) <= j <= m-n,  x[j..j+n-2] = x[m-n+1..m-1] },   m = t + 1 tokens seen

    Args:
        batch: the batch.
        ngram_size: n >= 1; 1 makes every token in the window a candidate.
        window: w >= n, how many of the last tokens it looks at.
    """
    tokens, segments = context(batch)
    num_offsets = min(window - ngram_size + 1, tokens.shape[-1])
    # Offset s matches if the n - 1 tokens up to t equal those up to t - s: x[t + 1 - s] would be a repeat
    is_match = _looking_back(tokens, num_offsets, since=0) >= 0
    for run in _runs(tokens, ngram_size - 1, batch.num_classes):
        is_match &= _looking_back(run, num_offsets) == run.unsqueeze(-1)
    if segments is not None:
        inside = _looking_back(segments, num_offsets) == segments.unsqueeze(-1)
        for step in range(ngram_size - 1):
            is_match &= _moved(inside, step, fill=False)
        is_match &= _looking_back(segments, num_offsets, since=0) == segments.unsqueeze(-1)
    return _candidates(batch, _listed(tokens, is_match))


def _runs(tokens: Tensor, length: int, num_classes: int | None) -> Iterator[Tensor]:
    """Numbers [B, T] that are equal where the ``length`` tokens up to there are equal, as few tensors as can
    hold them. A number is unique where one of the tokens is unknown."""
    per_number = 1 if num_classes is None else max(1, int(62 / math.log2(num_classes + 1)))
    positions = torch.arange(tokens.shape[-1], device=tokens.device)
    for first in range(0, length, per_number):
        number, is_known = torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool)
        for step in range(first, min(first + per_number, length)):
            token = _moved(tokens, step, fill=NONE)
            number = number * (num_classes or 0) + token
            is_known &= token >= 0
        yield torch.where(is_known, number, NONE - 1 - positions)


def _listed(tokens: Tensor, is_match: Tensor) -> Tensor:
    """[B, T, K] the tokens [B, T] at offsets S - 1 to 0 where there is a match [B, T, S], -1 elsewhere.

    A CPU lists only the matches, which are few; an accelerator keeps all offsets, since telling the host the
    number of matches would be a synchronisation.
    """
    if tokens.device.type != "cpu" or torch.compiler.is_compiling():
        found = _looking_back(tokens, is_match.shape[-1], since=0)
        return found.masked_fill(~is_match, NONE)
    row, position, column = is_match.nonzero().unbind(-1)
    place = row * tokens.shape[-1] + position
    counts = place.bincount(minlength=tokens.numel())
    rank = torch.arange(len(place)) - (counts.cumsum(0) - counts)[place]
    listed = tokens.new_full((tokens.numel(), max(1, int(counts.max()))), NONE)
    listed[place, rank] = tokens[row, position - (is_match.shape[-1] - 1 - column)]
    return listed.view(*tokens.shape, -1)


def immediate_candidates(batch: TokenBatch, *, threshold: int) -> Tensor:
    """[N, 1] the last token, if it has come at least ``threshold`` times in a row.

    Args:
        batch: the batch.
        threshold: k >= 1 equal tokens.
    """
    tokens, segments = context(batch)
    is_repeated = tokens == _moved(tokens, 1, fill=NONE)
    if segments is not None:
        is_repeated &= segments == _moved(segments, 1, fill=NONE)
    is_run = tokens >= 0
    for step in range(threshold - 1):
        is_run = is_run & _moved(is_repeated, step, fill=False)
    return _candidates(batch, torch.where(is_run, tokens, NONE).unsqueeze(-1))


def early_eos_candidates(batch: TokenBatch, *, eos_token_id: int, min_length: int) -> Tensor:
    """[N, 1] the end of sequence, before ``min_length`` supervised tokens of the document.

    Args:
        batch: the batch.
        eos_token_id: the id of the end of sequence.
        min_length: the end is early before this many supervised tokens.

    Raises:
        ValueError: the id is outside the vocabulary.
    """
    if batch.num_classes is not None and eos_token_id >= batch.num_classes:
        raise ValueError(
            f"eos_token_id={eos_token_id} is no token of a vocabulary of V={batch.num_classes}; expected an "
            "id below that"
        )
    valid = batch.rows(batch.valid)
    seen = valid.cumsum(-1) - valid.long()  # supervised tokens of the row before this one
    if batch.segment_ids is not None:
        segments = batch.rows(batch.segment_ids)
        starts = segments != _moved(segments, 1, fill=NONE)
        starts[:, 0] = True
        at_start = torch.where(starts, seen, 0).cummax(-1).values
        seen = seen - at_start
    early = torch.where(seen < min_length, eos_token_id, NONE)
    return _candidates(batch, early.unsqueeze(-1))


def _candidates(batch: TokenBatch, ids: Tensor) -> Tensor:
    """Ids [B, T, K] as candidates [N, K]: each id once, never the target, and none at ignored positions."""
    ids = ids.reshape(len(batch.targets), -1)
    if ids.shape[-1] > 1:
        ids = ids.sort(-1, descending=True).values
        ids = ids.masked_fill(ids == _moved(ids, 1, fill=NONE), NONE)
    ids = ids.masked_fill(ids == batch.targets.unsqueeze(-1), NONE)
    if batch.pad_token_id is not None:
        ids = ids.masked_fill(ids == batch.pad_token_id, NONE)
    return ids.masked_fill(~batch.valid.unsqueeze(-1), NONE)


def _looking_back(values: Tensor, num_offsets: int, *, since: int = 1) -> Tensor:
    """[B, T, S] values[t - s] for S offsets s down to ``since``; -1 before the beginning."""
    padded = torch.nn.functional.pad(values, (num_offsets + since - 1, 0), value=NONE)
    return padded[:, : values.shape[-1] + num_offsets - 1].unfold(-1, num_offsets, 1)


def _moved(values: Tensor, by: int, *, fill: float | bool) -> Tensor:
    """values[:, t - by] at t, and ``fill`` at the beginning."""
    if by == 0:
        return values
    # not by slice assignment: Inductor's C++ for slices of masks does not compile (torch 2.13)
    positions = torch.arange(values.shape[1], device=values.device)
    is_before = (positions < by).reshape(-1, *[1] * (values.dim() - 2))
    return values.roll(by, 1).masked_fill(is_before, fill)
