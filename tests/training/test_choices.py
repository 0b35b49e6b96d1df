"""What the trainer chooses where it could refuse, and says so: sizes for a small text, a run's checkpoint."""

import shutil
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers")

from every_mode import MODES
from running import go, rows

from lossmith.training.data.corpus import load_corpus
from lossmith.training.data.tokenizer import train_tokenizer
from lossmith.training.errors import UserError
from slow_but import slow_but

WORDS = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs!\n"


@pytest.fixture
def defaults(tmp_path: Path) -> list[str]:
    """Flags of a small model that leave the sizes of the text alone."""
    keys = {"n_layer": 1, "n_head": 2, "n_embd": 16, "max_iters": 2, "warmup_iters": 1, "device": "cpu"}
    return [f"--out_dir={tmp_path / 'run'}", *(f"--{name}={value}" for name, value in keys.items())]


def saved(out_dir: Path) -> dict:
    return yaml.safe_load((out_dir / "config.yaml").read_text())


# ── a small text ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", slow_but([12], [12, 100, 2000]))
def test_a_small_text_is_taken_as_it_is(defaults: list[str], tmp_path: Path, mode: str, length: int):
    text = tmp_path / "small.txt"
    text.write_text((WORDS * 30)[:length])
    code, shown = go([*defaults, f"--dataset={text}", *MODES[mode]])
    assert code == 0
    pieces = len(train_tokenizer(load_corpus(str(text)), 2048, or_fewer=True))
    said = [line for line in shown.splitlines() if "small" in line and "instead of" in line]
    assert len(said) == 1
    assert f"vocab_size={pieces} instead of 2048" in said[0]
    assert ("block_size=" in said[0]) == (length < 200)
    assert saved(tmp_path / "run")["vocab_size"] == pieces < 2048
    assert "vocabulary  " + f"{pieces:,} pieces" in shown
    assert rows(tmp_path / "run")[-1]["val_loss"] is not None
    # and the run is continued and evaluated with these sizes
    assert go([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=3"])[0] == 0
    assert go([f"--out_dir={tmp_path / 'run'}", "--eval_only"])[0] == 0


def test_a_large_text_says_nothing(defaults: list[str], tmp_path: Path):
    text = tmp_path / "large.txt"
    text.write_text("".join(f"{i * 7919 % 100003} {WORDS}" for i in range(3000)))
    shown = go([*defaults, f"--dataset={text}"])[1]
    assert "instead of" not in shown
    assert saved(tmp_path / "run")["vocab_size"] == 2048


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--vocab_size=1000", r"vocab_size=1000 is too large for .*Pass --vocab_size=\d+ or less"),
        ("--block_size=64", r"block_size=64; expected more tokens than one block holds\. Pass --block_size="),
    ],
)
def test_what_was_asked_for_is_not_changed(defaults: list[str], tmp_path: Path, flag: str, message: str):
    text = tmp_path / "small.txt"
    text.write_text(WORDS[:60])
    with pytest.raises(UserError, match=message):
        go([*defaults, f"--dataset={text}", flag])


def test_an_id_beyond_the_smaller_vocabulary_is_refused(defaults: list[str], tmp_path: Path):
    text = tmp_path / "small.txt"
    text.write_text(WORDS * 3)
    with pytest.raises(UserError, match=r"eos_token_id=2000 is no token of vocab_size=\d\d\d;"):
        go([*defaults, f"--dataset={text}", "--loss=unified", "--eos_token_id=2000"])


# ── one checkpoint of a run ───────────────────────────────────────────────────────────────────────


def test_one_checkpoint_is_evaluated(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    go(tiny)
    out = tmp_path / "run"
    figures = {row["step"]: f"{row['bits_per_byte']:.3f}" for row in rows(out) if "val_loss" in row}
    assert figures[3] != figures[6]
    for step in (3, 6):
        folder = out / f"checkpoint-{step}"
        code, shown = go([f"--out_dir={folder}", "--eval_only"])
        assert code == 0
        assert f"{folder} (step {step}) on the held-out text" in shown
        assert f"{figures[step]} bits per byte" in shown
        assert "is the newest" not in shown
    assert (
        f"checkpoint-6 is the newest of 2 checkpoints in {out}." in go([f"--out_dir={out}", "--eval_only"])[1]
    )
    (tmp_path / "best").symlink_to(out / "checkpoint-3")
    assert f"{figures[3]} bits per byte" in go([f"--out_dir={tmp_path / 'best'}", "--eval_only"])[1]
    monkeypatch.chdir(out / "checkpoint-3")
    assert f"{figures[3]} bits per byte" in go(["--out_dir=.", "--eval_only"])[1]
    assert not list(out.glob("checkpoint-*/checkpoint-*"))


def test_a_run_goes_on_by_its_folder_and_the_message_says_so(tiny: list[str], tmp_path: Path):
    go(tiny)
    out = tmp_path / "run"
    with pytest.raises(UserError, match=rf"is one checkpoint .*Pass --out_dir={out}\.$"):
        go([f"--out_dir={out / 'checkpoint-3'}", "--resume"])
    shutil.copytree(out / "checkpoint-3", tmp_path / "checkpoint-3")
    with pytest.raises(UserError, match=rf"no run in {tmp_path} .*config\.yaml"):
        go([f"--out_dir={tmp_path / 'checkpoint-3'}", "--eval_only"])


def test_the_judge_is_the_newest_checkpoint_of_a_run(tiny: list[str], tmp_path: Path):
    scorer = tmp_path / "scorer"
    go([*tiny, "--mode=sequence_scorer", f"--out_dir={scorer}"])
    judged = ["--objective=masked", "--loss_modifiers_enabled", "--judge_weight_modifier_enabled"]
    code, shown = go([*tiny, *judged, f"--judge_weight_checkpoint={scorer}"])
    assert code == 0
    assert f"judge_weight_checkpoint is {scorer / 'checkpoint-6'}, the newest of {scorer}" in shown
    assert "Enabled loss modifiers: SequenceScoringJudgeWeightModifier" in shown
    # a run that is resumed keeps its judge
    assert saved(tmp_path / "run")["judge_weight_checkpoint"] == str(scorer / "checkpoint-6")
    by_hand = rows(tmp_path / "run")
    go([*tiny, *judged, f"--judge_weight_checkpoint={scorer / 'checkpoint-6'}"])
    assert [row.get("loss") for row in rows(tmp_path / "run")] == [row.get("loss") for row in by_hand]
    with pytest.raises(UserError, match=r"no config\.json"):
        go([*tiny, *judged, f"--judge_weight_checkpoint={tmp_path}"])
