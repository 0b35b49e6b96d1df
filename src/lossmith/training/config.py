"""Where the values of the keys come from: the saved run, then a config file, then the flags.

A config file is a `.py` file of plain assignments. It is parsed, never executed: a file that is only
data cannot surprise anyone, and its mistakes can be shown with a line number.
"""

import ast
import difflib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lossmith.training.errors import UserError
from lossmith.training.keys import TrainConfig

KEY_TYPES: dict[str, Any] = typing.get_type_hints(TrainConfig)
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
BOOLEAN_WORDS = {"true", "false", "yes", "no", "on", "off", "1", "0"}

# How a saved run is read back is the command's business, not the run's.
NOT_INHERITED = ("resume", "eval_only", "out_dir")
# Changing one of these would make another model, or other tokens, than the checkpoint holds.
FIXED_BY_CHECKPOINT = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")


@dataclass(frozen=True)
class Setting:
    """One value somebody set, and where, for the messages."""

    key: str
    value: Any
    origin: str


def load_config(args: list[str]) -> TrainConfig:
    """Turn command-line arguments into a checked configuration.

    With `--resume` or `--eval_only` the configuration saved in `out_dir` comes first, so that a run is
    continued by its folder alone.

    Args:
        args: an optional path of a config file, and flags: `--key=value`, `--key value`, `--switch`.

    Returns:
        The configuration, every key present, typed and in range.

    Raises:
        UserError: an unknown key, a wrong type, a value out of range, or a config file that is not one.
    """
    config_file, flags = read_flags(args)
    settings = (read_config_file(config_file) if config_file else []) + flags
    config = resolve(settings)
    if config.resume or config.eval_only:
        saved = read_saved_config(config)
        config = resolve(saved + settings)
        refuse_another_model(saved, config)
    config.check()
    return config


def resolve(settings: list[Setting]) -> TrainConfig:
    """Lay the settings over the defaults, later ones over earlier ones, with their types checked."""
    config = OmegaConf.structured(TrainConfig)
    for setting in settings:
        if setting.key not in KEY_TYPES:
            raise UserError(unknown_key(setting))
        # OmegaConf would look up "${...}" elsewhere; here a text is just that text.
        value = setting.value.replace("${", "\\${") if isinstance(setting.value, str) else setting.value
        try:
            OmegaConf.update(config, setting.key, value)
        except OmegaConfBaseException:
            expected = TYPE_NAMES.get(KEY_TYPES[setting.key], str(KEY_TYPES[setting.key]))
            raise UserError(
                f"{setting.origin}: {setting.key} expects {expected}; "
                f"came {setting.value!r} ({type(setting.value).__name__})."
            ) from None
    return typing.cast(TrainConfig, OmegaConf.to_object(config))


def unknown_key(setting: Setting) -> str:
    """The message for a key that does not exist."""
    near = difflib.get_close_matches(setting.key, KEY_TYPES, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else "`--help` lists the keys."
    return f"{setting.origin}: there is no key {setting.key!r}. {hint}"


# ── the command line ──────────────────────────────────────────────────────────────────────────────


def read_flags(args: list[str]) -> tuple[Path | None, list[Setting]]:
    """Split arguments into the config file, if any, and the settings given as flags."""
    config_file: Path | None = None
    settings = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if config_file is not None or not word.endswith(".py"):
                raise UserError(
                    f"expected --key=value or one config file ending in .py; came {word!r}. "
                    "A flag's value follows it directly: --max_iters=100."
                )
            config_file = Path(word)
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            text = take_value(name, rest)
        settings.append(Setting(name, parse_text(name, text), f"--{name}"))
    return config_file, settings


def take_value(name: str, rest: list[str]) -> str:
    """The value of a flag written without `=`: the next word, or "True" for a bare switch."""
    if name not in KEY_TYPES:
        raise UserError(unknown_key(Setting(name, None, f"--{name}")))
    following = rest[0] if rest else None
    if KEY_TYPES[name] is bool:
        return rest.pop(0) if following is not None and following.lower() in BOOLEAN_WORDS else "True"
    if following is None or following.startswith("--"):
        raise UserError(f"--{name} needs a value; came nothing. Write --{name}=value.")
    return rest.pop(0)


def parse_text(name: str, text: str) -> Any:
    """What a flag's text stands for: itself for a text key, else the Python literal it spells."""
    if KEY_TYPES.get(name) is str:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # "true", say; OmegaConf knows it, or refuses it by name


# ── config files ──────────────────────────────────────────────────────────────────────────────────


def read_config_file(path: Path) -> list[Setting]:
    """Read a `.py` file of plain assignments, `key = literal`, without executing it.

    Raises:
        UserError: the file cannot be read, does not parse, or holds anything but assignments of literals.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}. Check the path.") from None
    except UnicodeDecodeError:
        raise UserError(f"config file {path} is not UTF-8 text; expected a file of `key = value`.") from None
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path}:{getattr(error, 'lineno', 1)}: this is not Python: {error}.") from None
    settings = []
    for position, statement in enumerate(tree.body):
        if position == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        settings.append(read_assignment(statement, f"{path}:{statement.lineno}"))
    return settings


def read_assignment(statement: ast.stmt, origin: str) -> Setting:
    """One statement of a config file as a setting, or a UserError that says where and why not."""
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
    except (ValueError, TypeError, SyntaxError):
        raise UserError(
            f"{origin}: {target.id} expects a plain value (a number, text, True or False); "
            f"came `{first_line(value)}`. The file is not executed: write the result instead."
        ) from None


def first_line(node: ast.AST) -> str:
    """The source of a syntax node, cut to one short line."""
    line = ast.unparse(node).splitlines()[0]
    return line if len(line) <= 60 else line[:57] + "..."


# ── the saved run ─────────────────────────────────────────────────────────────────────────────────


def saved_config_path(out_dir: str) -> Path:
    """Where a run keeps its resolved configuration."""
    return Path(out_dir) / "config.yaml"


def save_config(config: TrainConfig) -> Path:
    """Write the resolved configuration into `out_dir` and return its path."""
    path = saved_config_path(config.out_dir)
    OmegaConf.save(OmegaConf.structured(config), path)
    return path


def read_saved_config(config: TrainConfig) -> list[Setting]:
    """The settings of the run in `config.out_dir`, less those that belong to the command."""
    path = saved_config_path(config.out_dir)
    command = "--resume" if config.resume else "--eval_only"
    if not path.is_file():
        raise UserError(
            f"{command}: there is no run in {config.out_dir} (no {path.name} there). "
            f"Train one first, without {command}, or name its folder with --out_dir."
        )
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # OmegaConf passes on whatever the YAML reader raises
        raise UserError(
            f"{path} cannot be read as a configuration: {error}. Restore it or train anew."
        ) from None
    if not isinstance(saved, dict):
        raise UserError(
            f"{path} is not a configuration; expected `key: value` lines. Restore it or train anew."
        )
    return [Setting(str(k), v, str(path)) for k, v in saved.items() if k not in NOT_INHERITED]


def refuse_another_model(saved: list[Setting], config: TrainConfig) -> None:
    """Raise UserError when a key that shapes the model differs from the checkpoint's."""
    for setting in saved:
        asked = getattr(config, setting.key)
        if setting.key in FIXED_BY_CHECKPOINT and asked != setting.value:
            raise UserError(
                f"{setting.key}={asked} but the run in {config.out_dir} was trained with "
                f"{setting.key}={setting.value}, which cannot change. Leave {setting.key} out, "
                "or start a new run with another --out_dir."
            )
