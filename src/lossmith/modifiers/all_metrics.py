"""``metrics_of``: the metrics of several modifiers under one roof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lossmith.core.metrics import Metrics
from lossmith.modifiers.base import BaseLossModifier


def metrics_of(modifiers: Sequence[BaseLossModifier]) -> Metrics:
    """The metrics of the modifiers' last batch, as ``name.metric``; a second one of a name is ``name_2``.

    Raises:
        TypeError: a modifier whose metrics are no mapping.
    """
    everything = Metrics({})
    names: list[str] = []
    for modifier in modifiers:
        names.append(modifier.name)
        number = names.count(modifier.name)
        label = modifier.name if number == 1 else f"{modifier.name}_{number}"
        found = modifier.get_metrics()
        if not isinstance(found, Mapping):
            raise TypeError(f"{modifier.name}.get_metrics must return a mapping; got {type(found).__name__}")
        metrics = found if isinstance(found, Metrics) else Metrics(found)
        everything |= metrics.prefixed(f"{label}.")
    return everything
