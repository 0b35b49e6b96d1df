"""What is in `out_dir` before a run: an earlier run is kept, and what another wrote is never touched."""

import os
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from running import go, rows, weights

from lossmith.training.errors import UserError
from lossmith.training.run.folder import held, held_by_a_file, opened
from processes import server, started


def fingerprint(folder: Path) -> dict[str, str]:
    """Everything in a folder, links as links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = (
            f"-> {os.readlink(path)}"
            if path.is_symlink()
            else "folder"
            if path.is_dir()
            else path.read_bytes().hex()
        )
    return found


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_folder(path: Path) -> None:
    path.mkdir()
    a_file(path / "mine.txt")


def a_link(path: Path) -> None:
    a_file(path.parent.parent / "elsewhere.txt")
    path.symlink_to(path.parent.parent / "elsewhere.txt")


def a_broken_link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "nowhere")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of the run, empty."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


# ── what is somebody else's ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("config.yaml", a_file),
        ("config.yaml", a_folder),
        ("config.yaml", a_link),
        ("config.yaml", a_broken_link),
        ("log.jsonl", a_file),
        ("log.jsonl", a_link),
        ("checkpoint-2", a_folder),
        ("checkpoint-900", a_folder),
        ("checkpoint-3", a_file),
        ("checkpoint-3", a_link),
        ("lossmith_run.json", a_file),
        ("lossmith_run.json", a_folder),
        ("lossmith_run.json", a_link),
    ],
)
def test_what_another_wrote_is_refused_by_name_and_stays(
    tiny: list[str], tmp_path: Path, out: Path, name: str, make: Callable[[Path], None]
):
    make(out / name)
    before = fingerprint(tmp_path)
    with pytest.raises(UserError) as caught:
        go(tiny)
    assert str(out / name) in str(caught.value)
    assert "--out_dir" in str(caught.value)
    assert fingerprint(tmp_path) == before


def test_tensorboard_of_another_is_refused_where_it_would_be_written_to(tiny: list[str], out: Path):
    pytest.importorskip("tensorboard")
    a_folder(out / "tensorboard")
    before = fingerprint(out)
    with pytest.raises(UserError, match=r"run/tensorboard .* Pass another --out_dir"):
        go([*tiny, "--tensorboard_log"])
    assert fingerprint(out) == before
    go(tiny)  # which writes nothing there
    assert (out / "tensorboard" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("make", [a_file, a_broken_link])
def test_weights_and_biases_needs_a_folder(tiny: list[str], out: Path, make: Callable[[Path], None]):
    pytest.importorskip("wandb")
    make(out / "wandb")
    before = fingerprint(out)
    with pytest.raises(UserError, match=r"run/wandb is no folder, .* Pass another --out_dir"):
        go([*tiny, "--wandb_log"])
    assert fingerprint(out) == before


def test_several_things_of_others_are_named_at_once(tiny: list[str], out: Path):
    for name in ("config.yaml", "log.jsonl"):
        a_file(out / name)
    with pytest.raises(UserError, match=r"config\.yaml, .*log\.jsonl"):
        go(tiny)


def test_names_that_are_nearly_ours_stay(tiny: list[str], out: Path):
    """The Trainer's own rotation deletes whatever begins with checkpoint-1."""
    a_file(out / "log.new")
    for name in ("checkpoint-1-backup", "checkpoint-", "previous", "previous-x"):
        a_folder(out / name)
    before = fingerprint(out)
    go([*tiny, "--eval_interval=1"])
    go(tiny)
    after = fingerprint(out)
    assert {name: after[name] for name in before} == before


def test_a_folder_whose_name_is_taken_by_a_file(tiny: list[str], tmp_path: Path):
    a_file(tmp_path / "run")
    with pytest.raises(UserError, match=r"run cannot be written to: File exists\. Pass --out_dir"):
        go(tiny)


