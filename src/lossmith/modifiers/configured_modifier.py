"""``ConfiguredModifier``: a modifier whose parameters are declared, so that mistakes in them are errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from lossmith.core.former_names import OPTIONS
from lossmith.core.metrics import Metrics, Source
from lossmith.core.warn_user import warn_user
from lossmith.modifiers.base import BaseLossModifier, ModelMode
from lossmith.modifiers.idle import Seen
from lossmith.modifiers.option_names import settle
from lossmith.options import read_options


@dataclass(frozen=True)
class NoSettings:
    """A modifier without parameters."""


class ConfiguredModifier(BaseLossModifier):
    """The base of lossmith's own modifiers.

    Args:
        config: ``enabled`` and the fields of ``Settings``, by name.
        parameters: the same by name.

    Attributes:
        settings: the checked parameters; others may be put in their place, and are checked as well.
        Settings: their declaration, a frozen dataclass.
        aliases: other names of parameters.
        prefix: what their keys begin with in a flat configuration.
        enabled_key: the key of ``enabled`` there.
        modes: what it means something for.
        seen: what it remembers of the batches so far.

    Raises:
        ValueError: an unknown parameter or a value out of range, by the name that the user gave.
        TypeError: a value of another type.
    """

    Settings: ClassVar[type] = NoSettings
    aliases: ClassVar[Mapping[str, str]] = {}
    prefix: ClassVar[str] = ""
    enabled_key: ClassVar[str] = ""
    modes: ClassVar[tuple[ModelMode, ...]] = tuple(ModelMode)

    settings: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.prefix and "enabled_key" not in vars(cls):
            cls.enabled_key = f"{cls.prefix}enabled"

    def __init__(self, config: Mapping[str, Any] | None = None, **parameters: Any) -> None:
        super().__init__(config, **parameters)
        own = {str(name): value for name, value in self.config.items() if name != "enabled"}
        self.settings = self.read_settings(own)
        self.seen = Seen()

    def supports_mode(self, mode: ModelMode) -> bool:
        return ModelMode(mode) in self.modes

    @classmethod
    def read_settings(cls, values: Mapping[str, Any], key_of: Callable[[str], str] = str) -> Any:
        """The parameters of a mapping, checked; ``key_of`` is what the user calls one."""
        own, key_of = settle(
            values,
            owner=f"{cls.__name__}'s ",
            formers=OPTIONS.get(cls.__name__, {}),
            aliases=cls.aliases,
            defaults={spec.name: spec.default for spec in fields(cls.Settings)},
            key_of=key_of,
        )
        return read_options(cls.Settings, own, owner=cls.__name__, aliases=cls.aliases, key_of=key_of)

    # ── parameters are in settings, and checked there ─────────────────────────────────────────────

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "settings":
            value = self._checked(value)
        parameter = self._parameter(name)
        if parameter is not None and "settings" in vars(self):
            now = getattr(self.settings, parameter)
            if value is not now and (isinstance(value, Tensor) or value != now):
                raise AttributeError(
                    f"{self.name}.{name} would be without effect; write modifier.settings = "
                    f"dataclasses.replace(modifier.settings, {parameter}={value!r})"
                )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        parameter = self._parameter(name)
        if parameter is not None:
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}; it is settings.{parameter}"
            )
        return super().__getattr__(name)

    @classmethod
    def _parameter(cls, name: str) -> str | None:
        """The parameter that is called so, or was."""
        former = OPTIONS.get(cls.__name__, {}).get(name)
        known = getattr(cls.Settings, "__dataclass_fields__", {})
        return name if name in known else former.new if former else None

    def _checked(self, settings: Any) -> Any:
        if not isinstance(settings, self.Settings):
            raise TypeError(
                f"{self.name}.settings must be a {self.Settings.__qualname__}; got {settings!r}. "
                "Write modifier.settings = dataclasses.replace(modifier.settings, ...)"
            )
        return self.read_settings({spec.name: getattr(settings, spec.name) for spec in fields(self.Settings)})

    # ── what cannot act says so ───────────────────────────────────────────────────────────────────

    def idle_because(self, batch: Any) -> str | None:
        """Why it cannot act on this batch and those before it, and what to do, to be said once after the
        modifier's name; None where it can. It is asked once a batch, outside of compiled graphs."""
        return None

    def look_at(self, batch: Any) -> None:
        """Keep why the modifier cannot act on what it is given, and say it the first time."""
        if torch.compiler.is_compiling():
            return
        reason, is_told = self.idle_because(batch), "idle_reason" in vars(self)
        if reason is not None or is_told:
            self.idle_reason = reason
        if reason is not None and not is_told:
            warn_user(f"{self.name} {reason}")

    # ── metrics ───────────────────────────────────────────────────────────────────────────────────

    def keep_metrics(self, metrics: Mapping[str, Source]) -> None:
        """Keep a batch's metrics, uncomputed; a compiled graph computes them with the rest."""
        compiling = torch.compiler.is_compiling()
        self._metrics = {n: v() if compiling and callable(v) else v for n, v in metrics.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_metrics": Metrics(self._metrics).to_dict()}  # computed, to be pickled

    def extra_repr(self) -> str:
        shown = {"enabled": self.enabled, **asdict(self.settings)}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class BuiltInModifier(ConfiguredModifier):
    """The base of the kinds that a pipeline asks for more than :meth:`modify_loss`."""

    is_custom = False

    def modify_loss(
        self, logits: Tensor, targets: Tensor, loss: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The loss with this modifier alone; the arguments are those of
        :meth:`lossmith.LossModifierPipeline.modify_loss`."""
        from lossmith.modifiers.pipeline import LossModifierPipeline  # which applies modifiers

        return LossModifierPipeline([self]).modify_loss(logits, targets, loss, **kwargs)
