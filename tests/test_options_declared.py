"""Every option of everything public: declared in the signature, and held to what is declared.

Nothing is listed here but what has no options, so that a new one is covered by itself.
"""

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

import pytest
import torch
from torch import Tensor

import lossmith
from lossmith.options import options_of
from lossmith.options.forms import Option

# What the library makes and hands out, and what a user fills in; nobody gives them options.
NOT_CALLED = {
    "LossOutput", "Metrics", "Plan", "Pull", "TokenBatch", "TokenStats", "ModelMode", "BaseLossModifier",
    # What is split across ranks: looked at where it is made, tests/engine/test_*shards.py.
    "SequenceShards", "ShardedHead", "ShardedLogits", "VocabShards",
    # Calls a loss with the loss's own arguments.
    "warm_up",
    # Former names, which say so whenever they are called; held to their options where they are tested.
    "LanguageModelingLoss", "compute_loss",
}  # fmt: skip
# What the losses are made of, or what holds options of its own: looked at where it is used.
DATA = {"logits", "targets", "hidden", "weight", "config"}

# Looked at inside, in words that say more: tests/modifiers/test_modifier_mistakes.py.
OF_MODIFIERS = {
    "LossModifierPipeline": {"modifiers", "base", "model_mode"},
    "create_loss_modifier_pipeline": {"base", "model_mode", "judge"},
}


def has_options(public: Any) -> bool:
    parameters = inspect.signature(public).parameters
    is_old_name = isinstance(public, type) and lossmith.UnifiedLoss in public.__mro__[1:]
    takes_settings = dataclasses.is_dataclass(getattr(public, "Settings", None))  # looked at below
    return not is_old_name and not takes_settings and not set(parameters) <= {"args", "kwargs", "config"}


PUBLIC = {
    name: getattr(lossmith, name)
    for name in lossmith.__all__
    if name not in NOT_CALLED and has_options(getattr(lossmith, name))
}
SETTINGS = {
    name: getattr(lossmith, name)
    for name in lossmith.__all__
    if dataclasses.is_dataclass(getattr(getattr(lossmith, name), "Settings", None))
}
OPTIONS = [
    (name, parameter.name)
    for name, public in PUBLIC.items()
    for parameter in inspect.signature(public).parameters.values()
    if parameter.kind is not parameter.VAR_KEYWORD
    and not (parameter.name in DATA and parameter.default is parameter.empty)
    and not (name in OF_MODIFIERS and parameter.name in OF_MODIFIERS[name])
]
FIELDS = [(name, field.name) for name, of in SETTINGS.items() for field in dataclasses.fields(of.Settings)]


# ── what an annotation lets through, read once more and in the plainest way ────────────────────────


def members(hint: Any, said: Option = Option()) -> Iterator[tuple[Any, Option]]:  # noqa: B008
    """The types that are joined in an annotation, each with what is declared of it."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        inner, *extras = typing.get_args(hint)
        for extra in extras:
            said = extra.over(said) if isinstance(extra, Option) else said
        yield from members(inner, said)
    elif origin in (Union, types.UnionType):
        for each in typing.get_args(hint):
            yield from members(each, said)
    else:
        yield hint, said


def is_number(value: Any, said: Option) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not abs(value) <= torch.finfo(torch.float32).max and said.finite is not False:
        return False
    bounds = (
        said.low is None or value >= said.low,
        said.above is None or value > said.above,
        said.high is None or value <= said.high,
        said.below is None or value < said.below,
    )
    return all(bounds)


def allows(hint: Any, value: Any) -> bool:
    """Whether any of the types is the value's; what is not known here allows everything."""
    return any(_allows(*member, value) for member in members(hint))


