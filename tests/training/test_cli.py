"""The command line: exit codes, one clear line for a mistake, no traceback."""

import importlib.util
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from lossmith.training import cli
from lossmith.training.keys import TrainConfig

ROOT = Path(__file__).parents[2]


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `lossmith ...`."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(args))
    shown = capsys.readouterr()
    return int(caught.value.code or 0), shown.out, shown.err


def test_help_shows_what_stands_in_brackets(capsys: pytest.CaptureFixture[str]):
    """Square brackets are markup to rich; unescaped ones vanish."""
    for args in (("--help",), ("train", "--help")):
        code, shown, _ = call(capsys, *args)
        assert code == 0
        assert "[config.py] [--key=value ...]" in " ".join(shown.split())


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]):
    code, shown, _ = call(capsys, "train", "--help")
    assert code == 0
    assert all(f"--{spec.name}" in shown for spec in fields(TrainConfig))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batchsize=3"], "error: --batchsize: there is no key 'batchsize'. Did you mean batch_size?"),
        (["--batch_size=[3"], "error: --batch_size: batch_size expects a whole number; came '[3' (str)."),
        (["--out_dir=/dev/null/x"], "error: out_dir=/dev/null/x cannot be written to"),
        (["--out_dir=/nowhere/at/all", "--resume"], "error: --resume: there is no run in /nowhere/at/all"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], args: list[str], message: str
):
    code, shown, complaint = call(capsys, "train", *args)
    assert (code, shown) == (2, "")
    assert complaint.startswith(message)
    assert complaint.count("\n") == 1


def test_a_run_through_the_front_door(capsys: pytest.CaptureFixture[str], tiny: list[str]):
    code, shown, complaint = call(capsys, "train", *tiny)
    assert (code, complaint) == (0, "")
    assert "bits per byte" in shown


def test_train_py_is_the_same_command(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--n_layers=3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --n_layers: there is no key 'n_layers'. Did you mean n_layer?\n"


def test_ctrl_c_before_training(
    capsys: pytest.CaptureFixture[str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lossmith.training.runner.load_corpus", interrupted)
    code, _, complaint = call(capsys, "train", *tiny)
    assert code == 130
    assert complaint.startswith("Stopped")


def test_without_the_extra_the_remedy_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "accelerate" else find_spec(n, *a)
    )
    code, _, complaint = call(capsys, "train")
    assert code == 2
    assert complaint == "error: the trainer needs accelerate; pip install 'lossmith[train]'\n"
