"""``Metrics``: numbers to look at, which cost nothing until somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


class Metrics(Mapping[str, float]):
    """Named numbers that stay on their device until they are read.

    Reading one is one synchronisation; :meth:`to_dict` reads all with one.
    """

    def __init__(self, sources: Mapping[str, Tensor | Callable[[], Tensor]]) -> None:
        self._sources = dict(sources)

    def _tensor(self, name: str) -> Tensor:
        source = self._sources[name]
        return (source if isinstance(source, Tensor) else source()).detach()

    def __getitem__(self, name: str) -> float:
        return float(self._tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def to_dict(self) -> dict[str, float]:
        """All of them as floats, with one synchronisation."""
        if not self._sources:
            return {}
        tensors = [self._tensor(name).double().reshape(()) for name in self._sources]
        return dict(zip(self._sources, torch.stack(tensors).tolist(), strict=True))
