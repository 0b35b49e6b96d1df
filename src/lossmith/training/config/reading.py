"""Where the values of the keys come from: the saved run, then a config file, then the flags.

A config file is a `.py` file of plain assignments. It is parsed, never executed, so that it cannot do harm
and mistakes are reported with their line.
"""

import ast
import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lossmith.modifiers.config import ALIASES
from lossmith.options import nearest
from lossmith.options.forms import WrongForm
from lossmith.training.config.keys import MIN_LR_DIVISOR, SPECS, TrainConfig
from lossmith.training.config.own_loss import how_to_name, is_own
from lossmith.training.config.rules import LARGEST_FLOAT, check, check_range, limits_of
from lossmith.training.config.saved_run import CONFIG_FILE, read_config, run_of
from lossmith.training.errors import UserError
from lossmith.training.untrusted import (
    LARGEST_CONFIG,
    NotText,
    Unreadable,
    cut,
    is_moderate,
    read_text,
    shown,
)

TYPES: dict[str, Any] = {name: spec.type for name, spec in SPECS.items()}
MISSING = "???"  # templates' placeholder for a value to be filled in
BOOLEAN_WORDS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}

# These belong to the command, not to the saved run.
NOT_INHERITED = ("resume", "eval_only", "out_dir")
# Changing one of these would change the model or the tokens of a checkpoint.
FIXED_BY_CHECKPOINT = (
    "mode", "objective", "model", "vocab_size", "block_size", "n_layer", "n_head", "n_embd",
    "num_experts", "moe_top_k",
)  # fmt: skip
# Runs saved before these keys existed have their defaults.
CHOSEN_BEFORE = {
    name: SPECS[name].default for name in ("mode", "objective", "model", "num_experts", "moe_top_k")
}


@dataclass(frozen=True)
class Setting:
    """A value and where it was set."""

    key: str
    value: Any
    origin: str


def load_config(args: list[str]) -> TrainConfig:
    """Turn command-line arguments into a checked configuration.

    With `--resume` or `--eval_only` it starts from the configuration saved in `out_dir`, so that the folder
    alone is enough to continue a run.

    Args:
        args: an optional path of a config file, and flags: `--key=value`, `--key value`, `--switch`.

    Returns:
        The configuration, with every key typed and in range.

    Raises:
        UserError: an unknown key, a wrong type, a value out of range, or a config file that is not one.
    """
    config_file, flags = read_flags(args)
    return configured(config_file, flags)


def configured(config_file: Path | None, told: list[Setting]) -> TrainConfig:
    """The checked configuration of a config file and of what the command itself says; see `load_config`.

    Raises:
        UserError: as `load_config`; or a loss of one's own that the command itself does not name.
    """
    from_file = read_config_file(config_file) if config_file else []
    for setting in from_file:
        if setting.key == "loss" and is_own(setting.value):
            raise UserError(
                f"{setting.origin}: loss={setting.value} is code, and a config file is read, not executed; "
                f"{how_to_name(setting.value)}."
            )
    settings = without_aliases(from_file) + without_aliases(told)
    config = resolve(settings)
    if config.resume and config.eval_only:
        raise UserError("resume and eval_only are both on; pass the one you mean.")
    if config.resume or config.eval_only:
        saved = read_saved_config(config)
        settings = without_derived(saved) + settings
        config = resolve(settings)
        refuse_another_model(saved, config)
        if is_own(config.loss) and all(setting.key != "loss" for setting in told):
            if config.resume:
                raise UserError(
                    f"the run in {config.out_dir} was trained with loss={config.loss}, which is code, and a "
                    f"saved run alone does not start it: {how_to_name(config.loss)}."
                )
            config = replace(config, loss=SPECS["loss"].default)  # evaluations are plain
            settings = [setting for setting in settings if setting.key != "loss"]
    for name, setting in {setting.key: setting for setting in settings}.items():  # the last of each key
        check_range(SPECS[name], getattr(config, name), f"{setting.origin}: ")
    check(config)
    return config


def without_aliases(settings: list[Setting]) -> list[Setting]:
    """The settings with aliases replaced by their keys; a UserError if one key has two names."""
    given: dict[str, Setting] = {}
    for setting in settings:
        first = given.setdefault(key_of(setting.key), setting)
        if first.key != setting.key:
            raise UserError(
                f"{first.origin} and {setting.origin}: {first.key} and {setting.key} are two names of one "
                "key; pass one of them."
            )
    return [replace(setting, key=key_of(setting.key)) for setting in settings]


