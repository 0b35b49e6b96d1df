"""The lines of logged steps, and the table at the end of a run."""

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")

from every_mode import make_task
from rich.console import Console
from running import go, rows

from lossmith.training.config.reading import load_config
from lossmith.training.run.closing import best_checkpoint, best_of, closing_table, series
from lossmith.training.run.findings import History
from lossmith.training.run.progress import Display
from lossmith.training.run.step_line import StepLine, parts_of, plain_loss

LOGS = [
    {"perplexity": 2112.9, "loss/cross_entropy": 7.655, "loss/z_loss": 0.0058, "loss/mtp_loss": 1.5},
    {"perplexity": 46.7, "loss/cross_entropy": 3.84, "loss/z_loss": 0.0123456, "loss/mtp_loss": 0.7},
    {"perplexity": 1.1, "loss/cross_entropy": 0.095, "loss/z_loss": 1e-07, "loss/mtp_loss": 0.0001},
]


def shown(width: int) -> list[str]:
    line, found = StepLine(), []
    for k, row in enumerate(LOGS):
        figures = [f"loss {row['loss/cross_entropy']:.3f}", f"perplexity {row['perplexity']:,.1f}"]
        found.append(line.text(f"step {k + 1:>3}/400", figures, row, width))
    return found


@pytest.mark.parametrize("width", [80, 140])
def test_columns_keep_their_places_and_lines_their_width(width: int):
    lines = [text.splitlines() for text in shown(width)]
    assert all(len(line) <= width for text in lines for line in text)
    assert len({len(text) for text in lines}) == 1
    for name in ("loss ", "perplexity ", "nll ", "loss/cross_entropy", "loss/z_loss", "loss/mtp_loss"):
        places = {[(k, text[k].find(name)) for k in range(len(text)) if name in text[k]][0] for text in lines}  # noqa: RUF015
        assert len(places) == 1


def test_a_wide_line_is_one_and_a_narrow_one_has_its_parts_below():
    assert [text.count("\n") for text in shown(200)] == [0, 0, 0]
    first, second, third = shown(80)[1].splitlines()
    assert first == "step   2/400  loss 3.840  perplexity 46.7     nll 3.844"
    assert second.startswith("    loss/cross_entropy 3.84 (84.4%)")
    assert third.startswith("    loss/mtp_loss 0.7 (15.4%)")


def test_shares_are_those_of_the_parts_sizes_and_sum_to_one():
    row = {"perplexity": math.e**2, "loss/a": 3.0, "loss/b": -1.0}
    assert plain_loss(row) == ["nll 2.000"]
    assert parts_of(row) == {"loss/a": "loss/a 3 (75.0%)", "loss/b": "loss/b -1 (-25.0%)"}
    assert parts_of({"loss/a": 1.0, "loss/b": None}) == {"loss/a": "loss/a 1", "loss/b": "loss/b nan"}
    assert plain_loss({"loss": 1.0, "perplexity": 2.0}) == []


def test_a_terminal_has_the_parts_below_the_bar(tiny: list[str]):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    display = Display(console, make_task(load_config(tiny)))
    state: Any = SimpleNamespace(global_step=4, max_steps=9, is_world_process_zero=True)
    display.on_train_begin(None, state, None)
    assert display.bar is not None
    try:
        display.on_log(None, state, None, {"loss": 1.0, "tokens_per_second": 1.0, **LOGS[1]})
        below = list(display.bar.get_renderables())[-1]
    finally:
        display.close()
    assert "loss/z_loss 0.0123 (0.3%)" in str(below)


# ── the closing table ─────────────────────────────────────────────────────────────────────────────


def history(*logged: dict[str, Any]) -> History:
    found = History(100)
    for row in logged:
        found.add(row)
    return found


def test_first_best_and_last_of_each_number():
    found = history(
        {"step": 1, "loss": 3.0, "learning_rate": 0.1, "loss/z_loss": None, "accuracy": 0.1},
        {"step": 2, "loss": 1.0, "learning_rate": 0.2, "loss/z_loss": 0.5, "accuracy": 0.3},
        {"step": 3, "loss": 2.0, "learning_rate": 0.1, "loss/z_loss": 0.7, "accuracy": 0.2},
    )
    values = series(found.steps)
    assert list(values) == ["loss", "learning_rate", "loss/z_loss", "accuracy"]
    assert best_of("loss", values["loss"]) == (2, 1.0)
    assert best_of("accuracy", values["accuracy"]) == (2, 0.3)
    assert best_of("loss/z_loss", values["loss/z_loss"]) == (2, 0.5)
    assert best_of("learning_rate", values["learning_rate"]) is None
    console = Console(file=io.StringIO(), width=80)
    console.print(closing_table(found))
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert [line.split() for line in lines[1:3]] == [
        ["loss", "3", "1", "2", "2"],
        ["learning_rate", "0.1", "0.1"],
    ]


def test_the_best_checkpoint_is_named_or_said_to_be_gone():
    kept = [(20, Path("run/checkpoint-20")), (30, Path("run/checkpoint-30"))]
    rising = [{"step": step, "val_loss": loss} for step, loss in ((10, 2.0), (20, 1.0), (30, 1.5))]
    said = best_checkpoint(kept, history(*rising))
    assert said == f"Lowest validation loss 1.0000, after step 20: {kept[0][1]}"
    said = best_checkpoint(kept, history({"step": 10, "val_loss": 0.5}, *rising[1:]))
    assert (
        said == "Lowest validation loss 0.5000, after step 10: its checkpoint was not kept; the last two are."
    )
    assert best_checkpoint(kept, history()) is None


def test_a_run_ends_with_its_table(tiny: list[str], tmp_path: Path):
    text = go([*tiny, "--z_loss=1e-3"])[1]
    logged = [row for row in rows(tmp_path / "run") if "loss" in row]
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    last = logged[-1]["loss/z_loss"]
    assert lines["loss/z_loss"][-1] == f"{last:.4g}"
    lowest = min(row["val_loss"] for row in rows(tmp_path / "run") if "val_loss" in row)
    assert f"Lowest validation loss {lowest:.4f}, after step " in text
