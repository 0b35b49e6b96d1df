"""A loss, gradient or weight that is not finite stops the run before it is saved, or its step is skipped."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from running import go, rows, weights

from lossmith.training.config.reading import load_config
from lossmith.training.errors import UserError
from lossmith.training.run.finite import finite_gradients, finite_weights
from lossmith.training.run.trainer import TaskTrainer, choose_dtype

LEARNS = ["--loss=unified", "--use_mtp", "--adaptive_temperature"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of the run."""
    return tmp_path / "run"


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], what: str, value: float) -> None:
    """Let the loss, or a gradient, of some steps be a value."""
    original = TaskTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        found = original(self, model, inputs, *args, **options)
        if self.state.global_step + 1 not in steps:
            return found
        loss, outputs = found if isinstance(found, tuple) else (found, None)
        weight = next(model.parameters())
        zero = (weight * 0).sum()
        if what == "gradient":
            zero.register_hook(lambda gradient: gradient * value * torch.inf)
        else:
            loss = loss * value
            self.finite.see(loss)
        loss = loss + zero
        return (loss, outputs) if outputs is not None else loss

    monkeypatch.setattr(TaskTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_gradients(value: float):
    layer = torch.nn.Linear(3, 2)
    assert finite_gradients(layer.parameters())
    layer.weight.grad = torch.ones(2, 3)
    layer.bias.grad = torch.tensor([0.0, value])
    assert bool(finite_gradients(layer.parameters())) == math.isfinite(value)
    assert finite_weights(layer)
    layer.bias.data[1] = value
    assert finite_weights(layer) == math.isfinite(value)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_it_stops_before_anything_is_saved(
    what: str, tiny: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
):
    spoil(monkeypatch, {5}, what, math.nan)
    message = r"the loss became nan by step [56], so training stopped\. .*--resume from .*checkpoint-3"
    with pytest.raises(UserError, match=message):
        go(tiny)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]


def test_after_the_last_line_of_the_log_it_is_seen_before_the_checkpoint(
    tiny: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
):
    spoil(monkeypatch, {6}, "gradient", math.nan)
    with pytest.raises(UserError, match=r"became (nan|no finite number) by step 6"):
        go([*tiny, "--log_interval=5", "--sample_tokens=8"])
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_is_skipped_and_counted(
    what: str, tiny: list[str], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flags = [*tiny, *LEARNS, "--on_nonfinite=skip", "--gradient_accumulation_steps=2"]
    with monkeypatch.context() as patch:
        spoil(patch, {2, 5}, what, math.nan)
        code, shown = go([*flags, f"--out_dir={out}"])
    assert code == 0
    assert "warning: 2 steps were skipped: a loss or gradient was not finite." in shown
    steps = [row for row in rows(out) if "loss" in row]
    assert [row.get("skipped_steps") for row in steps] == [None, 1, 1, 1, 2, 2]
    assert all(math.isfinite(row["loss"]) for row in steps)
    assert all(value.isfinite().all() for value in weights(out / "checkpoint-6").values())


def test_a_skipped_step_changes_nothing(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither weights, nor optimizer, nor the state of the loss."""
    found = []
    for last in (1, 2):
        out = tmp_path / str(last)
        with monkeypatch.context() as patch:
            spoil(patch, {2}, "gradient", math.nan)
            go([*tiny, *LEARNS, "--on_nonfinite=skip", f"--max_iters={last}", f"--out_dir={out}"])
        folder = out / f"checkpoint-{last}"
        loss = torch.load(folder / "lossmith_loss.pt", weights_only=True)
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        moments = {f"{k} {name}": value for k, state in optimizer.items() for name, value in state.items()}
        found.append(weights(folder) | loss | moments)
    first, second = found
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_if_nothing_is_wrong_skipping_is_the_same_run(tiny: list[str], tmp_path: Path):
    for how in ("stop", "skip"):
        go([*tiny, *LEARNS, "--dropout=0.1", f"--on_nonfinite={how}", f"--out_dir={tmp_path / how}"])
    first, second = (weights(tmp_path / how / "checkpoint-6") for how in ("stop", "skip"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    losses = [[row.get("loss") for row in rows(tmp_path / how)] for how in ("stop", "skip")]
    assert losses[0] == losses[1]


def test_the_count_goes_on_after_resuming(tiny: list[str], out: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        spoil(patch, {2}, "loss", math.nan)
        go([*tiny, "--on_nonfinite=skip"])
        spoil(patch, {7}, "loss", math.inf)
        shown = go([f"--out_dir={out}", "--resume", "--max_iters=8"])[1]
    assert "2 steps were skipped" in shown
    assert rows(out)[-2]["skipped_steps"] == 2


# ── the precision of accelerate launch ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("launched", "dtype", "expected"),
    [
        ("no", "auto", "float32"),
        ("no", "bfloat16", "bfloat16"),
        ("bf16", "auto", "bfloat16"),
        ("bf16", "bfloat16", "bfloat16"),
        (
            "bf16",
            "float32",
            r"mixed precision bf16, but dtype=float32\. Leave its --mixed_precision",
        ),
        ("fp8", "auto", r"asks for mixed precision fp8, but dtype=auto"),
        ("fp16", "auto", r"dtype=float16 needs a CUDA device"),
    ],
)
def test_what_accelerate_launch_asks_for_is_used_or_refused(
    launched: str, dtype: str, expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    config = load_config(["--device=cpu", f"--dtype={dtype}"])
    if expected in ("float32", "bfloat16"):
        assert choose_dtype(config) == expected
    else:
        with pytest.raises(UserError, match=expected):
            choose_dtype(config)


def test_the_summary_says_what_accelerate_launch_asked_for(tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "cpu, bfloat16" in go(tiny)[1]
