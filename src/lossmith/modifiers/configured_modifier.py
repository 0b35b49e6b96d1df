"""``ConfiguredModifier``: a modifier whose parameters are declared, so that mistakes in them are errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from lossmith.metrics import Metrics, Source
from lossmith.modifiers.base import BaseLossModifier
from lossmith.options import read_options


@dataclass(frozen=True)
class NoSettings:
    """A modifier without parameters."""


class ConfiguredModifier(BaseLossModifier):
    """The base of lossmith's own modifiers.

    Args:
        config: ``enabled`` and the fields of ``Settings``, by name.

    Attributes:
        settings: the checked parameters.
        Settings: their declaration, a frozen dataclass.
        aliases: other names of parameters.
        prefix: what their keys begin with in a flat configuration.
        enabled_key: the key of ``enabled`` there.

    Raises:
        ValueError: an unknown parameter or a value out of range, by the name that the user gave.
        TypeError: a value of another type.
    """

    Settings: ClassVar[type] = NoSettings
    aliases: ClassVar[Mapping[str, str]] = {}
    prefix: ClassVar[str] = ""
    enabled_key: ClassVar[str] = ""

    settings: Any

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(config)
        own = {str(name): value for name, value in self.config.items() if name != "enabled"}
        self.settings = self.read_settings(own)

    @classmethod
    def read_settings(cls, values: Mapping[str, Any], key_of: Callable[[str], str] = str) -> Any:
        """The parameters of a mapping, checked; ``key_of`` is what the user calls one."""
        return read_options(cls.Settings, values, owner=cls.__name__, aliases=cls.aliases, key_of=key_of)

    def keep_metrics(self, metrics: Mapping[str, Source]) -> None:
        """Keep a batch's metrics, uncomputed; a compiled graph computes them with the rest."""
        compiling = torch.compiler.is_compiling()
        self._metrics = {n: v() if compiling and callable(v) else v for n, v in metrics.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_metrics": Metrics(self._metrics).to_dict()}  # computed, to be pickled

    def extra_repr(self) -> str:
        shown = {"enabled": self.enabled, **asdict(self.settings)}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
