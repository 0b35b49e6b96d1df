"""The raw statistics that the engine computes, and the groups that they come in.

They are measured from each row's largest wrong logit (``reference``): see ``torch_rows``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntFlag

import torch
from torch import Tensor


class Needs(IntFlag):
    """Groups of statistics that are computed together; ``CORE`` always is."""

    CORE = 0
    ENTROPY = 1  # wrong_entropy
    SUM = 2  # centered_sum and sum_weight of the wrong answers, target_weight, num_finite
    TOP = 4  # top_wrong_logit, top_wrong_id
    COUNT = 8  # num_wrong
    CANDIDATES = 16  # candidate_logits, rest_log_sum (and TOP, whose id tells them apart)


CORE_NAMES = ("reference", "target_logit", "wrong_log_sum")
GROUP_NAMES: dict[Needs, tuple[str, ...]] = {
    Needs.ENTROPY: ("wrong_entropy",),
    Needs.SUM: ("centered_sum", "sum_weight", "target_weight", "num_finite"),
    Needs.TOP: ("top_wrong_logit", "top_wrong_id"),
    Needs.COUNT: ("num_wrong",),
    Needs.CANDIDATES: ("candidate_logits", "rest_log_sum"),
}
GROUP_OF = {name: group for group, names in GROUP_NAMES.items() for name in names} | dict.fromkeys(
    CORE_NAMES, Needs.CORE
)

# What has no gradient.
CONSTANTS = frozenset(("reference", "sum_weight", "target_weight", "num_finite", "top_wrong_id", "num_wrong"))


def closed(needs: Needs) -> Needs:
    """The groups that computing ``needs`` takes."""
    return needs | Needs.TOP if needs & Needs.CANDIDATES else needs


def _names_of(needs: Needs) -> tuple[str, ...]:
    groups = closed(needs)
    return CORE_NAMES + tuple(n for group, names in GROUP_NAMES.items() if group & groups for n in names)


_NAMES = [_names_of(Needs(bits)) for bits in range(2 ** len(GROUP_NAMES))]


def raw_names(needs: Needs | int) -> tuple[str, ...]:
    """Names of the raw statistics of these groups, in the engine's order."""
    return _NAMES[int(needs)]


def raw_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a raw statistic of logits computed in ``dtype``."""
    return torch.int64 if name == "top_wrong_id" else dtype


def ignored_fill(name: str) -> float | int:
    """What an ignored row has: a token that the model gets right with certainty."""
    if name == "top_wrong_id":
        return -1
    return float("-inf") if name in ("wrong_log_sum", "rest_log_sum", "candidate_logits") else 0.0


@dataclass
class View:
    """The statistics to compute of the logits over one temperature (None: of the logits themselves).

    Going forward ``raw`` is filled in; going back, ``grads`` are the gradients of some of it.
    """

    temperature: Tensor | None
    needs: Needs
    raw: dict[str, Tensor]
    grads: dict[str, Tensor] = field(default_factory=dict)
