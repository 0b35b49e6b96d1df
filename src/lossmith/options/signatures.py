"""``strict_options``: checks every call against the annotated signature."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints, overload

from torch import Tensor

from lossmith.options.kinds import Kind, kind_of, plain_type
from lossmith.options.matching import unknown_option

C = TypeVar("C", bound=Callable[..., Any])


@dataclass(frozen=True)
class Declared:
    """One option as a signature or a dataclass declares it.

    Attributes:
        name: the option's name.
        default: its default; MISSING if the option is required.
        hint: its annotation.
        kind: the values that it can take.
    """

    name: str
    default: Any
    hint: Any
    kind: Kind

    @property
    def type(self) -> Any:
        """Its annotation alone; a Literal of texts becomes str."""
        return plain_type(self.hint)

    @property
    def meaning(self) -> str:
        """One line on what it is for."""
        return self.kind.declared.meaning

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The allowed texts, or None."""
        return next((form.choices for form in self.kind.forms if form.choices), None)


def options_of(owner: Any) -> dict[str, Declared]:
    """The options of a strict function, a strict class or a dataclass of options, by name.

    Example:
        >>> import lossmith
        >>> from lossmith.options import options_of
        >>> declared = options_of(lossmith.cross_entropy)["label_smoothing"]
        >>> declared.default, declared.kind.expected
        (0.0, 'a number >= 0 and < 1')
    """
    found = getattr(owner.__init__ if isinstance(owner, type) else owner, "__options__", None)
    if found is not None:
        return dict(found)
    if not is_dataclass(owner):
        raise TypeError(f"{owner!r} declares no options")
    return dict(_of_fields(owner))


@functools.cache  # an annotation is read once
def _of_fields(owner: Any) -> dict[str, Declared]:
    hints = get_type_hints(owner, include_extras=True)
    return {
        spec.name: Declared(spec.name, spec.default, hints[spec.name], kind_of(hints[spec.name], spec.name))
        for spec in fields(owner)
    }


@overload
def strict_options(owner: C, /) -> C: ...
@overload
def strict_options(*, also: Any = None, name: str | None = None) -> Callable[[C], C]: ...
def strict_options(owner: Any = None, /, *, also: Any = None, name: str | None = None) -> Any:
    """Check every call of a function, a method or a class against its annotated signature.

    The error for an unknown option names the nearest; the error for a value of the wrong type or out of range
    says what is expected. NumPy scalars count as numbers; bools do not. Tensors without a declaration are
    data and are not checked, nor are arguments without an annotation.

    Args:
        owner: the function; or a dataclass, for its constructor.
        also: a strict function or class that further options are passed on to; they are checked too.
        name: its name in messages; by default its own name, or that of the class being made. If empty,
            messages begin with the option.

    Raises:
        TypeError: from the wrapped function: an unknown option, or a value of the wrong type.
        ValueError: likewise: a value out of range.
    """
    if owner is None:
        return functools.partial(_strict, also=also, name=name)
    return _strict(owner, also, name)


def _strict(owner: Any, also: Any, name: str | None) -> Any:
    further = {} if also is None else options_of(also)
    hints = get_type_hints(owner, include_extras=True)
    if not isinstance(owner, type):
        return _checked(owner, hints, further, name)
    owner.__init__ = _checked(owner.__init__, hints, further, name)  # of a dataclass
    return owner


def _checked(
    function: Callable[..., Any], hints: Mapping[str, Any], further: Mapping[str, Declared], said: str | None
) -> Any:
    parameters = list(inspect.signature(function).parameters.values())
    is_method = bool(parameters) and parameters[0].name == "self"
    named = [p for p in parameters[is_method:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    options = {**further, **{p.name: _declared(p, hints.get(p.name)) for p in named}}
    takes_any = not further and any(p.kind is p.VAR_KEYWORD for p in parameters)
    by_position = ["self"] * is_method + [p.name for p in named if p.kind is not p.KEYWORD_ONLY]
    fits = {name: spec.kind.fits for name, spec in options.items()}
    fits_by_position = [fits.get(name, _is_there) for name in by_position]

    def mended(name: str, value: Any, args: tuple[Any, ...]) -> Any:
        """A converted value that fits; or an error that says why it cannot."""
        own = type(args[0]).__name__ if function.__name__ == "__init__" else function.__qualname__
        owner = own if said is None else said
        if name in options:
            return options[name].kind.read(value, owner)
        if takes_any or name == "self":
            return value
        raise TypeError(unknown_option(owner, name, options))

    # torch.compile must be able to trace what every call runs, so the closure holds no class of ours.
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for fit, value in zip(fits_by_position, args):  # noqa: B905, PyTorch to 2.9 takes False for True
            if not fit(value):
                found = (mended(name, given, args) for name, given in zip(by_position, args, strict=False))
                args = (*found, *args[len(by_position) :])
                break
        for name, value in kwargs.items():
            fit = fits.get(name)
            if fit is None or not fit(value):
                kwargs[name] = mended(name, value, args)
        return function(*args, **kwargs)

    checked.__options__ = options  # type: ignore[attr-defined]
    if further:
        checked.__signature__ = _with_further(function, further)  # type: ignore[attr-defined]
    return checked


def _with_further(function: Callable[..., Any], further: Mapping[str, Declared]) -> inspect.Signature:
    """The signature with ``**options`` replaced by the options that are passed on."""
    signature = inspect.signature(function)
    own = {name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
    listed = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=spec.hint, default=spec.default)
        for name, spec in further.items()
        if name not in own
    ]
    return signature.replace(parameters=[*own.values(), *listed])


def _declared(parameter: inspect.Parameter, hint: Any) -> Declared:
    default = MISSING if parameter.default is parameter.empty else parameter.default
    is_data = hint is None or hint is Tensor
    return Declared(parameter.name, default, hint, kind_of(Any if is_data else hint, parameter.name))


def _is_there(self: Any) -> bool:
    return True
