"""What an objective measures of its parts reaches the log: every metric called `part/...`."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from running import go, rows

import lossmith
from lossmith.training.config import objective

WATCHED = {
    "cross_entropy/highest",
    "cross_entropy/num_tokens",
    "idle/never_a_part",
    "cross_entropy/no_number",
}


class Watched(lossmith.CrossEntropyLoss):
    """Cross-entropy that measures its tokens, one thing when somebody looks and one right away."""

    def complete(self, output: lossmith.LossOutput, inputs: Mapping[str, Any]) -> lossmith.LossOutput:
        output = super().complete(output, inputs)
        losses = output.contributions
        measured = {
            "cross_entropy/highest": losses.max,
            "cross_entropy/num_tokens": output.num_tokens.detach(),
            "idle/never_a_part": 7.0,
            "cross_entropy/no_number": lambda: torch.tensor(math.nan),
        }
        return replace(output, metrics=output.metrics | lossmith.Metrics(measured))


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--objective=masked"],
        ["--mode=token_classifier"],
        ["--materialize_logits"],
        ["--gradient_accumulation_steps=2"],
        ["--loss_modifiers_enabled", "--target_smoothing_enabled", "--entropy_modifier_enabled"],
    ],
)
def test_metrics_of_parts_are_logged(
    flags: list[str], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(objective.CONSTRUCTORS, "cross_entropy", Watched)
    go([*tiny, *flags])
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert len(steps) == 6
    for row in steps:
        assert {name for name in row if "/" in name and not name.startswith("loss")} == WATCHED
        assert row["cross_entropy/num_tokens"] == row["cross_entropy/num_tokens"] // 1 > 0
        assert row["cross_entropy/highest"] > 0
        assert row["idle/never_a_part"] == 7
        assert row["cross_entropy/no_number"] is None
    assert not [name for row in rows(tmp_path / "run") if "val_loss" in row for name in row if "/" in name]


def test_they_reach_the_trackers_by_the_same_names(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setitem(objective.CONSTRUCTORS, "cross_entropy", Watched)
    go([*tiny, "--tensorboard_log"])
    events = accumulators.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = {row["step"]: row["cross_entropy/highest"] for row in rows(tmp_path / "run") if "loss" in row}
    written = {e.step: e.value for e in events.Scalars("cross_entropy/highest")}
    assert written == pytest.approx(logged, rel=1e-6)


def test_other_runs_log_what_they_did(tiny: list[str], tmp_path: Path):
    go([*tiny, "--loss=unified", "--use_ngram_penalty", "--ngram_size=1"])
    first = rows(tmp_path / "run")[0]
    assert {name for name in first if "/" in name} == {"loss/cross_entropy", "loss/ngram_penalty"}


def test_nothing_of_a_batch_is_kept_for_metrics_that_nobody_gives(tiny: list[str]):
    from every_mode import make_task

    from lossmith.training.config.reading import load_config

    task = make_task(load_config(tiny))
    model = task.make_model()
    batch = task.held_out[0]
    model.train()(**{name: value[None] for name, value in batch.items()})
    assert task.part_metrics() == {}


@pytest.mark.slow
def test_a_compiled_run_logs_them_too(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(objective.CONSTRUCTORS, "cross_entropy", Watched)
    go([*tiny, "--max_iters=3", f"--out_dir={tmp_path / 'eager'}"])
    go([*tiny, "--max_iters=3", "--compile", f"--out_dir={tmp_path / 'compiled'}"])
    eager, compiled = (
        [{name: row[name] or 0.0 for name in WATCHED} for row in rows(tmp_path / kind) if "loss" in row]
        for kind in ("eager", "compiled")
    )
    assert compiled == [pytest.approx(row, rel=1e-4) for row in eager]
