"""``scripts/versions`` asks pip for what pyproject.toml says."""

import importlib.util
import re
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

# Python 3.10 takes its reader of TOML from pip, which brings setuptools along
pytestmark = pytest.mark.filterwarnings("ignore:.*[Dd]istutils:UserWarning")
ROOT = Path(__file__).parents[1]


def load():
    """The script as a module."""
    loader = SourceFileLoader("versions_script", str(ROOT / "scripts" / "versions"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def versions():
    return load()


def test_the_floors_are_those_of_pyproject(versions):
    found = {r.name: r.floor for r in versions.requirements()}
    text = (ROOT / "pyproject.toml").read_text()
    for name in ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "pytest", "numpy"):
        assert re.search(rf'"{name}>={re.escape(found[name])}"', text)
    assert next(iter(found)) == "torch"
    assert not {"ruff", "pyright", "lightning"} & set(found)


def test_extras_and_markers_are_no_part_of_a_name(versions, tmp_path):
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(
        '[project]\ndependencies = ["torch >= 2.6, <4"]\n[project.optional-dependencies]\n'
        "train = [\"a-b[c]>=1.2.3; python_version < '3.13'\"]\ndev = []\n"
    )
    assert [(r.name, r.floor) for r in versions.requirements(pyproject)] == [
        ("torch", "2.6"),
        ("a-b", "1.2.3"),
    ]
    pyproject.write_text('[project]\ndependencies = ["torch"]\noptional-dependencies = {train=[], dev=[]}\n')
    with pytest.raises(ValueError, match="'torch' has no floor"):
        versions.requirements(pyproject)


def test_what_pip_is_asked_for(versions):
    floors = [f"{r.name}=={r.floor}" for r in versions.requirements()]
    assert versions.wanted("oldest") == floors
    assert versions.wanted("2.9.1")[0] == "torch==2.9.1"
    assert versions.wanted("newest")[0] in (ROOT / "constraints.txt").read_text().splitlines()
    assert not [line for line in versions.wanted("newest")[1:] if "==" in line]


def test_every_test_that_it_runs_is_there(versions):
    assert [test for test in versions.TESTS if not (ROOT / test).exists()] == []


def test_the_matrix_has_the_oldest_of_everything_and_every_python(versions):
    assert versions.pythons()[0] == "3.10"
    assert versions.matrix() == ["oldest/3.10", *(f"newest/{python}" for python in versions.pythons())]
    assert versions.wanted("oldest/3.10") == versions.wanted("oldest")
    rows = versions.matrix()
    parts = [versions.part(rows, f"{k}/3") for k in (1, 2, 3)]
    assert sorted(row for each in parts for row in each) == sorted(rows)
    with pytest.raises(ValueError, match="K/N"):
        versions.part(rows, "4/3")
    with pytest.raises(FileNotFoundError, match=r"python2\.0"):
        versions.python_for("newest/2.0")