def _allows(kind: Any, said: Option, value: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        is_whole = isinstance(value, int) and abs(value) < 2**63
        return is_number(value, said) and (kind is float or is_whole)
    if kind is str or origin is Literal:
        return isinstance(value, str) and (kind is str or value in arguments)
    if kind is Tensor:
        return isinstance(value, Tensor)
    if origin in (tuple, list, Sequence, Iterable):
        if not isinstance(value, list | tuple):
            return False
        is_pair = origin is tuple and Ellipsis not in arguments
        fits = [arguments[0] not in (int, float) or _allows(arguments[0], said, item) for item in value]
        return all(fits) and (not is_pair or (len(value) == 2 and value[0] <= value[1]))
    if origin is Mapping:
        return isinstance(value, Mapping)
    if origin is Callable:
        return callable(value)
    return isinstance(value, kind) if isinstance(kind, type) else True


def nonsense(hint: Any) -> Iterator[Any]:
    """Values of every type, and those next to the declared limits, less those that the annotation allows."""
    values: list[Any] = [
        "nonsense", "", "1", "False", True, False, None, object(), {"a": 1}, b"1", 1j,
        [object()], ["1"], [True], [None], [math.nan], (1.0,), (1.0, 2.0, 3.0), (2.0, 1.0), (0.5, math.inf),
        math.nan, math.inf, -math.inf, 1e39, 10**400, -(10**400), 0, -1, 1, 2.5, -2.5,
        torch.tensor([True]), torch.tensor([1j]),
    ]  # fmt: skip
    for _, said in members(hint):
        for limit, step in ((said.low, -1), (said.above, 0), (said.high, 1), (said.below, 0)):
            if limit is not None:
                around = [limit + step, limit + step * 1e-3, limit + step * 1e6, float(limit + step)]
                values += [*around, [limit + step], (limit + step, limit + step)]
    yield from (value for value in values if not isinstance(value, Tensor) and not allows(hint, value))
    if any(kind is Tensor and said.dtype == "real" for kind, said in members(hint)):
        yield from (value for value in values if isinstance(value, Tensor))


# ── the tests ─────────────────────────────────────────────────────────────────────────────────────


def test_there_is_something_to_test():
    assert {"cross_entropy", "linear_cross_entropy", "UnifiedLoss", "Objective", "MoEBalance"} <= set(PUBLIC)
    assert len(SETTINGS) == 7
    assert len(OPTIONS) > 150


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_an_option_is_declared_with_its_meaning(name, option):
    declared = options_of(PUBLIC[name])[option]
    assert declared.kind.said != "anything", "its annotation says nothing of what it can be"
    # the fields of a Term are its documentation's; nobody sets them by a configuration
    assert declared.meaning or name == "Term", f"annotate {option} with option('what it means')"
    assert declared.default is dataclasses.MISSING or declared.kind.fits(declared.default)


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_nonsense_is_refused_by_name(name, option):
    """Nothing else is given: what is wrong with one option is told before what else is missing."""
    hint = options_of(PUBLIC[name])[option].hint
    values = list(nonsense(hint))
    assert len(values) > 5
    for value in values:
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: {option} must be .*; got "):
            PUBLIC[name](**{option: value})


@pytest.mark.parametrize(("name", "option"), FIELDS)
def test_nonsense_is_refused_by_a_modifier(name, option):
    declared = options_of(SETTINGS[name].Settings)[option]
    assert declared.meaning
    for value in nonsense(declared.hint):
        # a configuration may spell a whole number 1.0, and ids as a text or one alone
        if option in ("special_tokens", "padding_token") and value in ("", "1", 0, 1):
            continue
        with pytest.raises((TypeError, ValueError), match=rf"^{option}(=| expects )"):
            SETTINGS[name]({option: value})


@pytest.mark.parametrize("name", PUBLIC)
def test_an_option_that_is_not_there(name):
    with pytest.raises(TypeError, match=rf"^{name} has no option 'qwertyuiop'\. It has "):
        PUBLIC[name](qwertyuiop=1)


def test_a_class_of_ones_own_is_held_to_its_base():
    class Mine(lossmith.Objective):
        def __init__(self, strength, **options):
            super().__init__(**options)

    with pytest.raises(TypeError, match=r"^Mine: shift must be .*; got 'no'"):
        Mine("any", shift="no")
    with pytest.raises(TypeError, match=r"^Mine has no option 'ignore_idx'\. Did you mean 'ignore_index'"):
        Mine("any", ignore_idx=0)
