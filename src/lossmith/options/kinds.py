"""``Kind``: the values that an option can take, read once from its annotation."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from torch import Tensor

from lossmith.options import forms
from lossmith.options.forms import Form, Option, WrongForm

# Messages show these values; for anything else the type says more.
PLAIN = (str, bytes, tuple, list, set, dict)
SEVERAL = (Sequence, Iterable, Collection, list, tuple)


def option(
    meaning: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    finite: bool | None = None,
    shape: str | None = None,
    dtype: Literal["floating", "real"] | None = None,
    advice: str | None = None,
    instead: Mapping[str, str] | None = None,
) -> Option:
    """Declare an option next to its type: ``eps: Annotated[float, option("added to it", above=0)] = 1e-6``.

    Numbers must be finite unless ``finite`` is False. An outer declaration overrides an inner one.

    Args:
        meaning: one line for help and documentation.
        low, high: the range of a number, or of each of several; the bounds are allowed.
        above, below: likewise, but the bounds are not allowed.
        choices: of a text, if its type does not list them.
        finite: False lets infinite numbers through; True checks a tensor's values, as a range does.
        shape: of a tensor, such as ``[V]``; ``[]`` is one number, whatever its dimensions.
        dtype: of a tensor, ``floating``, or ``real`` for anything but bool and complex.
        advice: what to do about a mistake, in a sentence.
        instead: texts outside the choices, and what to write in place of each.
    """
    return Option(meaning, low, above, high, below, choices, finite, shape, dtype, advice, instead)


@dataclass(frozen=True)
class Kind:
    """The values that one option can take.

    Attributes:
        name: the option's name.
        forms: the forms that the value can take.
        declared: what it declares besides its type.
        said: the forms in words: "a number or None".
        expected: with their limits: "a number > 0 or None".
        limits: the limits alone, as they follow "expected NAME".
        fits: whether a value needs no conversion; see :class:`lossmith.options.forms.Form`.
    """

    name: str
    forms: tuple[Form, ...]
    declared: Option
    said: str
    expected: str
    limits: str
    fits: Callable[[Any], bool]

    def take(self, value: Any, *, as_written: bool = False) -> Any:
        """Convert a value to one of the forms, whether within the limits or not.

        Args:
            value: the user's value.
            as_written: it comes from a file or a flag, where a whole number may be 1e3, and ids a text.

        Raises:
            WrongForm: it fits none of the forms.
        """
        return self._taken(value, as_written)[1]

    def holds(self, value: Any) -> bool:
        """Whether a value that was taken is within the limits."""
        form, taken = self._taken(value)
        return form.holds(taken)

    def check(self, value: Any) -> Any:
        """:meth:`read`, quick if the value needs no conversion."""
        return value if self.fits(value) else self.read(value)

    def read(self, value: Any, owner: str = "") -> Any:
        """Convert and check a value.

        Args:
            value: the user's value.
            owner: whose option it is, for the message.

        Raises:
            TypeError: it has the wrong type.
            ValueError: it is out of range.
        """
        whose = f"{owner}: {self.name}" if owner else self.name
        instead = self.declared.instead or {}
        if isinstance(value, str) and value in instead:
            advice = f"; write {instead[value]}"
        else:
            advice = f". {self.declared.advice}" if self.declared.advice else ""
        try:
            form, taken = self._taken(value)
        except WrongForm as wrong:
            came = type_shown(wrong.came)
            raise TypeError(f"{whose} must be {self.expected}; got {came}{advice}") from None
        if not form.holds(taken):
            raise ValueError(f"{whose} must be {self.expected}; got {value_shown(value)}{advice}")
        return taken

    def _taken(self, value: Any, as_written: bool = False) -> tuple[Form, Any]:
        wrong = WrongForm(value)
        for form in self.forms:
            for given in (value, form.as_written(value)) if as_written else (value,):
                try:
                    return form, form.take(given)
                except WrongForm as found:  # noqa: PERF203
                    # of several values, show only the wrong one
                    wrong = wrong if found.came is given else found
        raise wrong


def kind_of(hint: Any, name: str) -> Kind:
    """The values that an annotation allows."""
    members = _members(hint, Option())
    given = tuple(_form_of(bare, declared, name) for bare, declared in members)
    return Kind(
        name,
        given,
        _together(declared for _, declared in members),
        _listed([word for form in given for word in form.words]),
        _expected(given),
        next((form.limits for form in given if form.limits), ""),
        _fits_one_of(given),
    )


def plain_type(hint: Any) -> Any:
    """An annotation without its declaration; a Literal of texts becomes str."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return plain_type(arguments[0])
    if origin in (Union, types.UnionType):
        return Union[tuple(plain_type(each) for each in arguments)]  # noqa: UP007
    return str if origin is Literal else hint


