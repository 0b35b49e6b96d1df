"""Losses of one's own: `--loss=module:function`, and an objective given to `lossmith.training.train`.

A module is code. It is imported only if the command itself names it, or the caller in Python: never because
a config file, a saved run or a saved batch does. `reading` sees to that, so that a `TrainConfig` with such a
loss may be trusted.
"""

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lossmith
from lossmith.training.errors import UserError
from lossmith.training.untrusted import shortened

MODULE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
GIVEN = re.compile(r"objective=\w+")  # to `lossmith.training.train`
IGNORED = -100  # the data's
MEANS = ("mean", "token_mean", "sequence_mean")


def is_own(loss: Any) -> bool:
    """Whether a value of the key `loss` names a loss of one's own."""
    return isinstance(loss, str) and bool(MODULE.fullmatch(loss) or GIVEN.fullmatch(loss))


def name_of(objective: lossmith.Objective) -> str:
    """What the key `loss` says of an objective that was given."""
    return f"objective={type(objective).__name__}"


def how_to_name(loss: str) -> str:
    """How to give a saved run its own loss again."""
    if GIVEN.fullmatch(loss):
        return "call lossmith.training.train with that objective again"
    return f"pass --loss={loss} if you trust that code"


def find_own(loss: str) -> Callable[[Any], Any]:
    """Import what makes a loss: called with the configuration, it returns the objective.

    The working directory is among the places where modules are looked for.

    Raises:
        UserError: there is no such module, or it has no such name, or it fails.
    """
    if not MODULE.fullmatch(loss):
        raise UserError(f"loss={loss} was given in Python; {how_to_name(loss)}.")
    module, name = loss.split(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        made = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise failing(loss, error) from error
        raise UserError(
            f"loss={loss}: there is no module {error.name}; expected {module.replace('.', '/')}.py in "
            f"{here}, or an installed module. Start the command where it is."
        ) from None
    except AttributeError:
        raise UserError(
            f"loss={loss}: the module {module} has no {name}; expected a function that returns an objective, "
            "or an objective. Check the name."
        ) from None
    except Exception as error:  # the user's own code
        raise failing(loss, error) from error
    finally:
        sys.path.remove(here)

    def make(config: Any) -> Any:
        if isinstance(made, lossmith.Objective) or not callable(made):
            return made
        try:
            return made(config) if takes_one(made) else made()
        except Exception as error:  # the user's own code
            raise failing(loss, error) from error

    return make


def takes_one(function: Callable[..., Any]) -> bool:
    """Whether a function cannot be called without an argument."""
    found = inspect.signature(function).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in positional and p.default is inspect.Parameter.empty for p in found)


def failing(loss: str, error: Exception) -> UserError:
    """The error for a module, or a function in it, that raises; it names the place."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = shortened(f"{type(error).__name__}: {error}")
    return UserError(f"loss={loss} raised {said} ({last.filename}, line {last.lineno}).")


def require_usable(objective: Any, loss: str, *, shift: bool) -> lossmith.Objective:
    """An objective that the trainer can train with; a UserError if it cannot."""
    if not isinstance(objective, lossmith.Objective) or isinstance(objective, lossmith.LossModifierPipeline):
        raise UserError(
            f"loss={loss} gives a {type(objective).__name__}; expected a lossmith.Objective, without "
            "modifiers, which have keys of their own."
        )
    if objective.ignore_index != IGNORED:
        raise UserError(
            f"loss={loss} has ignore_index={objective.ignore_index}; the trainer marks positions without a "
            f"target by {IGNORED}. Leave ignore_index out."
        )
    if objective.shift is not None and bool(objective.shift) != shift:
        raise UserError(
            f"loss={loss} has shift={objective.shift}, but this mode's logits predict "
            f"{'the next token' if shift else 'the token at their own position'}. Leave shift out."
        )
    if not shift and any(parameter.requires_grad for parameter in objective.parameters()):
        raise UserError(
            f"loss={loss} has parameters to train, which only objective=causal does. Train that, "
            "or use buffers."
        )
    if objective.reduction not in MEANS:
        raise UserError(
            f"loss={loss} has reduction={objective.reduction}; the trainer divides by what it counted over "
            f"all micro-batches. Pass one of {', '.join(MEANS)}."
        )
    return objective