def test_a_link_to_a_folder_is_that_folder(tiny: list[str], tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    go(tiny)
    go(tiny)
    assert (tmp_path / "disk" / "previous-1" / "checkpoint-6").is_dir()


# ── an earlier run ────────────────────────────────────────────────────────────────────────────────


def test_every_earlier_run_is_kept(tiny: list[str], out: Path):
    a_file(out / "notes.txt")
    first_weights = []
    for seed in range(3):
        shown = go([*tiny, f"--seed={seed}"])[1]
        first_weights.append(weights(out / "checkpoint-6"))
    assert f"The earlier run in {out} is now in {out / 'previous-2'}" in shown
    for number in (1, 2):
        kept = out / f"previous-{number}"
        assert (kept / "config.yaml").read_text().count(f"seed: {number - 1}\n") == 1
        assert len(rows(kept)) == len(rows(out))
        found = weights(kept / "checkpoint-6")
        assert all(torch.equal(found[name], value) for name, value in first_weights[number - 1].items())
    assert (out / "notes.txt").read_text() == "mine"


def test_the_closing_lines_say_what_was_moved_where(tiny: list[str], out: Path):
    go(tiny)
    closing = go(tiny)[1].rstrip().splitlines()[-1]
    assert f"{out / 'previous-1'}" in closing
    assert all(name in closing for name in ("checkpoint-3", "checkpoint-6", "config.yaml", "log.jsonl"))


def test_a_number_that_is_taken_is_passed_over(tiny: list[str], out: Path):
    go(tiny)
    a_file(out / "previous-4")
    assert f"is now in {out / 'previous-5'}" in go(tiny)[1]
    assert (out / "previous-4").read_text() == "mine"


def test_what_another_put_beside_a_run_is_neither_moved_nor_overwritten(tiny: list[str], out: Path):
    pytest.importorskip("tensorboard")
    go(tiny)
    a_folder(out / "tensorboard")
    go(tiny)
    assert (out / "tensorboard" / "mine.txt").read_text() == "mine"
    a_folder(out / "checkpoint-100")
    before = fingerprint(out)
    with pytest.raises(UserError, match=r"run/checkpoint-100 "):
        go(tiny)
    with pytest.raises(UserError, match=r"run/tensorboard, .*run/checkpoint-100 "):
        go([*tiny, "--tensorboard_log"])
    assert fingerprint(out) == before


@pytest.mark.slow
def test_a_run_that_was_set_aside_is_evaluated_and_resumed_where_it_is(tiny: list[str], out: Path):
    go(tiny)
    figure = f"{rows(out)[-1]['bits_per_byte']:.3f} bits per byte"
    go([*tiny, "--seed=5"])
    kept = out / "previous-1"
    assert figure in go([f"--out_dir={kept}", "--eval_only"])[1]
    assert go([f"--out_dir={kept}", "--resume", "--max_iters=8"])[0] == 0
    assert (kept / "checkpoint-8").is_dir()


def test_a_run_that_failed_leaves_the_earlier_one_where_it_was(tiny: list[str], out: Path):
    go(tiny)
    before = fingerprint(out)
    with pytest.raises(UserError):
        go([*tiny, "--dataset=nowhere"])
    assert fingerprint(out) == before


def test_tensorboard_goes_with_its_run(tiny: list[str], out: Path):
    pytest.importorskip("tensorboard")
    go([*tiny, "--tensorboard_log"])
    events = {path.name for path in (out / "tensorboard").rglob("events*")}
    go([*tiny, "--tensorboard_log"])
    assert {path.name for path in (out / "previous-1" / "tensorboard").rglob("events*")} == events
    assert not events & {path.name for path in (out / "tensorboard").rglob("events*")}


# ── the list of what a run wrote ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"program": "lossmith train"}', "\x00"])
def test_a_list_that_is_none_is_refused(tiny: list[str], out: Path, content: str):
    go(tiny)
    (out / "lossmith_run.json").write_text(content)
    before = fingerprint(out)
    for flags in (tiny, [f"--out_dir={out}", "--resume", "--max_iters=8"]):
        with pytest.raises(UserError, match=r"lossmith_run\.json .*--out_dir"):
            go(flags)
    assert fingerprint(out) == before


def test_a_list_cannot_name_what_is_outside(tiny: list[str], tmp_path: Path, out: Path):
    a_folder(tmp_path / "elsewhere")
    names = '"../elsewhere", "/etc/passwd", "notes.txt", "checkpoint-3/../../elsewhere", "checkpoint-3//x"'
    (out / "lossmith_run.json").write_text(f'{{"program": "lossmith train", "written": [{names}]}}')
    a_file(out / "notes.txt")
    go(tiny)
    assert (tmp_path / "elsewhere" / "mine.txt").is_file()
    assert (out / "notes.txt").is_file()


def test_no_file_is_left_half_written(tiny: list[str], out: Path):
    go(tiny)
    assert {path.name for path in out.iterdir()} == {
        "checkpoint-3", "checkpoint-6", "config.yaml", "log.jsonl", "lossmith_run.json",
    }  # fmt: skip


def test_only_the_run_s_own_checkpoints_are_rotated(tiny: list[str], out: Path):
    go([*tiny, "--eval_interval=2"])
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    a_folder(out / "checkpoint-1")
    go([f"--out_dir={out}", "--resume", "--max_iters=10"])
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [
        "checkpoint-1", "checkpoint-10", "checkpoint-8",
    ]  # fmt: skip


@pytest.mark.slow
def test_what_another_put_into_a_checkpoint_outlives_it(tiny: list[str], out: Path):
    go([*tiny, "--eval_interval=2"])
    a_file(out / "checkpoint-4" / "notes.txt")
    a_folder(out / "checkpoint-4" / "plots")
    (out / "checkpoint-4" / "empty").mkdir()
    go([f"--out_dir={out}", "--resume", "--max_iters=10"])
    assert set(fingerprint(out / "checkpoint-4")) == {"empty", "notes.txt", "plots", "plots/mine.txt"}
    left = sorted(path.name for path in out.glob("checkpoint-*"))
    assert left == ["checkpoint-10", "checkpoint-4", "checkpoint-8"]
    assert go([f"--out_dir={out}", "--resume", "--max_iters=12"])[0] == 0
    go(tiny)
    assert (out / "previous-1" / "checkpoint-4" / "notes.txt").read_text() == "mine"


def test_an_earlier_run_that_cannot_be_moved_stays(
    tiny: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
):
    go(tiny)
    before = fingerprint(out)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"cannot be moved to .*previous-1: Permission denied\. Pass another"):
        go(tiny)
    after = fingerprint(out)
    assert {name: after[name] for name in before} == before


