"""Killed after its last checkpoint, a run is finished; and nothing that a kill leaves behind stays."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from running import all_rows, go, weights

from lossmith.report.reading import ANALYSIS_FILE
from lossmith.training.errors import UserError
from lossmith.training.run import batch_file
from lossmith.training.run.folder import RUN_FILE
from lossmith.training.run.manifest import MANIFEST, unseal

HALF_NAMES = (".tmpAbC123", f".{MANIFEST}.0123abcd", f".{ANALYSIS_FILE}.89abcdef")


class Killed(BaseException):
    """What ends a run in this process at a point where another would be killed."""


def die(*_: object, **__: object) -> None:
    raise Killed


def leave_a_half(path: Path, text: str) -> None:
    """What a kill inside `write_whole` comes to."""
    path.with_name(f".{path.name}.0123abcd").write_text(text[: len(text) // 2])
    raise Killed


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of the run."""
    return tmp_path / "run"


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run until it is about to call something, and end there."""

    def killed(flags: list[str], moment: str, instead: Callable[..., None] = die) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(f"lossmith.training.{moment}", instead)
            with pytest.raises(Killed):
                go(flags)

    return killed


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def said_by_the_log(out: Path) -> list[dict]:
    """The rows of the log, findings included, without what depends on the clock."""
    return [{**row, "tokens_per_second": None} for row in all_rows(out)]


def require_the_same(out: Path, straight: Path) -> None:
    """A run that was killed and resumed left what an undisturbed one did."""
    assert names_in(out) == names_in(straight)
    assert said_by_the_log(out) == said_by_the_log(straight)
    ours, theirs = (json.loads((run / "checkpoint-6" / ANALYSIS_FILE).read_text()) for run in (out, straight))
    assert ours == theirs
    first, second = weights(out / "checkpoint-6"), weights(straight / "checkpoint-6")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


# ── the end of a run ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("moment", "instead"),
    [
        ("run.trainer.TaskTrainer.evaluate", None),  # the last checkpoint is there
        pytest.param("run.telling.find", None, marks=pytest.mark.slow),  # the closing row
        ("tasks.causal_language_model.CausalLanguageModel.sample", None),  # what was found in it
        pytest.param("run.runner.analyse", None, marks=pytest.mark.slow),
        pytest.param("run.runner.save_analysis", None, marks=pytest.mark.slow),
        pytest.param("run.analysis.write_whole", None, marks=pytest.mark.slow),  # the analysis is listed
        ("run.analysis.write_whole", leave_a_half),
    ],
)
def test_a_run_that_lacks_its_analysis_is_finished(
    tiny: list[str],
    out: Path,
    tmp_path: Path,
    killed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    instead: Callable[..., None] | None,
):
    def find(history) -> list[tuple[str, str]]:
        return [("odd", "it is odd")] if last_of(history) == 6 else []

    def last_of(history) -> int | None:
        return history.evaluations[-1]["step"] if history.evaluations else None

    def at_the_end(*args, **options):
        history = args[0] if moment.endswith("find") else None
        if history is not None and last_of(history) != 6:
            return []
        if moment.endswith("evaluate") and not options.get("everything"):
            return original(*args, **options)
        raise Killed

    from lossmith.training.run.trainer import TaskTrainer

    original = TaskTrainer.evaluate
    monkeypatch.setattr("lossmith.training.run.telling.find", find)
    straight = tmp_path / "straight"
    go([*tiny, f"--out_dir={straight}"])
    assert said_by_the_log(straight)[-1]["finding"] == "it is odd"
    again = [f"--out_dir={out}", "--resume"]
    for flags in (tiny, again):  # and while it is finished
        killed(flags, moment, instead or at_the_end)
        assert not (out / "checkpoint-6" / ANALYSIS_FILE).exists()
    code, shown = go(again)
    assert code == 0
    assert "All held-out text, after step 6: " in shown
    require_the_same(out, straight)
    with pytest.raises(UserError, match="nothing left to train"):
        go(again)
    require_the_same(out, straight)


def test_a_run_of_which_there_is_nothing_to_analyse_ends_too(tiny: list[str], out: Path):
    go([*tiny, "--mode=sequence_scorer", "--sample_tokens=0"])
    assert json.loads((out / "checkpoint-6" / ANALYSIS_FILE).read_text()) == {"step": 6}
    with pytest.raises(UserError, match="nothing left to train"):
        go([f"--out_dir={out}", "--resume"])


@pytest.mark.slow
def test_a_checkpoint_that_is_written_again_does_not_keep_its_analysis(
    tiny: list[str], out: Path, killed: Callable[..., None]
):
    go(tiny)
    path = out / "checkpoint-6" / ANALYSIS_FILE
    before = path.read_text()
    (out / "checkpoint-6" / "optimizer.pt").write_bytes(b"gone")
    again = [f"--out_dir={out}", "--resume", "--learning_rate=0.02"]
    killed(again, "run.runner.analyse")
    assert not path.exists()
    go(again)
    assert path.read_text() != before


def test_a_run_goes_on_from_where_it_was_killed_before_its_analysis(
    tiny: list[str], out: Path, tmp_path: Path, killed: Callable[..., None]
):
    """With more steps, its last evaluation stays, as after a run that ended."""
    straight = tmp_path / "straight"
    go([*tiny, f"--out_dir={straight}"])
    go([f"--out_dir={straight}", "--resume", "--max_iters=8"])
    killed(tiny, "run.runner.analyse")
    go([f"--out_dir={out}", "--resume", "--max_iters=8"])
    assert said_by_the_log(out) == said_by_the_log(straight)


def test_an_analysis_that_cannot_be_written_is_written_once_it_can(
    tiny: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lossmith.training.run.analysis.write_whole", full)
        with pytest.raises(UserError, match=r"analysis\.json cannot be written: No space.*--resume"):
            go(tiny)
    go([f"--out_dir={out}", "--resume"])
    assert (out / "checkpoint-6" / ANALYSIS_FILE).is_file()


# ── what a kill leaves ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_finished", [True, False])
def test_half_files_are_deleted_from_checkpoints_that_stay(tiny: list[str], out: Path, is_finished: bool):
    go(tiny)
    before = names_in(out)
    if not is_finished:
        unseal(out / "checkpoint-6")
    for name in HALF_NAMES:
        for step in (3, 6):
            (out / f"checkpoint-{step}" / name).write_text("half")
    (out / "checkpoint-3" / f"{HALF_NAMES[1]}.mine").write_text("mine")
    (out / "checkpoint-6" / ANALYSIS_FILE).unlink()
    go([f"--out_dir={out}", "--resume"])
    assert names_in(out) - before == {f"checkpoint-3/{HALF_NAMES[1]}.mine"}
    assert before <= names_in(out)


def test_half_a_batch_is_deleted(tiny: list[str], out: Path, killed: Callable[..., None]):
    def stop_in_the_middle(_: object, path: Path, __: object) -> None:
        (path.parent / ".tmpAbC123").write_text("half")  # as safetensors does
        raise Killed

    bad = [*tiny, "--learning_rate=1e30", "--min_lr=1e29", "--grad_clip=0", "--warmup_iters=0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_file.Path, "unlink", die)  # nor is there anyone left to clean up
        patch.setattr(batch_file.Path, "rmdir", die)
        killed(bad, "run.batch_file.save_file", stop_in_the_middle)
    left = {name for name in names_in(out) if name.rpartition("/")[2].startswith(".")}
    assert left
    assert ".tmpAbC123" not in left  # nobody could tell whose that is
    for name in (".lossmith_is_writable.a_0123bc", f".{ANALYSIS_FILE}.0123abcd"):
        (out / name).touch()
    (out / ".lossmith_is_writable.mine.txt").touch()
    go(tiny)
    assert [path.name for path in out.glob(".*")] == [".lossmith_is_writable.mine.txt"]


@pytest.mark.slow
def test_a_move_that_was_interrupted_is_completed(
    tiny: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
):
    go(tiny)
    go(tiny)  # the first is in previous-1
    before = names_in(out) - {name for name in names_in(out) if name.startswith("previous-1")}
    rename, num_moves = Path.rename, len([*out.iterdir()]) - 1
    for most in range(1, num_moves):
        moved: list[Path] = []

        def move_some(path: Path, to: Path, moved: list[Path] = moved, most: int = most) -> Path:
            if len(moved) == most:
                raise Killed
            moved.append(path)
            return rename(path, to)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", move_some)
            with pytest.raises(Killed):
                go(tiny)
        aside = out / f"previous-{most + 1}"
        assert not (aside / RUN_FILE).exists()
        said = f"moved to {aside}: config.yaml, log.jsonl, checkpoint-3, checkpoint-6"
        assert said in " ".join(go(tiny)[1].split())
        assert names_in(aside) == before
        assert not (out / f"previous-{most + 2}").exists()
    assert go([f"--out_dir={out / 'previous-2'}", "--resume", "--max_iters=7"])[0] == 0
