"""``ConfiguredModifier``: a modifier with declared parameters, so that mistakes in them are errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from lossmith.core.former_names import OPTIONS, Former, say_former
from lossmith.core.metrics import Metrics, Source
from lossmith.core.warn_user import warn_user
from lossmith.modifiers.base import BaseLossModifier, ModelMode
from lossmith.modifiers.idle import Seen
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
        settings: the checked parameters; values assigned to it are checked as well.
        Settings: their declaration, a frozen dataclass.
        aliases: other names of parameters.
        prefix: the prefix of their keys in a flat configuration.
        enabled_key: the key of ``enabled`` there.
        modes: the modes that it applies to.
        seen: what it remembers of the batches so far.

    Raises:
        ValueError: an unknown parameter or a value out of range, by the name that the user gave.
        TypeError: a value of the wrong type.
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
        return ModelMode.of(mode) in self.modes

    @classmethod
    def read_settings(cls, values: Mapping[str, Any], key_of: Callable[[str], str] = str) -> Any:
        """The parameters of a mapping, checked; ``key_of`` gives the user's name for one."""
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
        """The parameter with this name or former name."""
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
        """Why it cannot act on this batch and those before it, and what to do; None if it can. A warning
        gives the reason once, after the modifier's name. Called once per batch, outside compiled graphs."""
        return None

    def look_at(self, batch: Any) -> None:
        """Record why the modifier cannot act on this batch, and warn the first time."""
        if torch.compiler.is_compiling():
            return
        reason, is_told = self.idle_because(batch), "idle_reason" in vars(self)
        if reason is not None or is_told:
            self.idle_reason = reason
        if reason is not None and not is_told:
            warn_user(f"{self.name} {reason}")

    # ── metrics ───────────────────────────────────────────────────────────────────────────────────

    def keep_metrics(self, metrics: Mapping[str, Source]) -> None:
        """Store a batch's metrics without computing them; a compiled graph computes them with the rest."""
        compiling = torch.compiler.is_compiling()
        self._metrics = {n: v() if compiling and callable(v) else v for n, v in metrics.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_metrics": Metrics(self._metrics).to_dict()}  # computed, to be pickled

    def extra_repr(self) -> str:
        shown = {"enabled": self.enabled, **asdict(self.settings)}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class BuiltInModifier(ConfiguredModifier):
    """The base of modifiers of which a pipeline calls more than :meth:`modify_loss`."""

    is_custom = False

    def modify_loss(
        self, logits: Tensor, targets: Tensor, loss: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The loss with only this modifier applied; the arguments are those of
        :meth:`lossmith.LossModifierPipeline.modify_loss`."""
        from lossmith.modifiers.pipeline import LossModifierPipeline  # pipeline imports this module

        return LossModifierPipeline([self]).modify_loss(logits, targets, loss, **kwargs)


def settle(
    values: Mapping[str, Any],
    *,
    owner: str,
    formers: Mapping[str, Former],
    aliases: Mapping[str, str],
    defaults: Mapping[str, Any],
    key_of: Callable[[str], str] = str,
) -> tuple[dict[str, Any], Callable[[str], str]]:
    """The options of a mapping, each once, with former names translated; and the user's name for each.

    A configuration may hold two names of one option, if a file of defaults has one and the user wrote the
    other. Then the value that equals the default gives way.

    Args:
        values: the options by any of their names; other entries are left alone.
        owner: the prefix of a former name in messages.
        formers: the replacements of former names.
        aliases: other names of options.
        defaults: the options' defaults.
        key_of: gives the user's name for an option.

    Raises:
        ValueError: an option that no longer exists, or two names of one with different values.
    """
    found: dict[str, tuple[str, Any]] = {}  # option -> the name that the user gave it, and the value
    for given, value in values.items():
        name, former = aliases.get(given, given), formers.get(given)
        if former is not None and former.new is None:
            if type(value) is not type(former.always) or value != former.always:
                raise ValueError(f"{owner}{given}={value!r} is gone; write {former.write}")
            continue
        if former is not None and former.new is not None:
            say_former(f"{owner}{given}", former.write)
            name = former.new
            value = value if former.convert is None else former.convert(value)
        if name in found and name in defaults:
            found[name] = _preferred(found[name], (given, value), defaults[name], key_of)
        else:
            found[name] = given, value
    # a converted value is not what the user gave, so a mistake in it is reported under the new name
    spelled = {n: given for n, (given, _) in found.items() if given in formers and not formers[given].convert}
    kept = {name if given in formers else given: value for name, (given, value) in found.items()}
    return kept, lambda name: key_of(spelled.get(name, name))


def _preferred(
    first: tuple[str, Any], second: tuple[str, Any], default: Any, key_of: Callable[[str], str]
) -> tuple[str, Any]:
    """Of two names of an option with their values, the one whose value is not the default."""
    (one, value), (other, another) = first, second
    if _agree(value, another) or _agree(another, default):
        return first
    if _agree(value, default):
        return second
    raise ValueError(
        f"{key_of(one)} and {key_of(other)} are names of one option; got {value!r} and {another!r}; "
        "give one of them"
    )


def _agree(one: Any, other: Any) -> bool:
    """Whether two values are the same; a bool does not equal a number."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return tuple(one) == tuple(other)
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
