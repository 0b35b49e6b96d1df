"""``Metrics``: named numbers that cost nothing until they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from numbers import Real

import torch
from torch import Tensor

Source = Tensor | float | Callable[[], Tensor]


class Metrics(Mapping[str, float]):
    """Named numbers that stay on their device until they are read.

    Reading one is one synchronisation; :meth:`to_dict` reads all with one.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = dict(sources)

    def _value(self, name: str) -> Tensor | float:
        source = self._sources[name]
        value = source() if callable(source) else source
        if not isinstance(value, Tensor | Real):
            raise TypeError(f"metric {name!r} must be a number; got {type(value).__name__}")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"metric {name!r} must be one number; got a tensor {list(value.shape)}")
        return value.detach() if isinstance(value, Tensor) else float(value)

    def __getitem__(self, name: str) -> float:
        return float(self._value(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __repr__(self) -> str:
        return f"Metrics({', '.join(self)})"

    def __getstate__(self) -> dict[str, object]:
        """Plain numbers, for pickle and ``copy.deepcopy``."""
        return {"_sources": self.to_dict()}

    def prefixed(self, prefix: str) -> Metrics:
        """The same numbers, still unread, with ``prefix`` before each name."""
        return Metrics({prefix + name: source for name, source in self._sources.items()})

    def only(self, wanted: Callable[[str], bool]) -> Metrics:
        """The numbers with a wanted name, still unread; releases what the others would be computed from."""
        return Metrics({name: source for name, source in self._sources.items() if wanted(name)})

    def joined(self, other: Metrics) -> Metrics:
        """These and the other numbers, still unread; torch.compile of PyTorch 2.7 cannot trace ``|``."""
        return Metrics({**self._sources, **other._sources})

    def __or__(self, other: Metrics) -> Metrics:
        return self.joined(other)

    def to_dict(self) -> dict[str, float]:
        """All of them as floats, with one synchronisation per device."""
        values = {name: self._value(name) for name in self._sources}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        for device in {tensor.device for tensor in tensors.values()}:
            there = [name for name, tensor in tensors.items() if tensor.device == device]
            stacked = torch.stack([tensors[name].double().reshape(()) for name in there])
            values.update(zip(there, stacked.tolist(), strict=True))
        return values  # type: ignore[return-value]
