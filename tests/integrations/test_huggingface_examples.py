"""The example scripts run, with fewer steps."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str, steps: int):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.STEPS = steps
    return module


def test_the_trainer(capsys):
    load("huggingface_trainer", steps=10).main()
    shown = capsys.readouterr().out
    assert "evaluation:" in shown
    assert "mtp_loss:" in shown


@pytest.mark.filterwarnings("ignore")  # of TRL's own
def test_trl(capsys):
    pytest.importorskip("trl")
    load("trl_sft", steps=60).main()
    assert "the boat is blue" in capsys.readouterr().out


def test_without_trl_the_example_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match=r"needs TRL.*pip install trl"):
        load("trl_sft", steps=1)
