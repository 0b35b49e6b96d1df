"""docs/training.md against the code."""

from pathlib import Path

import pytest

pytest.importorskip("omegaconf")

from lossmith.training.keys import TrainConfig, describe, sections

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def expected_rows() -> list[str]:
    return [
        f"| `{spec.name}` | `{spec.default}` | {describe(spec)} |" for _, keys in sections() for spec in keys
    ]


def test_the_table_is_that_of_the_keys():
    table = PAGE.split("| key | default | meaning |\n| --- | --- | --- |\n")[1].split("\n\n")[0].splitlines()
    assert table == expected_rows(), "expected this table:\n" + "\n".join(expected_rows())


def test_every_key_is_in_a_section():
    assert {spec.name for _, keys in sections() for spec in keys} == set(TrainConfig.__dataclass_fields__)