def key_of(name: str) -> str:
    """Resolve an alias of a loss modifier's key; other names are returned as they are."""
    return ALIASES.get(name, name)


def resolve(settings: list[Setting]) -> TrainConfig:
    """Apply the settings to the defaults, later ones last, with their types checked."""
    unknown = [setting for setting in settings if setting.key not in TYPES]
    if unknown:
        more = [f"{setting.key!r} ({setting.origin})" for setting in unknown[1:]]
        raise UserError(unknown_key(unknown[0]) + (f" Nor are there {', '.join(more)}." if more else ""))
    values = {setting.key: typed(setting) for setting in settings}
    if "out_dir" in values:
        if not values["out_dir"].strip():
            default = f"--out_dir={SPECS['out_dir'].default}"
            raise UserError(f"out_dir is empty; expected a folder. Pass {default} or leave it out.")
        # The libraries expand `~` too, and all have to agree.
        values["out_dir"] = os.path.expanduser(values["out_dir"])
    if "learning_rate" in values and "min_lr" not in values:
        # Else a low learning rate would be refused because of a default that the user did not choose.
        values["min_lr"] = values["learning_rate"] / MIN_LR_DIVISOR
    return TrainConfig(**values)


def typed(setting: Setting) -> Any:
    """The value converted to its key's type."""
    spec, value = SPECS[setting.key], moderate(setting)
    example = spec.kind.forms[0].example if spec.default in (None, ()) else spec.default
    if value == MISSING:
        raise UserError(
            f"{setting.origin}: {setting.key}={MISSING!r} marks a value that is still missing; write it, "
            f"for example {setting.key}={example!r}."
        )
    try:
        return spec.kind.take(value, as_written=True)
    except WrongForm:
        limits = f" ({limits_of(spec)})" if limits_of(spec) else ""
        raise UserError(
            f"{setting.origin}: {setting.key} expects {spec.kind.said}; "
            f"came {shown(value)} ({type(value).__name__}). "
            f"Write for example {setting.key}={example!r}{limits}."
        ) from None


def moderate(setting: Setting) -> Any:
    """The value of a setting; a UserError if it is larger than any key's."""
    if not is_moderate(setting.value):
        raise UserError(
            f"{setting.origin}: {setting.key} has a number of more than 4,000 digits, or lists in lists in "
            "lists; expected a plain value. Write a smaller one."
        )
    return setting.value


def unknown_key(setting: Setting) -> str:
    """The message for a key that does not exist."""
    near = nearest(setting.key, [*TYPES, *ALIASES])
    hint = f"Did you mean {near}?" if near else "`--help` lists the keys."
    return f"{setting.origin}: there is no key {setting.key!r}. {hint}"


# ── the command line ──────────────────────────────────────────────────────────────────────────────


def read_flags(args: list[str]) -> tuple[Path | None, list[Setting]]:
    """Split arguments into the config file, if any, and the settings given as flags."""
    config_file: Path | None = None
    settings = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            name = name.replace("-", "_")
            value = parse_text(name, text if equals else take_value(name, rest))
            settings.append(Setting(name, value, f"--{name}"))
        elif config_file is None and word.endswith(".py"):
            config_file = Path(word)
        else:
            flag = word.lstrip("-")
            is_flag = key_of(flag.partition("=")[0].replace("-", "_")) in TYPES
            hint = f"Write --{flag}." if is_flag else "A flag's value follows it directly: --max_iters=100."
            raise UserError(f"expected --key=value or one config file ending in .py; came {word!r}. {hint}")
    return config_file, settings


def take_value(name: str, rest: list[str]) -> str:
    """The value of a flag without `=`: the next word, or "True" for a bare switch."""
    if key_of(name) not in TYPES:
        raise UserError(unknown_key(Setting(name, None, f"--{name}")))
    following = rest[0] if rest else None
    if TYPES[key_of(name)] is bool:
        return rest.pop(0) if following is not None and following.lower() in BOOLEAN_WORDS else "True"
    if following is None or following.startswith("--"):
        raise UserError(f"--{name} needs a value; came nothing. Write --{name}=value.")
    return rest.pop(0)


def parse_text(name: str, text: str) -> Any:
    """A flag's text as a value; text that is not a literal stays text."""
    kind = TYPES.get(key_of(name))
    if kind is str:
        return text
    if kind is bool and text.lower() in BOOLEAN_WORDS:
        return BOOLEAN_WORDS[text.lower()]
    # int and float also read "007" and "nan", which are not literals.
    readers = (ast.literal_eval,) if kind is bool else (int, float, ast.literal_eval)
    for read in readers:
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return read(text)
    return text  # `typed` refuses it by name


