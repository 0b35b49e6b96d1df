"""`config.yaml`, the saved configuration of a run, and how to find it.

It is plain YAML with plain values: text is taken literally, `${...}` included, and nothing is looked up or
run.
"""

import os
import re
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lossmith.training.config.keys import TrainConfig
from lossmith.training.errors import UserError
from lossmith.training.untrusted import LARGEST_CONFIG, read_text, shortened

CONFIG_FILE = "config.yaml"
# YAML 1.1 reads 1e-3 as text, because it has no decimal point.
FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+\Z"),
    [*"-+.0123456789"],
)


class _Loader(yaml.SafeLoader):
    """Reads plain values and refuses duplicate keys, and anchors, with which a few lines are gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias; expected plain values")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} stands twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back unchanged."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(*FLOAT)


def save_config(config: TrainConfig) -> Path:
    """Write the resolved configuration into `out_dir` and return its path."""
    path = Path(config.out_dir) / CONFIG_FILE
    write_whole(path, yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True))
    return path


def read_config(path: Path) -> dict[str, Any]:
    """The values in a saved configuration; a UserError if it cannot be read."""
    try:
        saved = yaml.load(read_text(path, LARGEST_CONFIG), Loader=_Loader)
    except Exception as error:  # the library raises many classes
        reason = shortened(f"{error}")
        raise UserError(
            f"{path} cannot be read as a configuration: {reason}. Restore it or train anew."
        ) from None
    if not isinstance(saved, dict) or not saved:
        raise UserError(
            f"{path} is not a configuration; expected `key: value` lines; came "
            f"{'something else' if saved else 'an empty file'}. Restore it or train anew."
        )
    return {str(name): value for name, value in saved.items()}


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with fresh.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def step_of(name: str) -> int:
    """The step in a checkpoint's name; -1 for any other name."""
    number = re.fullmatch(r"checkpoint-(\d+)", name, re.ASCII)
    return int(number[1]) if number else -1


def run_of(checkpoint: Path) -> Path | None:
    """The run's folder if the path is a checkpoint, else None."""
    for path in (checkpoint.absolute(), checkpoint.resolve()):  # the latter follows a link
        if step_of(path.name) >= 0 and (path / "config.json").is_file():
            return path.parent
    return None
