"""The page of the experiments is what its script writes, and quick trials point where the results do."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments"
SHARED = {"harness", "languages", "models", "readme"}
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a script as it is when it is run, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in (*SHARED, *SCRIPTS):  # others may be called so
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = set(sys.modules)

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield module
    for name in set(sys.modules) - before:
        if (
            getattr(sys.modules[name], "__file__", None)
            and FOLDER in Path(sys.modules[name].__file__).parents
        ):
            del sys.modules[name]


def test_the_page_is_what_the_script_writes(load):
    assert (FOLDER / "README.md").read_text() == load("readme").page()


def test_every_script_has_results_and_a_place_on_the_page(load):
    readme = load("readme")
    assert set(readme.ORDER) == set(readme.TITLES) == set(SCRIPTS)
    assert {path.stem for path in (FOLDER / "results").glob("*.csv")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_results_have_three_seeds_of_every_arm(load, name):
    rows = load("harness").read(FOLDER / "results" / f"{name}.csv")
    arms = {row["arm"] for row in rows}
    assert len(rows) == len({(row["arm"], row["seed"]) for row in rows}) == 3 * len(arms)
    if name != "repetition":  # which names its arms otherwise
        assert arms == set(load(name).ARMS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_docstrings_say_what_is_asked_measured_and_shown(load, name):
    parts = load("readme").section(name)
    assert "?" in parts.splitlines()[2]
    assert "**Shows:**" in parts
    assert "{" not in parts


def test_numbers_are_shown_with_three_digits(load):
    shown = load("harness").shown
    assert [shown(x) for x in (0.03121, 4.712, -9.62, 1204.3, 0.0, 111.4)] == [
        "0.0312",
        "4.71",
        "-9.62",
        "1204",
        "0.00",
        "111",
    ]


def test_entropy_weights_flip_with_the_direction(load, monkeypatch):
    """A short trial points where the full one does."""
    entropy = load("entropy")
    monkeypatch.setattr(entropy, "STEPS", 40)
    weights = {
        arm: entropy.trial(0, entropy.ARMS[arm])["weight, concentrated"] for arm in list(entropy.ARMS)[:3]
    }
    assert weights["uniform, weight 1"] < weights["off"] < weights["concentrated, weight 1"]


@pytest.mark.slow
def test_mask_ratio_and_judge_multiply_to_harm(load, monkeypatch):
    script = load("all_modifiers")
    monkeypatch.setattr(script, "STEPS", 100)
    arms = ("off", "all, recommended", "mask ratio, judge")
    off, recommended, harmful = (script.trial(0, script.ARMS[arm])["nll"] for arm in arms)
    assert recommended < off + 0.1 < harmful
