"""The command line: exit codes, one clear line for a mistake, no traceback."""

import importlib.util
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tokenizers import Tokenizer

from lossmith.training import cli
from lossmith.training.config.keys import TrainConfig
from lossmith.training.config.reading import load_config
from lossmith.training.errors import UserError
from lossmith.training.run.checkpoints import last_checkpoint, require_sound_checkpoint

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


# ── the folder of a run, damaged ──────────────────────────────────────────────────────────────────


@pytest.fixture
def checkpoint(capsys: pytest.CaptureFixture[str], tiny: list[str]) -> Path:
    """The last checkpoint of a run of three steps."""
    assert call(capsys, "train", *tiny, "--max_iters=3", "--sample_tokens=0")[0] == 0
    return last_checkpoint(Path(load_config(tiny).out_dir))[1]


def require_sound(checkpoint: Path, *flags: str) -> None:
    require_sound_checkpoint(checkpoint, load_config([f"--out_dir={checkpoint.parent}", *flags]))


def test_every_file_of_a_checkpoint_is_looked_at(checkpoint: Path):
    require_sound(checkpoint, "--resume")
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
    ):
        path = checkpoint / name
        whole = path.read_bytes()
        for state, content in (("damaged", whole[:-40]), ("empty", b""), ("missing", None)):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(UserError, match=rf"{name} is {state}; expected .*Restore it, or move"):
                require_sound(checkpoint, "--resume")
            path.write_bytes(whole)
    require_sound(checkpoint, "--resume")


def test_a_tokenizer_of_another_vocabulary(checkpoint: Path):
    path = checkpoint / "tokenizer.json"
    other = Tokenizer.from_file(str(path))
    other.add_tokens(["one more"])
    other.save(str(path))
    with pytest.raises(UserError, match=r"tokenizer\.json has 301 pieces .* vocab_size=300"):
        require_sound(checkpoint, "--eval_only")
    path.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        require_sound(checkpoint, "--eval_only")


def test_evaluating_needs_no_optimizer(checkpoint: Path):
    (checkpoint / "optimizer.pt").unlink()
    require_sound(checkpoint, "--eval_only")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("n_layer: 2", "num_hidden_layers=1 but .*n_layer=2"),
        ("n_head: 4", "num_attention_heads=2 but .*n_head=4"),
        ("n_embd: 32", "hidden_size=16 but .*n_embd=32"),
        ("vocab_size: 310", "vocab_size=300 but .*vocab_size=310"),
        ("block_size: 32", "max_position_embeddings=16 but .*block_size=32"),
    ],
)
def test_a_configuration_of_another_model(checkpoint: Path, line: str, message: str):
    path = checkpoint.parent / "config.yaml"
    kept = [row for row in path.read_text().splitlines() if not row.startswith(line.split(":")[0] + ":")]
    path.write_text("\n".join([*kept, line, ""]))
    with pytest.raises(UserError, match=rf"config\.json says {message}"):
        require_sound(checkpoint, "--eval_only")


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

    monkeypatch.setattr("lossmith.training.run.runner.load_corpus", interrupted)
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
