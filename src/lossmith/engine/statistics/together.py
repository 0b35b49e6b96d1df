"""Statistics that were announced, derived from the raw ones in one step when the first of them is read."""

from __future__ import annotations

from collections.abc import Container, Sequence

from torch import Tensor

from lossmith.engine.statistics.raw_stats import RawStats
from lossmith.engine.tokens.arithmetic import is_one_step
from lossmith.engine.tokens.derivation import DERIVED, Derivation
from lossmith.engine.tokens.family import CrossEntropyFamily, FamilyTerms


def family_together(
    raw: RawStats, family: CrossEntropyFamily, target_weight: Tensor | None, *, is_detached: bool
) -> Tensor | None:
    """The terms [K, N] of a family; None where they are not made in one step.

    Args:
        raw: what they are made of.
        family: which terms.
        target_weight: [N] class weights of the targets, or None.
        is_detached: they have no gradients.
    """
    sweep = raw.sweep
    if not is_one_step(raw.read(0, "reference"), sweep.backend):
        return None
    terms = FamilyTerms(
        family, sweep.targets, target_weight, sweep.ignore_index, raw.has_temperature, sweep.backend
    )
    return terms.of(_read(raw, terms.made_of, is_detached))


def derived_together(
    raw: RawStats, view: int, name: str, known: Container[str], *, is_detached: bool
) -> dict[str, Tensor] | None:
    """A statistic [N], with all that were announced; None where it is not derived in one step.

    Args:
        raw: what they are made of.
        view: the temperature that they are of.
        name: of the one that is read.
        known: what need not come along.
        is_detached: they have no gradients.
    """
    sweep = raw.sweep
    if name == "candidate_log1m_prob" and sweep.candidates is None:
        return None  # the formula says what is missing
    if name not in DERIVED or not is_one_step(raw.read(view, DERIVED[name][0]), sweep.backend):
        return None
    # what was not fetched along would take a pass of its own
    names = tuple(
        n
        for n in DERIVED
        if n == name or (n in raw.announced[view] and n not in known and raw.holds(view, DERIVED[n]))
    )
    candidates = sweep.candidates if "candidate_log1m_prob" in names else None
    derivation = Derivation(names, sweep.targets, candidates, sweep.ignore_index, sweep.backend)
    made_of = ((), derivation.made_of) if view else (derivation.made_of,)
    return derivation.of(_read(raw, made_of, is_detached))


def _read(raw: RawStats, names: Sequence[Sequence[str]], is_detached: bool) -> list[Tensor]:
    """The named raw statistics, of one temperature after the other."""
    values = [raw.read(view, name) for view, own in enumerate(names) for name in own]
    return [value.detach() for value in values] if is_detached else values
