"""docs/training_keys.md against the code."""

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from lossmith.modifiers.config import ALIASES
from lossmith.training.config.keys import TrainConfig, default_of, describe, sections

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training_keys.md").read_text(encoding="utf-8")
HEAD = "| key | default | meaning |\n| --- | --- | --- |\n"


OWN_TABLES = ("Of loss=unified alone", "Of loss=nvamp alone", "Loss modifiers")


def expected_rows(titles: tuple[str, ...]) -> list[str]:
    return [
        f"| `{spec.name}` | `{default_of(spec)}` | {describe(spec)} |"
        for title, keys in sections()
        for spec in keys
        if title in titles
    ]


OTHERS = tuple(title for title, _ in sections() if title not in OWN_TABLES)


@pytest.mark.parametrize(
    ("place", "titles"), [(1, OTHERS), *enumerate(zip(OWN_TABLES, strict=True), start=2)]
)
def test_the_tables_are_those_of_the_keys(place: int, titles: tuple[str, ...]):
    table = PAGE.split(HEAD)[place].split("\n\n")[0].splitlines()
    expected = expected_rows(titles)
    assert table == expected, "expected this table:\n" + "\n".join(expected)


def test_every_key_is_in_a_section():
    assert {spec.name for _, keys in sections() for spec in keys} == set(TrainConfig.__dataclass_fields__)


def test_other_names_of_keys_are_told():
    assert [name for name in ALIASES if f"`{name}`" not in PAGE] == []


def test_the_script_would_write_the_page_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["keys", "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "keys"), run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr()