# ── config files ──────────────────────────────────────────────────────────────────────────────────


def read_config_file(path: Path) -> list[Setting]:
    """Read a `.py` file of assignments `key = literal` without executing it."""
    try:
        text = read_text(path, LARGEST_CONFIG).removeprefix("\ufeff")
        tree = ast.parse(text, filename=str(path))
    except NotText:
        raise UserError(f"config file {path} is not UTF-8 text; expected a file of `key = value`.") from None
    except Unreadable as error:
        raise UserError(f"config file {path} cannot be read: {error}. Check the path.") from None
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise UserError(f"{path}:{line}: this is not Python: {cut(str(error))}.") from None
    except (RecursionError, MemoryError):
        raise UserError(f"{path}:1: this is nested too deeply; expected lines of `key = value`.") from None
    settings = []
    for position, statement in enumerate(tree.body):
        if position == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        settings.append(read_assignment(statement, f"{path}:{statement.lineno}"))
    return settings


def read_assignment(statement: ast.stmt, origin: str) -> Setting:
    """Read one statement of a config file; a UserError if it is not one."""
    target = value = None
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target, value = statement.targets[0], statement.value
    elif isinstance(statement, ast.AnnAssign):
        target, value = statement.target, statement.value
    if not isinstance(target, ast.Name) or value is None:
        raise UserError(
            f"{origin}: expected `key = value`; came `{first_line(statement)}`. "
            "A config file is read, not executed, so it holds nothing but assignments."
        )
    try:
        return Setting(target.id, ast.literal_eval(value), origin)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise UserError(
            f"{origin}: {target.id} expects a plain value (a number, text, True or False); "
            f"came `{first_line(value)}`. The file is not executed: write the result instead."
        ) from None


def first_line(node: ast.AST) -> str:
    """The first line of a node's source, shortened."""
    try:
        line = ast.unparse(node).splitlines()[0]
    except (RecursionError, ValueError):  # deep; a number of thousands of digits
        return "..."
    return line if len(line) <= 60 else line[:57] + "..."


# ── the saved run ─────────────────────────────────────────────────────────────────────────────────


def read_saved_config(config: TrainConfig) -> list[Setting]:
    """The saved settings of the run in `config.out_dir`, which may also be one of its checkpoints."""
    around = run_of(Path(config.out_dir))
    if around and config.resume:
        raise UserError(
            f"--resume goes on from the newest checkpoint of a run, but {config.out_dir} is one checkpoint "
            f"of it. Pass --out_dir={around}."
        )
    path = (around or Path(config.out_dir)) / CONFIG_FILE
    command = "--resume" if config.resume else "--eval_only"
    if not path.is_file():
        raise UserError(
            f"{command}: there is no run in {path.parent} (no {path.name} there). "
            f"Train one first, without {command}, or name its folder with --out_dir."
        )
    saved = CHOSEN_BEFORE | read_config(path)
    for name, value in saved.items():
        moderate(Setting(name, value, str(path)))
    lacking = [name for name in FIXED_BY_CHECKPOINT if name not in saved]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}. Restore it or train anew.")
    return [Setting(name, value, str(path)) for name, value in saved.items() if name not in NOT_INHERITED]


def without_derived(saved: list[Setting]) -> list[Setting]:
    """Drop a `min_lr` that was derived from the learning rate, so that it follows a new one."""
    values = {setting.key: setting.value for setting in saved}
    rate, low = values.get("learning_rate"), values.get("min_lr")
    derived = isinstance(rate, int | float) and rate < LARGEST_FLOAT and rate / MIN_LR_DIVISOR == low
    return [setting for setting in saved if not (derived and setting.key == "min_lr")]


def refuse_another_model(saved: list[Setting], config: TrainConfig) -> None:
    """Raise UserError if a key that shapes the model differs from the checkpoint's."""
    for setting in saved:
        asked = getattr(config, setting.key)
        if setting.key in FIXED_BY_CHECKPOINT and asked != setting.value:
            raise UserError(
                f"{setting.key}={asked} but the run in {config.out_dir} was trained with "
                f"{setting.key}={setting.value}, which cannot change. Leave {setting.key} out, "
                "or start a new run with another --out_dir."
            )