# ── resuming ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["tensorboard", "checkpoint-7"])
def test_a_resumed_run_overwrites_nothing_of_others(tiny: list[str], out: Path, name: str):
    pytest.importorskip("tensorboard")
    go(tiny)
    a_folder(out / name)
    before = fingerprint(out)
    with pytest.raises(UserError, match=rf"run/{name} .* Pass another --out_dir"):
        go([f"--out_dir={out}", "--resume", "--max_iters=8", "--tensorboard_log"])
    assert fingerprint(out) == before


def test_a_run_without_a_list_resumes_where_its_files_can_be_told(tiny: list[str], out: Path):
    go(tiny)
    (out / "lossmith_run.json").unlink()
    assert go([f"--out_dir={out}", "--resume", "--max_iters=8"])[0] == 0
    assert rows(out)[-1]["step"] == 8
    assert (out / "checkpoint-3").is_dir()  # it may be another's, so it is never deleted


def test_a_log_of_another_is_not_resumed(tiny: list[str], out: Path):
    go(tiny)
    (out / "lossmith_run.json").unlink()
    (out / "log.jsonl").write_text('{"event": "start"}\n{"event": "stop"}\n')
    before = fingerprint(out)
    with pytest.raises(UserError, match=r"log\.jsonl .*--out_dir"):
        go([f"--out_dir={out}", "--resume", "--max_iters=8"])
    assert fingerprint(out) == before


# ── two at once ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_two_runs_at_once_are_refused(tiny: list[str], out: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("fcntl")
    from lossmith.training.run import runner

    refused = []
    original = runner.load_corpus

    def load_corpus(dataset: str):  # while the first run is under way
        if not refused:
            for flags in (tiny, [*tiny, "--seed=3"]):
                with pytest.raises(
                    UserError, match=r"another run is at work in .*run\. Wait .* another --out_dir"
                ):
                    go(flags)
                refused.append(flags)
        return original(dataset)

    monkeypatch.setattr(runner, "load_corpus", load_corpus)
    assert go(tiny)[0] == 0
    assert len(refused) == 2
    assert go(tiny)[0] == 0  # and it has let go of the folder
    with pytest.raises(UserError):
        go([*tiny, "--dataset=nowhere"])
    assert go(tiny)[0] == 0


def hold(out: Path, has_flock: bool, is_held: Event) -> None:
    """Hold a run's folder for good."""
    with (held if has_flock else held_by_a_file)(out):
        is_held.set()
        time.sleep(100)


@pytest.mark.parametrize("has_flock", [True, False])
def test_a_lock_is_seen_by_other_processes_and_ends_with_its_own(
    out: Path, has_flock: bool, monkeypatch: pytest.MonkeyPatch
):
    if not has_flock:  # Windows
        monkeypatch.setattr("lossmith.training.run.folder.held", held_by_a_file)
    is_held = server().Event()
    other = started(hold, out, has_flock, is_held)
    try:
        assert is_held.wait(120)
        with pytest.raises(UserError, match="another run is at work in"), opened(out, is_main=True):
            pass
    finally:
        other.kill()
        other.join()
    with opened(out, is_main=True) as folder:
        assert folder is not None