def type_shown(value: Any) -> str:
    """A value of the wrong type, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text, kind = _text(value), type(value).__name__
    return text if text in ("None", kind) else f"{text} ({kind})"


def value_shown(value: Any) -> str:
    """A value out of range, in a few words."""
    if not isinstance(value, Tensor):
        return _text(value)
    if value.numel() == 0:
        return type_shown(value)
    smallest, largest = (bound.item() for bound in value.detach().aminmax())
    span = f"of {smallest}" if value.numel() == 1 else f"with numbers from {smallest} to {largest}"
    return f"a tensor {list(value.shape)} {span}"


def _text(value: Any) -> str:
    """A value's repr if that is short; else its type."""
    with contextlib.suppress(ValueError):  # an int may have too many digits
        text = repr(value) if value is None or isinstance(value, (*PLAIN, Number)) else ""
        if 0 < len(text) <= 60:
            return text
    return type(value).__name__


def _members(hint: Any, outer: Option) -> list[tuple[Any, Option]]:
    """The members of a union, however nested, each with its declaration; literal texts become one member."""
    if get_origin(hint) is Annotated:
        inner, *extras = get_args(hint)
        own = [extra for extra in reversed(extras) if isinstance(extra, Option)]  # outermost first
        return _members(inner, _together([outer, *own]))
    if get_origin(hint) not in (Union, types.UnionType):
        return [(hint, outer)]
    found = [member for each in get_args(hint) for member in _members(each, outer)]
    texts = [(bare, own) for bare, own in found if get_origin(bare) is Literal]
    if len(texts) < 2:
        return found
    one = Literal[tuple(choice for bare, _ in texts for choice in get_args(bare))]  # type: ignore[valid-type]
    return [(one, _together(own for _, own in texts)), *(member for member in found if member not in texts)]


def _together(declared: Iterable[Option]) -> Option:
    """All declarations merged; where two conflict, the first wins."""
    together = Option()
    for each in declared:
        together = together.over(each)
    return together


def _form_of(hint: Any, declared: Option, name: str) -> Form:
    """The form of an annotation that is not a union."""
    origin, arguments = get_origin(hint), get_args(hint)
    of_numbers = {int: forms.whole_number, float: forms.number}
    if origin is Literal:
        return forms.text(Option(choices=arguments).over(declared))
    if origin is tuple and arguments == (float, float):
        return forms.pair(forms.number(declared), declared)
    if origin in SEVERAL:
        if arguments[0] in of_numbers:
            return forms.several(of_numbers[arguments[0]](declared), declared)
        if arguments[0] is str:
            return forms.several(forms.text(Option()), declared)
        return forms.objects(arguments[0])
    if hint in of_numbers:
        return of_numbers[hint](declared)
    if hint is bool:
        return forms.switch()
    if hint is str:
        return forms.text(declared)
    if hint is Tensor:
        return forms.tensor(declared, name)
    if hint is type(None):
        return forms.nothing()
    kind = origin if origin is not None else hint
    return forms.instance(kind) if isinstance(kind, type) and kind is not Any else forms.anything()


def _fits_one_of(given: Sequence[Form]) -> Callable[[Any], bool]:
    """One test for several forms. None goes first: the test is instant, and most calls leave it at None."""
    tests = [form.fits for form in given if form.words != ("None",)]
    first, *rest = tests
    if len(tests) < len(given):
        return lambda value: value is None or first(value) or any(test(value) for test in rest)
    return (lambda value: first(value) or any(test(value) for test in rest)) if rest else first


def _expected(given: Sequence[Form]) -> str:
    """The forms in words with their limits, which are stated once if all forms share them."""
    limited = {form.expected.removeprefix(form.words[0]).strip() for form in given if form.limits}
    if len(limited) == 1 and sum(bool(form.limits) for form in given) > 1:
        return f"{_listed([word for form in given for word in form.words])}, {limited.pop()}"
    return _listed([word for form in given for word in ((form.expected,) if form.limits else form.words)])


def _listed(words: list[str]) -> str:
    """Words listed as in a sentence."""
    words = list(dict.fromkeys(words))
    if len(words) == 1:
        return words[0]
    comma = "," if any(" and " in word or "," in word for word in words) else ""
    return f"{', '.join(words[:-1])}{comma} or {words[-1]}"
