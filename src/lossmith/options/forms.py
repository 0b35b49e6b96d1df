"""``Form``: one form that a value can take (a number, a tensor, one of a few words) and its limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from os import PathLike
from typing import Any

import torch
from torch import Tensor

# In the arithmetic of a loss, larger numbers are infinite and smaller ones are 0.
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
INT_64 = torch.iinfo(torch.int64)


@dataclass(frozen=True)
class Option:
    """What an option declares besides its type; see :func:`lossmith.options.option`."""

    meaning: str = ""
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None
    finite: bool | None = None
    shape: str | None = None
    dtype: str | None = None
    advice: str | None = None
    instead: Mapping[str, str] | None = field(default=None, hash=False)  # annotations must be hashable

    def over(self, other: Option) -> Option:
        """This declaration, with gaps filled from the other one."""
        said = {name: value for name, value in vars(self).items() if value not in (None, "")}
        return replace(other, **said)

    @property
    def limits(self) -> str:
        """The range in words."""
        bounds = ((">=", self.low), (">", self.above), ("<=", self.high), ("<", self.below))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


class WrongForm(TypeError):
    """A value, or an item of it, that has none of the allowed forms."""

    @property
    def came(self) -> Any:
        """The value that came."""
        return self.args[0]


@dataclass(frozen=True)
class Form:
    """One form that a value can take.

    Attributes:
        words: what it is, without its limits; `True` and `False` are two.
        expected: what it is, with its limits.
        limits: what follows "expected NAME".
        take: converts a value that is nearly in this form, such as a NumPy scalar; or raises WrongForm.
        holds: whether a value that was taken is within the limits.
        fits: whether a value already has this form and is within the limits. It runs in every call, so it is
            quick, and may reject what ``take`` can convert.
        as_written: converts the spelling of a file or a flag to a value in this form; returns what it does
            not know unchanged.
        choices: the allowed texts, if they are few.
        example: one value, for messages.
    """

    words: tuple[str, ...]
    expected: str
    limits: str
    take: Callable[[Any], Any]
    holds: Callable[[Any], bool]
    fits: Callable[[Any], bool]
    as_written: Callable[[Any], Any] = lambda value: value
    choices: tuple[str, ...] | None = None
    example: Any = None


def number(declared: Option) -> Form:
    """A float; whole numbers count, bools do not."""
    low, high = _bounds(declared)

    def fits(value: Any) -> bool:
        kind = type(value)
        return (kind is float or kind is int) and low <= value <= high

    def take(value: Any) -> float:
        value = _scalar(value)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise WrongForm(value)
        try:
            return float(value)
        except OverflowError:
            raise WrongForm(value) from None

    expected = f"a number {declared.limits}" if declared.limits else "a finite number"
    limits = declared.limits or "to be finite"
    return Form(("a number",), expected, limits, take, lambda v: low <= v <= high, fits, example=0.5)


def whole_number(declared: Option) -> Form:
    """A 64-bit int; bools do not count."""
    low, high = _whole_bounds(declared)

    def fits(value: Any) -> bool:
        return type(value) is int and low <= value <= high

    def take(value: Any) -> int:
        value = _scalar(value)
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise WrongForm(value)
        return int(value)

    def as_written(value: Any) -> Any:
        """A whole number may be spelled 3.0 or 1e3."""
        return int(value) if isinstance(value, float) and value.is_integer() else value

    expected = f"a whole number {declared.limits}".strip()
    limits = declared.limits or "to have 64 bits"
    return Form(
        ("a whole number",), expected, limits, take, lambda v: low <= v <= high, fits, as_written, example=2
    )


def switch() -> Form:
    """True or False, and nothing that merely behaves like one."""

    def take(value: Any) -> bool:
        value = _scalar(value)
        if not isinstance(value, bool):
            raise WrongForm(value)
        return value

    return Form(
        ("True", "False"),
        "True or False",
        "",
        take,
        _anything,
        lambda v: v is True or v is False,
        example=True,
    )


def text(declared: Option) -> Form:
    """A text, or one of a few texts; a path counts."""
    choices = declared.choices

    def take(value: Any) -> str:
        if not isinstance(value, str | PathLike):
            raise WrongForm(value)
        return str(value)

    if choices is None:
        return Form(("text",), "text", "", take, _anything, lambda v: isinstance(v, str), example="text")
    one_of = f"one of {', '.join(map(repr, choices))}"
    return Form(
        (one_of,),
        one_of,
        one_of,
        take,
        lambda value: value in choices,
        lambda value: type(value) is str and value in choices,
        choices=choices,
        example=choices[0],
    )


def nothing() -> Form:
    """None."""

    def take(value: Any) -> None:
        if value is not None:
            raise WrongForm(value)

    return Form(("None",), "None", "", take, _anything, lambda value: value is None)


def tensor(declared: Option, name: str) -> Form:
    """A tensor of the dtype, shape and range that are declared, if any."""
    dtype, shape = declared.dtype, declared.shape
    dims = None if shape is None else len([size for size in shape.strip("[]").split(",") if size.strip()])
    looks = declared.finite is True or bool(declared.limits)
    words = "a tensor of one number" if dims == 0 else " ".join(filter(None, (TENSORS[dtype], shape)))
    values = declared.limits if declared.limits or not looks else "without NaN and infinity"
    expected = f"{words} {values}".strip()
    low, high = _bounds(declared)

    def has_form(value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        if dtype == "floating":
            return value.is_floating_point()
        return dtype is None or not (value.dtype is torch.bool or value.is_complex())

    def holds(value: Tensor) -> bool:
        if dims is not None and (value.numel() != 1 if dims == 0 else value.dim() != dims):
            return False
        return not looks or _all_within(value, low, high, f"{name} must be {expected}")

    def take(value: Any) -> Tensor:
        if not has_form(value):
            raise WrongForm(value)
        return value

    return Form((words,), expected, values, take, holds, lambda value: has_form(value) and holds(value))


TENSORS = {None: "a tensor", "floating": "a floating-point tensor", "real": "a tensor of numbers"}


def several(item: Form, declared: Option) -> Form:
    """Any number of items."""
    are_ids = item.words == ("a whole number",)
    words = "token ids" if are_ids else f"a list of {item.words[0].removeprefix('an ').removeprefix('a ')}s"
    item_fits, item_holds, item_take = item.fits, item.holds, item.take

    def take(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping | Tensor):
            raise WrongForm(value)
        return tuple(item_take(each) for each in value)

    def as_written(value: Any) -> Any:
        """Ids may be a text with commas, or a single id."""
        if are_ids and isinstance(value, str):
            parts = [part.strip() for part in value.strip("[]() ").split(",") if part.strip()]
            return [int(part) if part.lstrip("-").isdigit() else part for part in parts]
        return [value] if are_ids and type(value) is int else value

    return Form(
        (words,),
        f"{words} {declared.limits}".strip(),
        declared.limits or "to be finite",
        take,
        lambda value: all(item_holds(each) for each in value),
        lambda value: type(value) in (tuple, list) and all(item_fits(each) for each in value),
        as_written,
        example=[0, 1, 2] if are_ids else [0.5, 0.25, 0.25],
    )


def pair(item: Form, declared: Option) -> Form:
    """Two numbers, lowest and highest."""
    items = several(item, declared)

    def take(value: Any) -> tuple[Any, ...]:
        taken = items.take(value)
        if len(taken) != 2:
            raise WrongForm(value)
        return taken

    def holds(value: tuple[Any, ...]) -> bool:
        return items.holds(value) and value[0] <= value[1]

    def fits(value: Any) -> bool:
        return items.fits(value) and len(value) == 2 and value[0] <= value[1]

    limits = " and ".join(filter(None, (declared.limits, "lowest first")))
    return Form(("two numbers",), f"two numbers {limits}", limits, take, holds, fits, example=[0.5, 2.0])


def objects(kind: Any) -> Form:
    """Any number of objects of a class. The owner checks each one, with its own messages."""
    item = instance(kind) if isinstance(kind, type) else anything()
    any_number = several(replace(item, take=lambda value: value), Option())
    return replace(any_number, fits=lambda value: type(value) in (tuple, list))


def instance(kind: type) -> Form:
    """An instance of a class; for an abstract class, anything that satisfies it."""
    name = {Mapping: "mapping", Callable: "function"}.get(kind, kind.__name__)
    words = f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"

    def fits(value: Any) -> bool:
        return isinstance(value, kind)

    def take(value: Any) -> Any:
        if not isinstance(value, kind):
            raise WrongForm(value)
        return value

    return Form((words,), words, "", take, _anything, fits)


def anything() -> Form:
    """Any value."""
    return Form(("anything",), "anything", "", lambda value: value, _anything, _anything)


def _anything(value: Any) -> bool:
    return True


def _scalar(value: Any) -> Any:
    """A NumPy scalar as a Python number."""
    is_numpy = type(value).__module__ == "numpy" and hasattr(value, "item") and value.ndim == 0
    return value.item() if is_numpy else value


def _bounds(declared: Option) -> tuple[float, float]:
    """The lowest and the highest allowed number."""
    infinite = declared.finite is False
    low, high = (-math.inf, math.inf) if infinite else (-LARGEST, LARGEST)
    if declared.low is not None:
        low = declared.low
    if declared.above is not None:
        low = SMALLEST if declared.above == 0 else math.nextafter(declared.above, math.inf)
    if declared.high is not None:
        high = declared.high
    if declared.below is not None:
        high = math.nextafter(declared.below, -math.inf)
    return low, high


def _whole_bounds(declared: Option) -> tuple[int, int]:
    low, high = INT_64.min, INT_64.max
    if declared.low is not None:
        low = math.ceil(declared.low)
    if declared.above is not None:
        low = math.floor(declared.above) + 1
    if declared.high is not None:
        high = math.floor(declared.high)
    if declared.below is not None:
        high = math.ceil(declared.below) - 1
    return low, high


def _all_within(values: Tensor, low: float, high: float, message: str) -> bool:
    """Whether all of a tensor's numbers are in a range. On CUDA and in compiled graphs the check fails later,
    with the message, so that the host need not wait."""
    if values.numel() == 0 or values.device.type not in ("cpu", "cuda"):
        return True
    are_within = _within(values.detach(), low, high)
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        return (~are_within).nonzero().shape[0] == 0
    torch._assert_async(are_within.all(), message)  # pyright: ignore[reportPrivateImportUsage]
    return True


def _within(values: Tensor, low: float, high: float) -> Tensor:
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()  # where a small bound is not 0
    are_within = values.isfinite()  # in half precision LARGEST would be infinite
    if low > -LARGEST:
        are_within &= values >= low
    if high < LARGEST:
        are_within &= values <= high
    return are_within
