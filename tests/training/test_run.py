"""Whole runs, small: train, look at what is there, stop, resume, evaluate."""

import json
import math
import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import yaml
from running import go, rows, weights

from lossmith.training.config.keys import TrainConfig
from lossmith.training.errors import UserError
from lossmith.training.run.progress import Display
from processes import started_script
from slow_but import slow_but

ROOT = Path(__file__).parents[2]
FIFTY_STEPS = ["--max_iters=50", "--eval_interval=25", "--learning_rate=0.02", "--batch_size=8"]


def interrupt_at(step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deliver a signal in the middle of a run."""
    original = Display.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            signal.raise_signal(number)
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(Display, "on_step_end", on_step_end)


def test_a_run_trains_and_leaves_everything_where_it_says(tiny: list[str], tmp_path: Path):
    out = tmp_path / "run"
    code, shown = go([*tiny, "--z_loss=1e-4", "--max_iters=40", "--eval_interval=20", "--learning_rate=1e-2"])
    assert code == 0

    config = TrainConfig(**yaml.safe_load((out / "config.yaml").read_text()))
    assert (config.max_iters, config.z_loss, config.beta1) == (40, 1e-4, 0.9)
    for step in (20, 40):
        files = {path.name for path in (out / f"checkpoint-{step}").iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "optimizer.pt"} <= files

    logged = rows(out)
    steps = [row for row in logged if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 41))
    saved = json.loads((out / "checkpoint-40" / "config.json").read_text())
    assert saved["pad_token_id"] is None  # or the end-of-text embedding would never learn
    assert saved["eos_token_id"] == 0
    assert set(steps[0]) == {
        "step", "loss", "loss/cross_entropy", "loss/z_loss", "perplexity", "learning_rate", "grad_norm",
        "tokens_per_second",
    }  # fmt: skip
    assert all(row["tokens_per_second"] > 0 for row in steps)
    evaluations = [row for row in logged if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [20, 40]
    assert set(evaluations[0]) == {"step", "val_loss", "perplexity", "bits_per_byte", "val_tokens"}
    assert evaluations[1]["perplexity"] == pytest.approx(math.exp(evaluations[1]["val_loss"]))
    assert evaluations[1]["val_loss"] < evaluations[0]["val_loss"] < math.log(300)

    assert "objective   cross-entropy, z_loss 0.0001" in shown
    assert "log 300 = 5.704" in shown
    assert f"{evaluations[1]['bits_per_byte']:.3f} bits per byte" in shown
    assert "sample" in shown
    assert str(out / "checkpoint-40") in shown


def test_the_schedule_is_a_warm_up_and_a_cosine_to_min_lr(tiny: list[str], tmp_path: Path):
    go(
        [
            *tiny,
            "--max_iters=30",
            "--warmup_iters=10",
            "--learning_rate=0.01",
            "--min_lr=0.001",
            "--eval_interval=99",
        ]
    )
    rates = [row["learning_rate"] for row in rows(tmp_path / "run") if "loss" in row]
    assert rates[5] == pytest.approx(0.005)
    assert rates[10] == max(rates) == pytest.approx(0.01)
    assert rates[20] == pytest.approx(0.0055)
    assert rates[29] == pytest.approx(0.001, rel=0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_resumes_as_if_it_had_never_stopped(
    tiny: list[str], tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
):
    straight, stopped = tmp_path / "straight", tmp_path / "with a space"
    flags = [*tiny, "--dropout=0.2", "--gradient_accumulation_steps=2", "--max_iters=7", "--eval_interval=5"]
    assert go([*flags, f"--out_dir={straight}"])[0] == 0

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        interrupt_at(4, number, patch)
        code, shown = go([*flags, f"--out_dir={stopped}"])
    assert code == 128 + number
    assert "Stopped after step 4 of 7; checkpoint saved" in shown
    assert not (stopped / "checkpoint-5").exists()
    assert signal.getsignal(number) is before

    # the command that was shown, and nothing else, goes on
    command = shlex.split(shown.strip().splitlines()[-1])
    assert command[:2] == ["python", "train.py"]
    with (stopped / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "loss": 1.0}) + "\n")  # as if killed later, without a checkpoint
    assert go(command[2:])[0] == 0

    theirs, ours = weights(straight / "checkpoint-7"), weights(stopped / "checkpoint-7")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-7)
    expected = [row for row in rows(straight) if "loss" in row]
    found = [row for row in rows(stopped) if "loss" in row]
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6, 7]
    for mine, other in zip(found, expected, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert mine["learning_rate"] == other["learning_rate"]


def test_evaluating_alone_gives_what_the_run_ended_with(tiny: list[str], tmp_path: Path):
    go(tiny)
    before = rows(tmp_path / "run")
    code, shown = go([f"--out_dir={tmp_path / 'run'}", "--eval_only", "--batch_size=3"])
    assert code == 0
    assert f"{before[-1]['bits_per_byte']:.3f} bits per byte" in shown
    assert rows(tmp_path / "run") == before  # it looks, and leaves no trace


def test_nothing_left_to_resume(tiny: list[str], tmp_path: Path):
    go(tiny)
    with pytest.raises(
        UserError, match=r"nothing left to train: .* step 6, max_iters=6\. Pass --max_iters=12"
    ):
        go([f"--out_dir={tmp_path / 'run'}", "--resume"])
    code, shown = go([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=8"])
    assert code == 0
    assert "Resuming from" in shown


def test_a_checkpoint_that_was_cut_short_is_passed_over(tiny: list[str], tmp_path: Path):
    go(tiny)
    (tmp_path / "run" / "checkpoint-6" / "trainer_state.json").unlink()
    assert "checkpoint-3 (step 3)" in go([f"--out_dir={tmp_path / 'run'}", "--eval_only"])[1]
    (tmp_path / "run" / "checkpoint-3" / "trainer_state.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        go([f"--out_dir={tmp_path / 'run'}", "--eval_only"])


def test_a_new_run_sets_the_old_one_aside_and_touches_nothing_else(tiny: list[str], tmp_path: Path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    go([*tiny, "--seed=1"])
    first = weights(out / "checkpoint-6")
    shown = go([*tiny, "--seed=2"])[1]
    assert f"The earlier run in {out} is now in {out / 'previous-1'}" in shown
    kept = weights(out / "previous-1" / "checkpoint-6")
    assert all(torch.equal(kept[name], value) for name, value in first.items())
    assert [row["step"] for row in rows(out) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert (out / "notes.txt").read_text() == "mine"


def test_the_same_seed_gives_the_same_run(tiny: list[str], tmp_path: Path):
    for name in "ab":
        go([*tiny, f"--out_dir={tmp_path / name}"])
    first, second = (weights(tmp_path / name / "checkpoint-6") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bfloat16(tiny: list[str], tmp_path: Path):
    code, shown = go([*tiny, "--dtype=bfloat16"])
    assert code == 0
    assert "cpu, bfloat16" in shown
    assert {value.dtype for value in weights(tmp_path / "run" / "checkpoint-6").values()} == {torch.float32}


def test_a_loss_that_is_no_number_stops_the_run(tiny: list[str]):
    with pytest.raises(UserError, match=r"the loss became (nan|inf) by step"):
        go([*tiny, "--learning_rate=1e30", "--grad_clip=0", "--warmup_iters=0"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--out_dir=/dev/null/run", "out_dir=/dev/null/run cannot be written to"),
        ("--dataset=nowhere", "dataset 'nowhere' was not found"),
        ("--vocab_size=100000", "vocab_size=100000 is too large"),
        ("--block_size=100000", "block_size=100000"),
        ("--dtype=float16", "dtype=float16 needs a CUDA device"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    tiny: list[str], tmp_path: Path, flag: str, message: str
):
    with pytest.raises(UserError, match=message):
        go([*tiny, flag])
    assert not list(tmp_path.rglob("checkpoint-*"))
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has it")
def test_a_device_that_is_not_there(tiny: list[str]):
    with pytest.raises(UserError, match=r"device=cuda is not available .*; available: .*cpu"):
        go([*tiny, "--device=cuda"])


def test_wandb_when_it_is_not_installed(tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "wandb" else find_spec(n, *a))
    with pytest.raises(UserError, match=r"pip install 'lossmith\[track\]'"):
        go([*tiny, "--wandb_log"])


def test_ctrl_c_in_a_process_of_its_own(tiny: list[str], tmp_path: Path):
    flags = [*tiny, "--max_iters=100000", "--eval_interval=100000"]
    log, output, errors = tmp_path / "run" / "log.jsonl", tmp_path / "output", tmp_path / "errors"
    process = started_script(ROOT / "train.py", flags, output, errors)
    try:
        deadline = time.monotonic() + 120
        while not (log.is_file() and log.read_text().count("\n") > 3):
            assert process.is_alive(), errors.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
    finally:
        process.kill()
    shown, complaints = output.read_text(), errors.read_text()
    assert process.exitcode == 130, complaints
    assert complaints == ""
    step = int(re.search(r"Stopped after step (\d+) of 100000", shown)[1])  # pyright: ignore[reportOptionalSubscript]
    assert (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").is_file()
    assert f"python train.py --out_dir={tmp_path / 'run'} --resume" in shown


EXAMPLES = sorted(path.stem for path in (ROOT / "config").glob("*.py"))


@pytest.mark.parametrize("name", slow_but(["train_small", "loss_modifiers", "unified_production"], EXAMPLES))
def test_the_example_configs_train(name: str, tiny: list[str], tmp_path: Path):
    """Fifty steps of each, at a small size."""
    out = tmp_path / "example"
    code, shown = go([str(ROOT / "config" / f"{name}.py"), *tiny, *FIFTY_STEPS, f"--out_dir={out}"])
    assert code == 0
    assert "All held-out text, after step 50: validation loss" in shown
    assert "warning" not in shown
    losses = [row["loss"] for row in rows(out) if "loss" in row]
    assert len(losses) == 50
    assert all(value is not None and math.isfinite(value) for value in losses)
    assert sum(losses[-10:]) < sum(losses[:10])


def test_a_resumed_run_goes_by_its_own_settings(tiny: list[str], tmp_path: Path):
    """The optimizer, the schedule and the intervals in the checkpoint are those of the run before."""
    out = tmp_path / "run"
    flags = [*tiny, "--max_iters=12", "--warmup_iters=0", "--eval_interval=6"]
    go(flags)
    changed = {"learning_rate": 1e-5, "min_lr": 1e-5, "weight_decay": 0.5, "beta1": 0.5, "log_interval": 3}
    go([f"--out_dir={out}", "--resume", "--max_iters=24", *(f"--{k}={v}" for k, v in changed.items())])
    resumed = [row for row in rows(out) if row["step"] > 12 and "loss" in row]
    assert [row["step"] for row in resumed] == [15, 18, 21, 24]
    assert all(row["learning_rate"] == pytest.approx(1e-5) for row in resumed)
    groups = torch.load(out / "checkpoint-24" / "optimizer.pt", weights_only=True)["param_groups"]
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.5]
    assert all(tuple(group["betas"]) == (0.5, 0.99) for group in groups)


def test_the_first_step_of_a_resumed_run_has_its_own_learning_rate(tiny: list[str], tmp_path: Path):
    """The checkpoint's would move every weight by a thousandth."""
    out = tmp_path / "run"
    go([*tiny, "--max_iters=6", "--warmup_iters=0", "--min_lr=0.002", "--weight_decay=0"])
    flags = ["--learning_rate=1e-9", "--min_lr=0", "--max_iters=7"]
    go([f"--out_dir={out}", "--resume", *flags])
    before, after = weights(out / "checkpoint-6"), weights(out / "checkpoint-7")
    assert max((after[name] - value).abs().max().item() for name, value in before.items()) < 1e-7
    assert rows(out)[-2]["learning_rate"] < 1e-9


@pytest.mark.slow
def test_an_evaluation_on_the_way_is_as_long_as_was_asked_for(tiny: list[str], tmp_path: Path):
    """A batch has four windows of at most 15 predicted tokens; the last evaluation is of everything."""
    found = {}
    for batches in (1, 2, 0):
        out = tmp_path / str(batches)
        go([*tiny, f"--eval_iters={batches}", f"--out_dir={out}"])
        found[batches] = [row["val_tokens"] for row in rows(out) if "val_loss" in row]
    everything = found[0][0]
    assert everything > 2 * 60
    assert found == {0: [everything] * 2, 1: [found[1][0], everything], 2: [found[2][0], everything]}
    assert 30 < found[1][0] <= 60 < found[2][0] <= 120


def test_the_last_two_checkpoints_are_kept(tiny: list[str], tmp_path: Path):
    go([*tiny, "--max_iters=9", "--eval_interval=2"])
    kept = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert kept == {"checkpoint-8", "checkpoint-9"}


def test_the_best_checkpoint_is_kept(tiny: list[str], tmp_path: Path):
    """Steps that are far too long: the first evaluation has the lowest loss."""
    out = tmp_path / "run"
    long = ["--learning_rate=1.5", "--min_lr=1.5", "--warmup_iters=0", "--eval_interval=1", "--eval_iters=0"]
    go([*tiny, *long, "--max_iters=4"])
    losses = {row["step"]: row["val_loss"] for row in rows(out) if "val_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert best < 3
    kept = {f"checkpoint-{best}", "checkpoint-3", "checkpoint-4"}
    assert {path.name for path in out.glob("checkpoint-*")} == kept
    said = go([f"--out_dir={out}", "--resume", "--max_iters=6"])[1]
    assert {path.name for path in out.glob("checkpoint-*")} == {
        f"checkpoint-{best}",
        "checkpoint-5",
        "checkpoint-6",
    }
    assert f"after step {best}: " in said
    assert f"checkpoint-{best}" in said


def test_the_perplexity_of_a_step_is_plain_whatever_the_objective(tiny: list[str], tmp_path: Path):
    """Equal seeds see equal first blocks with equal weights, so the first step's perplexity is equal too."""
    shown = []
    for k, options in enumerate(([], ["--confidence_penalty=2", "--focal_gamma=4", "--temperature=0.5"])):
        out = tmp_path / str(k)
        go([*tiny, f"--out_dir={out}", "--max_iters=2", *options])
        shown.append(rows(out)[0])
    plain, other = shown
    assert other["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)
    assert plain["perplexity"] == pytest.approx(math.exp(plain["loss"]), rel=1e-5)
    assert other["loss"] != pytest.approx(plain["loss"], rel=0.01)


def test_a_loss_that_is_no_number_is_noticed_by_the_evaluation_before_it_is_saved(
    tiny: list[str], tmp_path: Path
):
    broken = ["--learning_rate=1e30", "--min_lr=0", "--grad_clip=0", "--warmup_iters=0", "--max_iters=20"]
    with pytest.raises(UserError, match="validation loss became nan"):
        go([*tiny, *broken, "--log_interval=20", "--eval_interval=5"])
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_log_line_that_was_cut_short_does_not_stop_a_resumed_run(tiny: list[str], tmp_path: Path):
    out = tmp_path / "run"
    go(tiny)
    with (out / "log.jsonl").open("a") as log:
        log.write('[]\n{"step": 6, "lo')
    go([f"--out_dir={out}", "--resume", "--max_iters=9"])
    assert rows(out)[-1]["step"] == 9
