"""What is read of a run's folder, whatever is in it."""

import json
from pathlib import Path

import pytest
from runs_case import PARTS, analysis_of, write_run

pytest.importorskip("plotly")
pytest.importorskip("yaml")

from lossmith.report.comparison import differing, gaps, results
from lossmith.report.reading import NoRun, read_run, read_runs, thinned


def test_a_run_is_read_from_its_folder_and_from_its_checkpoint(tmp_path: Path):
    folder = write_run(tmp_path / "run", findings=("the z-loss does nothing",))
    run = read_run(folder)
    assert (run.name, len(run.steps), len(run.evaluations)) == ("run", 40, 10)
    assert tuple(run.parts) == PARTS
    assert run.findings == ["the z-loss does nothing"]
    assert run.config["max_iters"] == "40"
    of_checkpoint = read_run(folder / "checkpoint-40")
    assert (of_checkpoint.steps, of_checkpoint.analysis) == (run.steps, run.analysis)
    assert run.analysis == analysis_of()


def test_of_two_checkpoints_the_newer_is_shown_and_an_analysis_in_the_folder_goes_first(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9" / "analysis.json").write_text(json.dumps({"step": 9}))
    assert read_run(folder).analysis["step"] == 20
    assert read_run(folder / "checkpoint-9").analysis == {"step": 9}
    (folder / "analysis.json").write_text(json.dumps({"step": 3}))
    assert read_run(folder).analysis == {"step": 3}


def test_where_there_is_no_run(tmp_path: Path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "checkpoint-3"):
        with pytest.raises(NoRun, match=r"is no run: expected a folder with log\.jsonl"):
            read_run(path)


def test_what_is_not_as_expected_is_left_out(tmp_path: Path):
    folder = write_run(tmp_path / "run", num_steps=2)
    with (folder / "log.jsonl").open("ab") as log:
        log.write(b'[]\n{"step": "9", "loss": 1}\n{"step": 3, "loss": NaN, "perplexity": "high"}\n')
        log.write(b"\xff\xfe\n" + b"[" * 100_000 + b"\n" + b'{"step": 4, "lo')
    (folder / "config.yaml").write_text("a: !!python/object/apply:os.system ['exit 1']\n")
    odd = analysis_of() | {"hardest": [{"token": 3}], "by_position": {"labels": "x"}, "more": 1, "step": True}
    (folder / "checkpoint-2" / "analysis.json").write_text(json.dumps(odd))
    run = read_run(folder)
    assert [row["step"] for row in run.steps] == [1, 2, 3]
    assert (run.steps[2]["loss"], run.steps[2]["perplexity"]) == (None, None)
    assert run.config == {}
    assert set(analysis_of()) - set(run.analysis) == {"hardest", "by_position", "step"}
    assert "more" not in run.analysis


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    paths = [write_run(tmp_path / name / "run") for name in "ab"]
    assert [run.name for run in read_runs(paths)] == [str(path) for path in paths]


def test_thinning_keeps_the_extremes_and_the_ends():
    rows = [{"step": i, "loss": 3 + i % 7 / 10, "grad_norm": 1.0} for i in range(10_000)]
    rows[4321]["loss"], rows[1234]["loss"], rows[777]["grad_norm"] = 99.0, -1.0, 50.0
    rows[5000]["loss"] = None
    kept = thinned(rows, 300)
    assert 200 < len(kept) <= 300
    assert {0, 777, 1234, 4321, 9999} <= {row["step"] for row in kept}
    assert kept == sorted(kept, key=lambda row: row["step"])
    assert thinned(rows[:300], 300) == rows[:300]


def test_the_gap_is_between_plain_losses(tmp_path: Path):
    run = read_run(write_run(tmp_path / "run"))
    run.steps = [{"step": s, "perplexity": p} for s, p in ((1, 2.0), (2, 8.0), (3, None), (4, 4.0))]
    run.evaluations = [
        {"step": 2, "val_loss": 2.0},
        {"step": 3, "val_loss": 2.0},
        {"step": 4, "val_loss": 3.0},
    ]
    (at_two, first), (_, second), (_, third) = gaps(run)
    assert at_two == 2
    assert first == pytest.approx(2.0 - 2 * 0.6931471805599453)
    assert second is None
    assert third == pytest.approx(3.0 - 2 * 0.6931471805599453)


def test_what_differs_and_what_runs_came_to(tmp_path: Path):
    first = write_run(tmp_path / "a", config={"z_loss": 0.1, "model": "llama"})
    second = write_run(tmp_path / "b", seed=1, config={"z_loss": 0.2, "model": "llama", "use_mtp": True})
    runs = read_runs([first, second])
    assert dict(differing(runs)) == {"seed": ["0", "1"], "z_loss": ["0.1", "0.2"], "use_mtp": ["-", "True"]}
    came_to = dict(results(runs))
    assert came_to["last step"] == ["40", "40"]
    assert came_to["best validation loss"] == ["2.2250 at step 40"] * 2
    assert came_to["calibration error (ECE)"] == ["0.100"] * 2
    assert "F1" not in came_to
