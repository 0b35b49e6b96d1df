"""docs/reference/training.md against the commands."""

import re
from pathlib import Path

import pytest

pytest.importorskip("typer")

import typer

from lossmith.training.cli import EXTRAS
from lossmith.training.commands.app import app

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "training.md").read_text(encoding="utf-8")


def test_every_command_has_a_section():
    assert set(re.findall(r"^## (\w+)$", PAGE, re.MULTILINE)) >= {"train", *EXTRAS}


def test_every_option_of_a_command_is_listed_with_its_default():
    for name, command in typer.main.get_command(app).commands.items():
        text = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
        assert text is not None
        rows = dict(re.findall(r"^\| `(--[\w-]+)`[^|]*\| ([^|]*)\|", text[1], re.MULTILINE))
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        assert set(rows) == {option.opts[0] for option in options}, name
        for option in options:
            shown = rows[option.opts[0]].strip().strip("`")
            assert shown == ("" if option.default in (None, False, "") else str(option.default)), option.name
