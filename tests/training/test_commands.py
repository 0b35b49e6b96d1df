"""The commands for what a run leaves, through the front door."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("plotly")

from running import go, rows

import lossmith
from lossmith.report import reading
from lossmith.training import cli
from lossmith.training.commands import app, watch
from lossmith.training.commands.tables import declared, options_in
from lossmith.training.config.saved_run import CONFIG_FILE
from lossmith.training.run.folder import LOG_FILE

MOE = ["--loss=unified", "--model=moe", "--use_moe_balancing", "--moe_balance_mode=bias"]


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `lossmith ...`, line breaks as spaces."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(arg) for arg in args])
    shown = capsys.readouterr()
    return int(caught.value.code or 0), " ".join(shown.out.split()), " ".join(shown.err.split())


@pytest.fixture
def out(tiny: list[str], tmp_path: Path) -> Path:
    """A run of six steps with checkpoints after three and six."""
    go([*tiny, "--z_loss=1e-4"])
    return tmp_path / "run"


def analysis(out: Path, step: int = 6) -> dict:
    return json.loads((out / f"checkpoint-{step}" / "analysis.json").read_text())


def test_the_room_that_draws_knows_the_names_of_the_files():
    assert (reading.CONFIG_FILE, reading.LOG_FILE) == (CONFIG_FILE, LOG_FILE)


# ── what the trainer leaves ───────────────────────────────────────────────────────────────────────


def test_the_closing_evaluation_leaves_an_analysis(out: Path):
    found = analysis(out)
    assert all(reading.fits(found[key], reading.ANALYSIS[key]) for key in found)
    assert set(reading.ANALYSIS) - set(found) == {"expert_usage"}
    last = rows(out)[-1]
    assert found["num_tokens"] == last["val_tokens"]
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-5)
    assert found["uniform_loss"] == pytest.approx(math.log(300))
    assert sum(found["by_position"]["num_tokens"]) == sum(found["by_frequency"]["num_tokens"])
    assert len(found["by_position"]["loss"]) == 15
    hardest = found["hardest"]
    assert [token["nll"] for token in hardest] == sorted((token["nll"] for token in hardest), reverse=True)
    assert not (out / "checkpoint-3" / "analysis.json").exists()


def test_an_analysis_is_of_as_many_batches_as_an_evaluation(tiny: list[str], tmp_path: Path):
    go([*tiny, "--eval_iters=1"])
    assert 30 < analysis(tmp_path / "run")["num_tokens"] <= 60


def test_an_analysis_is_moved_and_deleted_with_its_checkpoint(tiny: list[str], out: Path):
    go([f"--out_dir={out}", "--resume", "--max_iters=12"])
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-12"}
    assert analysis(out, 12)["step"] == 12
    go(tiny)
    assert (out / "previous-1" / "checkpoint-12" / "analysis.json").is_file()


@pytest.mark.parametrize(
    "flags",
    [["--objective=masked"], ["--mode=token_classifier"], ["--mode=sequence_scorer"], MOE],
    ids=["masked", "classifier", "scorer", "moe"],
)
def test_every_mode_leaves_what_it_has(tiny: list[str], tmp_path: Path, flags: list[str]):
    go([*tiny, *flags])
    found = analysis(tmp_path / "run")
    assert all(reading.fits(found[key], reading.ANALYSIS[key]) for key in found)
    assert "sample" in found
    assert ("by_frequency" in found) == ("--mode" not in flags[0])
    assert ("hardest" in found) == ("scorer" not in flags[0])
    if flags == MOE:
        assert [len(layer) for layer in found["expert_usage"]] == [4]
        assert all(sum(layer) == pytest.approx(1) for layer in found["expert_usage"])
    if "classifier" in flags[0]:
        assert {token["predicted"] for token in found["hardest"]} <= {"kept", "replaced"}


# ── the commands ──────────────────────────────────────────────────────────────────────────────────


def test_report_writes_a_page(capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    code, shown, _ = call(capsys, "report", out, out / "checkpoint-6", "-o", page)
    assert code == 0
    assert page.as_uri() in shown
    assert "Hardest tokens" in page.read_text()
    code, _, complaint = call(capsys, "report", out, "-o", tmp_path / "no" / "page.html")
    assert (code, complaint.startswith("error: ")) == (2, True)
    assert call(capsys, "report", out, "-o", page)[0] == 0  # again
    page.write_text("mine")
    code, _, complaint = call(capsys, "report", out, "-o", page)
    assert (code, page.read_text()) == (2, "mine")
    assert "there is a file that is no page of lossmith's. Pass another --output." in complaint


def test_demo_trains_and_ends_with_the_page(
    capsys: pytest.CaptureFixture[str], tiny: list[str], tmp_path: Path
):
    code, shown, _ = call(capsys, "demo", *tiny)
    assert code == 0
    assert shown.endswith((tmp_path / "run" / "report.html").as_uri())
    assert (tmp_path / "run" / "report.html").is_file()


def test_compare_is_a_table(capsys: pytest.CaptureFixture[str], tiny: list[str], out: Path, tmp_path: Path):
    go([*tiny, "--seed=2", f"--out_dir={tmp_path / 'other'}"])
    code, shown, _ = call(capsys, "compare", out, tmp_path / "other")
    assert code == 0
    assert "z_loss 0.0001 0.0" in shown
    assert "seed 1337 2" in shown
    assert "validation loss" in shown
    assert "n_layer" not in shown
    assert "Their configurations are the same." in call(capsys, "compare", out, out)[1]


def test_watch_shows_the_log_and_ends_with_the_run(capsys: pytest.CaptureFixture[str], out: Path):
    code, shown, _ = call(capsys, "watch", out, "--once")
    assert code == 0
    assert "run step 6 of 6" in shown
    assert "loss/z_loss" in shown
    assert watch.is_over(reading.read_run(out))
    assert call(capsys, "watch", out / "checkpoint-3")[0] == 0
    log = out / "log.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    assert not watch.is_over(reading.read_run(out))


def test_sparklines():
    assert watch.sparkline([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert watch.sparkline([3.0, 3.0]) == "▁▁"
    assert watch.sparkline([]) == ""
    assert len(watch.sparkline([float(i % 7) for i in range(1001)])) == watch.WIDTH


def test_sample_goes_on_from_a_prompt(capsys: pytest.CaptureFixture[str], out: Path):
    code, shown, _ = call(capsys, "sample", out, "--prompt=The model", "--tokens=4", "--temperature=0")
    assert code == 0
    assert "checkpoint-6, the newest of 2 checkpoints. The model" in shown
    assert call(capsys, "sample", out, "--prompt=The model", "--tokens=4", "--temperature=0")[1] == shown
    code, _, complaint = call(capsys, "sample", out, f"--prompt={'model ' * 40}")
    assert code == 2
    assert "but the model reads 16 at once. Shorten --prompt." in complaint
    assert "so it writes 15" in call(capsys, "sample", out)[1]


def test_the_best_checkpoint_is_chosen_and_said(capsys: pytest.CaptureFixture[str], out: Path):
    log = out / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for row in lines:
        if "val_loss" in row:
            row["val_loss"] = float(row["step"])
    log.write_text("".join(json.dumps(row) + "\n" for row in lines))
    shown = call(capsys, "sample", out, "--best")[1]
    assert "checkpoint-3, the best of 2 checkpoints: validation loss 3.0000." in shown
    assert "checkpoint-3, step 3." in call(capsys, "sample", out / "checkpoint-3")[1]


def test_analyze_reads_another_text(capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path):
    text, numbers = tmp_path / "text.txt", tmp_path / "numbers.json"
    text.write_text("The model reads a token and writes the next.\n" * 3)
    code, shown, _ = call(capsys, "analyze", out, "--text", text, "-o", numbers)
    assert code == 0
    assert "text.txt" in shown
    assert "below a uniform guess" in shown
    found = json.loads(numbers.read_text())
    assert f"{found['num_tokens']} tokens of" in shown
    assert f"ECE {found['calibration']['ece']:.4f}" in shown
    assert call(capsys, "analyze", out, "--text", tmp_path / "no.txt")[0] == 2


def test_analyzing_the_held_out_text_gives_what_the_run_left(
    capsys: pytest.CaptureFixture[str], tiny: list[str], tmp_path: Path
):
    """With experts that a bias chooses, which the loss keeps."""
    go([*tiny, *MOE])
    assert call(capsys, "analyze", tmp_path / "run", "-o", tmp_path / "again.json")[0] == 0
    again = json.loads((tmp_path / "again.json").read_text())
    left = analysis(tmp_path / "run")
    assert again["loss"] == pytest.approx(left["loss"], rel=1e-5)
    assert again["expert_usage"] == left["expert_usage"]


@pytest.mark.parametrize("mode", ["sequence_scorer", "token_classifier"])
def test_other_modes_have_samples_of_their_own(
    capsys: pytest.CaptureFixture[str], tiny: list[str], tmp_path: Path, mode: str
):
    go([*tiny, f"--mode={mode}"])
    assert call(capsys, "sample", tmp_path / "run")[0] == 0
    code, _, complaint = call(capsys, "sample", tmp_path / "run", "--prompt=x")
    assert code == 2
    assert "does not go on from a prompt" in complaint
    assert call(capsys, "analyze", tmp_path / "run")[0] == 0


def test_losses_lists_everything_and_the_options_of_one(capsys: pytest.CaptureFixture[str]):
    shown = call(capsys, "losses")[1]
    names = [name for classes in declared().values() for name in classes]
    assert len(names) > 25
    assert all(name in shown for name in names)
    code, shown, _ = call(capsys, "losses", "nvamploss")
    assert code == 0
    assert all(row[0] in shown and row[1] in shown for row in options_in(lossmith.NVAMPLoss))
    assert "threshold" in call(capsys, "losses", "EntropyModifier")[1]
    code, _, complaint = call(capsys, "losses", "NVAMPLos")
    assert code == 2
    assert "there is no loss, component or modifier 'NVAMPLos'. Did you mean NVAMPLoss?" in complaint
    assert "`lossmith losses` lists them." in call(capsys, "losses", "qqq")[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["report"], "error: Missing argument 'RUN...'. Write lossmith report --help."),
        (["report", "nowhere"], "error: nowhere is no run: expected a folder with log.jsonl"),
        (["compare", "."], "error: . is no run"),
        (["watch", "nowhere", "--once"], "error: nowhere is no run"),
        (["sample", "nowhere"], "error: there is no complete checkpoint in nowhere"),
        (["analyze", "nowhere", "--best"], "error: there is no complete checkpoint in nowhere"),
        (["sample", "x", "--tokens=none"], "error: Invalid value for '--tokens'"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    code, shown, complaint = call(capsys, *args)
    assert (code, shown) == (2, "")
    assert complaint.startswith(message)
    assert "Traceback" not in complaint


def test_the_usage_names_every_command(capsys: pytest.CaptureFixture[str]):
    shown = call(capsys, "--help")[1]
    commands = [command.callback.__name__ for command in app.app.registered_commands if command.callback]
    assert set(commands) | {"demo"} == set(cli.EXTRAS)
    assert all(f" {command} " in shown for command in cli.EXTRAS)


def test_without_its_extra_the_remedy_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "plotly" else find_spec(n, *a)
    )
    code, _, complaint = call(capsys, "report", "x")
    assert (code, complaint) == (2, "error: lossmith report needs plotly; pip install 'lossmith[report]'")
