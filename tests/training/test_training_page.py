"""docs/training.md against the code."""

from pathlib import Path

import pytest

pytest.importorskip("omegaconf")

from lossmith.modifiers.config import ALIASES, KEYS
from lossmith.training.keys import TrainConfig, default_of, describe, sections

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
HEAD = "| key | default | meaning |\n| --- | --- | --- |\n"


def expected_rows(of_modifiers: bool) -> list[str]:
    return [
        f"| `{spec.name}` | `{default_of(spec)}` | {describe(spec)} |"
        for _, keys in sections()
        for spec in keys
        if (spec.name in KEYS) == of_modifiers
    ]


@pytest.mark.parametrize(("place", "of_modifiers"), [(1, False), (2, True)])
def test_the_tables_are_those_of_the_keys(place: int, of_modifiers: bool):
    table = PAGE.split(HEAD)[place].split("\n\n")[0].splitlines()
    expected = expected_rows(of_modifiers)
    assert table == expected, "expected this table:\n" + "\n".join(expected)


def test_every_key_is_in_a_section():
    assert {spec.name for _, keys in sections() for spec in keys} == set(TrainConfig.__dataclass_fields__)


def test_other_names_of_keys_are_told():
    assert [name for name in ALIASES if f"`{name}`" not in PAGE] == []
