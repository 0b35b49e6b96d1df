"""Raw statistics of a whole vocabulary from those of its shards, in plain PyTorch on [R, N] tensors.

A shard is swept at the target where that is among its classes, and elsewhere at its first class, which is
then one more wrong answer. So the wrong answers of each shard are two pieces: that class, and what it
measured beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lossmith.engine.statistics.raw import ignored_fill

INF = float("inf")
# As in torch_rows: what is below counts as masked.
MASKED = -1e30


@dataclass(frozen=True, eq=False)
class Pieces:
    """The wrong answers of every row in 2 R pieces: first classes [R], then what was swept beside them [R].

    Attributes:
        raw: the shards' statistics [R, N], the candidates' [R, N, K].
        is_here: [R, N] whether the target is among a shard's classes.
        starts: [R, 1] the first class of each.
    """

    raw: Mapping[str, Tensor]
    is_here: Tensor
    starts: Tensor

    @property
    def first(self) -> Tensor:
        """[R, N] the logits of first classes that are wrong answers; -inf of others, and of masked ones."""
        logit = self.raw["target_logit"]
        return logit.masked_fill(self.is_here | (logit <= MASKED), -INF)

    @property
    def reference(self) -> Tensor:
        """[N] the largest wrong logit, from which everything is measured; 0 where there is none."""
        there = torch.where(self.raw["wrong_log_sum"] == -INF, -INF, self.raw["reference"])
        largest = torch.cat([self.first, there]).amax(0).detach()
        return largest.masked_fill(largest == -INF, 0.0)

    @property
    def moved(self) -> Tensor:
        """[R, N] how far a shard's reference is from that of all; 0 where it measured nothing."""
        apart = self.raw["reference"].detach() - self.reference
        return apart.masked_fill(self.raw["wrong_log_sum"] == -INF, 0.0)

    @property
    def log_sums(self) -> Tensor:
        """[2 R, N] log sum exp of each piece, from the reference of all."""
        return torch.cat([self.first - self.reference, self.raw["wrong_log_sum"] + self.moved])


def merged(
    raw: Mapping[str, Tensor],
    is_here: Tensor,
    starts: Tensor,
    valid: Tensor,
    has_candidate: Tensor | None = None,
) -> dict[str, Tensor]:
    """The raw statistics [N] of all classes, those that the shards' make up.

    Args:
        raw: the shards' [R, N], in which a row of one has its own gradient.
        is_here: [R, N] whether the target is among a shard's classes.
        starts: [R, 1] the first class of each.
        valid: [N] where there is a target.
        has_candidate: [R, N, K] whether a candidate is among a shard's classes, if there are any.
    """
    pieces = Pieces(raw, is_here, starts)
    log_sums = pieces.log_sums
    found = {
        "reference": pieces.reference,
        "target_logit": torch.where(is_here, raw["target_logit"], 0.0).sum(0),
        "wrong_log_sum": _log_sum(log_sums),
    }
    if "wrong_entropy" in raw:
        found["wrong_entropy"] = _entropy(raw["wrong_entropy"], log_sums, found["wrong_log_sum"])
    if "centered_sum" in raw:
        found |= _sums(pieces)
    if "top_wrong_logit" in raw:
        found |= _top(pieces, log_sums)
    if "candidate_logits" in raw:
        assert has_candidate is not None
        logits = torch.where(has_candidate, raw["candidate_logits"], 0.0).sum(0)
        found["candidate_logits"] = torch.where(has_candidate.any(0), logits, -INF)
    return {name: _where(valid, value, name) for name, value in found.items()}


def _log_sum(pieces: Tensor) -> Tensor:
    """logsumexp over pieces, with a gradient of 0 where there is nothing."""
    is_empty = (pieces == -INF).all(0)
    total = pieces.masked_fill(is_empty, 0.0).logsumexp(0)
    return total.masked_fill(is_empty, -INF)


def _entropy(own: Tensor, log_sums: Tensor, total: Tensor) -> Tensor:
    """[N] of a mixture: sum_p w_p (H_p - log w_p), w_p a piece's share of the sum."""
    is_there = log_sums != -INF
    log_share = torch.where(is_there, log_sums - torch.where(total == -INF, 0.0, total), 0.0)
    share = torch.where(is_there, log_share.exp(), 0.0)
    within = torch.cat([torch.zeros_like(own), own])
    return (share * (within - log_share)).sum(0)


def _sums(pieces: Pieces) -> dict[str, Tensor]:
    raw, wrong_first = pieces.raw, ~pieces.is_here
    of_first = torch.where(wrong_first, raw["target_weight"], 0.0)
    apart = torch.where(of_first == 0, 0.0, raw["target_logit"] - pieces.reference)
    centered = raw["centered_sum"] + raw["sum_weight"] * pieces.moved + of_first * apart
    return {
        "centered_sum": centered.sum(0),
        "sum_weight": (raw["sum_weight"] + of_first).sum(0),
        "target_weight": torch.where(pieces.is_here, raw["target_weight"], 0.0).sum(0),
        "num_finite": raw["num_finite"].sum(0),
    }


def _top(pieces: Pieces, log_sums: Tensor) -> dict[str, Tensor]:
    """The largest wrong logit, its id, the lowest of equals, and the log sum of the others."""
    raw, starts = pieces.raw, pieces.starts
    num_shards = len(raw["top_wrong_logit"])
    ids = torch.cat([starts.expand_as(raw["top_wrong_id"]), raw["top_wrong_id"] + starts])
    logits = torch.cat([pieces.first, raw["top_wrong_logit"].masked_fill(raw["top_wrong_id"] < 0, -INF)])
    largest = logits.detach().amax(0)
    is_top = (logits.detach() == largest) & (largest > -INF)
    lowest = torch.where(is_top, ids, torch.iinfo(ids.dtype).max).amin(0)
    place = (is_top & (ids == lowest)).long().argmax(0, keepdim=True)
    is_any = is_top.any(0)
    found = {
        "top_wrong_logit": logits.gather(0, place).squeeze(0),
        "top_wrong_id": torch.where(is_any, lowest, -1),
    }
    if "rest_log_sum" in raw:
        without = torch.cat([torch.full_like(pieces.first, -INF), raw["rest_log_sum"] + pieces.moved])
        index = torch.arange(2 * num_shards, device=place.device).unsqueeze(1)
        found["rest_log_sum"] = _log_sum(torch.where((index == place) & is_any, without, log_sums))
    return found


def _where(valid: Tensor, value: Tensor, name: str) -> Tensor:
    valid = valid if value.dim() == 1 else valid.unsqueeze(-1)
    return torch.where(valid, value, ignored_fill(name))
