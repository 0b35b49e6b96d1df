"""Killed at any point and resumed, a run ends with the same weights; a damaged checkpoint is passed over."""

import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from processes import started, started_script
from slow_but import slow_but

pytest.importorskip("transformers")

from running import go, reseal, rows, weights

from lossmith.report.reading import ANALYSIS_FILE
from lossmith.training import cli
from lossmith.training.errors import UserError
from lossmith.training.run import manifest
from lossmith.training.run.manifest import MANIFEST, require_whole

ROOT = Path(__file__).parents[2]
# Everything of a loss that a checkpoint has to hold: heads, a temperature, and random numbers.
LEARNS = ["--loss=unified", "--use_mtp", "--adaptive_temperature", "--dropout=0.1"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of the run."""
    return tmp_path / "run"


def resume(out: Path, *flags: str) -> str:
    """Resume a run; what was shown."""
    code, shown = go([f"--out_dir={out}", "--resume", *flags])
    assert code == 0
    return shown


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ── the manifest ──────────────────────────────────────────────────────────────────────────────────


def test_a_manifest_names_every_file_and_nothing_else(tiny: list[str], out: Path):
    go([*tiny, *LEARNS])
    for step in (3, 6):
        folder = out / f"checkpoint-{step}"
        found = require_whole(folder)
        names = {path.name for path in folder.iterdir()} - {MANIFEST, ANALYSIS_FILE}  # which nobody resumes
        assert (found.step, found.num_ranks, {*found.files}) == (step, 1, names)
        assert {"lossmith_loss.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= names
        assert all(file.size == (folder / name).stat().st_size for name, file in found.files.items())


def test_flipped_bytes_in_any_file_are_found_and_the_checkpoint_before_is_used(
    tiny: list[str], out: Path, tmp_path: Path
):
    go([*tiny, *LEARNS])
    expected = tmp_path / "expected"
    shutil.copytree(out / "checkpoint-6", expected)
    for name in [*require_whole(out / "checkpoint-6").files, MANIFEST]:
        path = out / "checkpoint-6" / name
        whole = path.read_bytes()
        for begin in (0, len(whole) // 2, max(0, len(whole) - 16)):
            content = bytearray(whole)
            for k in range(begin, min(begin + 16, len(content))):
                content[k] ^= 0xFF
            path.write_bytes(content)
            with pytest.raises(manifest.Damaged, match=rf"checkpoint-6/{name} is damaged; expected .*move"):
                require_whole(out / "checkpoint-6")
        path.write_bytes(whole)
    require_whole(out / "checkpoint-6")
    path.write_bytes(content)
    shown = resume(out)
    assert f"checkpoint-6/{name} is damaged; expected" in shown
    assert "So checkpoint-3 is used instead." in shown
    assert same_weights(out / "checkpoint-6", expected)
    require_whole(out / "checkpoint-6")


@pytest.mark.parametrize("name", ["rng_state.pth", "scheduler.pt", "model.safetensors", MANIFEST])
@pytest.mark.parametrize("left", slow_but([b"PK"], [None, b"", b"PK"]))
def test_a_file_that_is_missing_empty_or_cut(tiny: list[str], out: Path, name: str, left: bytes | None):
    go(tiny)
    path = out / "checkpoint-6" / name
    path.unlink() if left is None else path.write_bytes(left)
    if (name, left) == (MANIFEST, None):  # it was never finished
        assert "Resuming from" in resume(out)
        return
    state = "missing" if left is None else "damaged" if left else "empty"
    assert f"{name} is {state}; expected" in resume(out)


def test_if_no_checkpoint_is_sound_every_one_is_named(tiny: list[str], out: Path):
    go(tiny)
    for step, name in ((3, "optimizer.pt"), (6, "config.json")):
        (out / f"checkpoint-{step}" / name).write_bytes(b"{}")
    message = r"checkpoint-6/config\.json is damaged.*checkpoint-3/optimizer\.pt is damaged"
    with pytest.raises(UserError, match=message):
        resume(out)


def test_an_evaluation_looks_too_but_needs_nothing_of_training(tiny: list[str], out: Path):
    go(tiny)
    (out / "checkpoint-6" / "optimizer.pt").write_bytes(b"gone")
    assert "checkpoint-6 (step 6)" in go([f"--out_dir={out}", "--eval_only"])[1]
    path = out / "checkpoint-6" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    shown = go([f"--out_dir={out}", "--eval_only"])[1]
    assert "model.safetensors is damaged" in shown
    assert "checkpoint-3 (step 3)" in shown
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        go([f"--out_dir={out / 'checkpoint-6'}", "--eval_only"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_step": -5}, r"global_step=-5 but its folder is checkpoint-6"),
        ({"global_step": 3}, r"global_step=3 but its folder is checkpoint-6"),
        ({"global_step": "6"}, r"global_step='6' but"),
        ({"total_flos": "many"}, r"trainer_state\.json is damaged"),
        ({"unheard_of": 1}, r"trainer_state\.json is damaged"),
    ],
)
def test_a_state_of_the_trainer_that_was_made_up(
    tiny: list[str], out: Path, change: dict[str, object], message: str
):
    go(tiny)
    path = out / "checkpoint-6" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    reseal(path.parent)
    with pytest.raises(UserError, match=message):
        resume(out, "--max_iters=9")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"])
def test_a_state_of_something_else_is_a_message(tiny: list[str], out: Path, name: str):
    go(tiny)
    torch.save({"python": 1, "state": [2]}, out / "checkpoint-6" / name)
    reseal(out / "checkpoint-6")
    with pytest.raises(UserError, match=r"checkpoint-6 cannot be loaded \(\w+: .*move .*checkpoint-6 away"):
        resume(out, "--max_iters=9")


def test_damaged_checkpoints_do_not_count_among_those_kept(tiny: list[str], out: Path):
    go([*tiny, "--eval_interval=2"])
    (out / "checkpoint-6" / "optimizer.pt").write_bytes(b"gone")
    resume(out, "--max_iters=7", "--eval_interval=1")
    kept = {path.name for path in out.glob("checkpoint-*")}
    assert kept == {"checkpoint-6", "checkpoint-7"}
    assert all(require_whole(out / name) for name in kept)


def test_another_number_of_processes_is_said(tiny: list[str], out: Path):
    go(tiny)
    folder = out / "checkpoint-6"
    shutil.copy(folder / "rng_state.pth", folder / "rng_state_0.pth")
    (folder / "rng_state.pth").rename(folder / "rng_state_1.pth")
    reseal(folder)
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"num_ranks": 1', '"num_ranks": 2'))
    assert "was written by 2 processes and this run has 1" in resume(out, "--max_iters=8")


# ── killed ────────────────────────────────────────────────────────────────────────────────────────


def killed_before(out: Path, what: str, flags: list[str]) -> None:
    """A run in a process of its own that is killed when it is about to call `what`."""
    process = started(die_before, what, flags)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def die_before(what: str, flags: list[str]) -> None:
    """Run the trainer until it is about to call `what`."""
    module, _, name = what.rpartition(".")
    owner, _, attribute = module.partition(":")
    holder: Any = importlib.import_module(owner)
    for part in attribute.split(".") if attribute else ():
        holder = getattr(holder, part)
    setattr(holder, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    cli.main(["train", *flags])


def test_a_run_killed_after_its_last_checkpoint_is_finished(tiny: list[str], out: Path, tmp_path: Path):
    straight = tmp_path / "straight"
    go([*tiny, f"--out_dir={straight}"])
    killed_before(out, "lossmith.training.run.runner:.show_results", tiny)
    with pytest.raises(UserError, match="nothing left to train"):  # it was evaluated
        resume(out)
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[:-1]))  # as if killed a moment before
    shown = resume(out)
    assert "All held-out text, after step 6: " in shown
    assert rows(out)[-1] == rows(straight)[-1]
    assert same_weights(out / "checkpoint-6", straight / "checkpoint-6")


@pytest.mark.parametrize(
    "moment",
    [
        "lossmith.training.run.trainer:.seal",  # everything but the manifest is there
        "lossmith.training.run.folder:RunFolder.keep_checkpoints",  # the manifest, too
        "lossmith.training.run.folder:RunFolder._delete",
        "transformers.trainer:Trainer._save_optimizer_and_scheduler",
    ],
)
def test_a_run_killed_around_a_checkpoint_leaves_nothing_behind(
    tiny: list[str], out: Path, tmp_path: Path, moment: str
):
    straight = tmp_path / "straight"
    flags = [*tiny, *LEARNS, "--eval_interval=2", "--max_iters=8"]
    go([*flags, f"--out_dir={straight}"])
    killed_before(out, moment, flags)
    for path in out.glob("checkpoint-*"):
        for name in (".tmpAbC123", f".{MANIFEST}.0123abcd"):  # as if half written
            (path / MANIFEST).exists() or (path / name).touch()
    if any((path / MANIFEST).is_file() for path in out.glob("checkpoint-*")):
        resume(out)
    else:
        go(flags)
    names = {path.name for path in out.iterdir()} - {"previous-1"}
    assert names == {path.name for path in straight.iterdir()}
    for name in ("checkpoint-6", "checkpoint-8"):
        assert same_weights(out / name, straight / name)
        assert {p.name for p in (out / name).iterdir()} == {p.name for p in (straight / name).iterdir()}


def test_what_a_killed_run_was_writing_in_the_folder_itself_is_cleared_away(tiny: list[str], out: Path):
    go(tiny)
    for name in (".config.yaml.0123abcd", ".log.jsonl.89abcdef", ".config.yaml.mine"):
        (out / name).write_text("half")
    resume(out, "--max_iters=7")
    assert [path.name for path in out.glob(".*")] == [".config.yaml.mine"]


def test_kill_and_resume_at_random_points(tmp_path: Path):
    shown, complaints = tmp_path / "shown", tmp_path / "complaints"
    flags = ["--cycles=3", f"--folder={tmp_path / 'runs'}"]
    process = started_script(ROOT / "scripts" / "interruptions", flags, shown, complaints)
    process.join(500)
    assert process.exitcode == 0, shown.read_text() + complaints.read_text()


# ── a full disk ───────────────────────────────────────────────────────────────────────────────────


def limited(kilobytes: int) -> Callable[[], None]:
    """What sets the largest file that a process may write."""
    limit = kilobytes * 1024
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def run_limited(flags: list[str], kilobytes: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "train.py", *flags],
        cwd=ROOT,
        env={**os.environ, "LOSSMITH_NATIVE": "0"},
        preexec_fn=limited(kilobytes),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_full_disk_is_a_message_and_the_last_checkpoint_stays(tiny: list[str], out: Path):
    go(tiny)
    sizes = {path.name: path.stat().st_size // 1024 for path in (out / "checkpoint-6").iterdir()}
    before = {path: path.read_bytes() for path in (out / "checkpoint-6").iterdir()}
    again = [f"--out_dir={out}", "--resume", "--max_iters=9"]
    for limit in sorted({1, sizes["model.safetensors"] - 2, sizes["optimizer.pt"] - 2}):
        done = run_limited(again, limit)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert "resume" in done.stderr
        assert not (out / "checkpoint-9").exists()
        assert all(path.read_bytes() == content for path, content in before.items())
    resume(out, "--max_iters=9")
    assert require_whole(out / "checkpoint-9")
