"""Loss modifiers in a run: what acts, what is logged where, and that evaluation is plain."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from every_mode import MODES, make_task
from running import go, rows, weights
from torch.utils.data import DataLoader

import lossmith
from lossmith.modifiers.config import ALIASES, KEYS
from lossmith.training.config.reading import load_config
from lossmith.training.config.saved_run import save_config
from lossmith.training.errors import UserError
from lossmith.training.run.loss_modifiers import add_modifiers
from slow_but import slow_but

ROOT = Path(__file__).parents[2]
ON = "--loss_modifiers_enabled"
SEVERAL = [ON, "--entropy_modifier_enabled", "--target_smoothing_enabled", "--mask_ratio_weight_enabled"]


# ── keys ──────────────────────────────────────────────────────────────────────────────────────────


def test_every_key_of_the_modifiers_is_a_key_of_the_trainer():
    config = asdict(load_config([]))
    assert {name: config[name] for name in KEYS} == {name: spec.default for name, spec in KEYS.items()}


@pytest.mark.parametrize("text", ["0,1,2", "[0,1,2]", "(0, 1, 2)", "[0, 1, 2,]"])
def test_token_ids_as_a_flag(text: str, tmp_path: Path):
    config = load_config([f"--out_dir={tmp_path}", f"--target_smoothing_special_tokens={text}"])
    assert config.target_smoothing_special_tokens == (0, 1, 2)  # pyright: ignore
    save_config(config)
    again = load_config([f"--out_dir={tmp_path}", "--resume"])
    assert again.target_smoothing_special_tokens == (0, 1, 2)  # pyright: ignore


@pytest.mark.parametrize(("text", "ids"), [("7", (7,)), ("[]", ())])
def test_one_token_id_or_none(text: str, ids: tuple[int, ...]):
    assert load_config([f"--target_smoothing_special_tokens={text}"]).target_smoothing_special_tokens == ids  # pyright: ignore


@pytest.mark.parametrize("alias", ALIASES)
def test_other_names_of_keys(alias: str, tmp_path: Path):
    key = ALIASES[alias]
    value: object = True if KEYS[key].type is bool else 3.5
    file = tmp_path / "run.py"
    file.write_text(f"{alias} = {value!r}\n")
    assert getattr(load_config([str(file)]), key) == value
    assert getattr(load_config([f"--{alias}={value}"]), key) == value
    assert getattr(load_config([f"--{alias}", str(value)]), key) == value
    with pytest.raises(UserError, match=f"{alias} and {key} are two names of one key"):
        load_config([f"--{alias}={value}", f"--{key}={value}"])
    file.write_text(f"{key} = {value!r}\n{alias} = {value!r}\n")
    with pytest.raises(UserError, match=rf"run\.py:1 and .*run\.py:2: {key} and {alias} are two names"):
        load_config([str(file)])


def test_a_flag_wins_over_the_file_by_either_name(tmp_path: Path):
    file = tmp_path / "run.py"
    file.write_text("mask_ratio_weight_max_weight = 5.0\n")
    config = load_config([str(file), "--mask_ratio_weight_max=7"])
    assert config.mask_ratio_weight_max_weight == 7  # pyright: ignore


def test_a_switch_by_its_other_name_may_stand_alone():
    assert load_config(["--entropy_modifier_debug"]).entropy_modifier_verbose is True  # pyright: ignore


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--entropy_modifier_threshold=2", "entropy_modifier_threshold=2.0 is out of range"),
        ("--target_smoothing_factor=1", "expected target_smoothing_factor >= 0 and < 1"),
        ("--mask_ratio_weight_pwoer=1", "Did you mean mask_ratio_weight_power"),
        ("--mask_ratio_weight_mx=1", "Did you mean mask_ratio_weight_max"),
        ("--entropy_modifier_direction=up", "expected one of concentrated, uniform"),
        ("--mask_ratio_weight_max=lots", "--mask_ratio_weight_max: .* expects a number; came 'lots'"),
        ("--target_smoothing_special_tokens=-1", r"is out of range; expected .*special_tokens >= 0"),
        ("--target_smoothing_special_tokens=a,b", r"expects token ids; came 'a,b' \(str\)"),
        ("--target_smoothing_special_tokens=[0,1.5]", "expects token ids"),
        ("--target_smoothing_special_tokens=[True]", "expects token ids"),
    ],
)
def test_mistakes_name_the_key(flag: str, message: str):
    with pytest.raises(UserError, match=message):
        load_config([flag])


# ── what acts ─────────────────────────────────────────────────────────────────────────────────────


def test_the_line_at_the_start(tiny: list[str]):
    shown = go([str(ROOT / "config" / "loss_modifiers.py"), *tiny])[1]
    assert "\nEnabled loss modifiers: EntropyModifier, TargetSmoothingModifier\n" in shown
    assert "without effect" not in shown
    assert "loss modifiers" not in go(tiny)[1].lower()


def test_what_does_not_apply_is_said(tiny: list[str]):
    flags = [*tiny, *MODES["scorer"], ON, "--sequence_variance_enabled", "--entropy_modifier_enabled"]
    shown = go(flags)[1]
    assert "\nEnabled loss modifiers: SequenceScorerVarianceModifier\n" in shown
    assert "\nNot for mode=sequence_scorer, so without effect: EntropyModifier\n" in shown
    shown = go([*tiny, "--entropy_modifier_enabled"])[1]
    assert "warning: entropy_modifier_enabled has no effect without loss_modifiers_enabled=True" in shown
    assert "Enabled" not in shown


@pytest.mark.parametrize("mode", slow_but(["causal", "scorer"], MODES))
def test_what_only_measures_changes_nothing(mode: str, tiny: list[str], tmp_path: Path):
    """Neither does the master switch alone: the same weights to the last bit."""
    found = []
    for i, flags in enumerate(([], [ON], [ON, "--metrics_collector_enabled"])):
        out = tmp_path / str(i)
        go([*tiny, *MODES[mode], *flags, f"--out_dir={out}"])
        found.append(weights(out / "checkpoint-6"))
    plain, *others = found
    for other in others:
        assert all(torch.equal(other[name], value) for name, value in plain.items())
    prefix = "loss_modifiers/MetricsCollectorModifier."
    collected = [name for name in rows(tmp_path / "2")[0] if name.startswith(prefix)]
    measured = "mean_absolute_error" if mode == "scorer" else "nll"
    assert prefix + measured in collected
    assert not [name for name in rows(tmp_path / "1")[0] if name.startswith("loss_modifiers/")]


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("causal", SEVERAL[:3]),
        ("masked", SEVERAL),
        ("classifier", SEVERAL),
        ("scorer", [ON, "--sequence_variance_enabled", "--sequence_correlation_enabled"]),
    ],
)
def test_modifiers_change_the_training_and_not_the_evaluation(
    mode: str, flags: list[str], tiny: list[str], tmp_path: Path
):
    plain, modified = tmp_path / "plain", tmp_path / "modified"
    go([*tiny, *MODES[mode], f"--out_dir={plain}"])
    strong = "--target_smoothing_factor=0.5"
    code, shown = go([*tiny, *MODES[mode], f"--out_dir={modified}", *flags, strong])
    assert code == 0
    first, other = rows(plain)[0], rows(modified)[0]
    assert other["grad_norm"] != pytest.approx(first["grad_norm"], rel=0.01)
    measure = next(iter(set(first) - {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"}))
    assert other[measure] == pytest.approx(first[measure], rel=1e-6)  # of the same model

    # the evaluation is what a task without modifiers measures
    task = make_task(load_config([*tiny, *MODES[mode]]))
    model = task.load_model(modified / "checkpoint-6")
    measures = task.evaluate(model, DataLoader(task.held_out, batch_size=4))
    assert rows(modified)[-1]["val_loss"] == pytest.approx(measures["loss"], rel=1e-6)
    assert "Enabled loss modifiers" in shown


def test_a_run_with_modifiers_resumes(tiny: list[str], tmp_path: Path):
    out = tmp_path / "run"
    go([*tiny, *MODES["masked"], *SEVERAL, "--target_smoothing_special_tokens=0,1"])
    shown = go([f"--out_dir={out}", "--resume", "--max_iters=9"])[1]
    names = "EntropyModifier, TargetSmoothingModifier, MaskRatioWeightModifier"
    assert f"Enabled loss modifiers: {names}" in shown
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, 10))


def test_values_that_do_not_go_together(tiny: list[str], tmp_path: Path):
    flags = [ON, "--mask_ratio_weight_enabled", "--mask_ratio_weight_max=0.01"]
    with pytest.raises(UserError, match=r"mask_ratio_weight_min_weight=0\.1 is above"):
        go([*tiny, *flags])
    assert not list(tmp_path.rglob("config.yaml"))


# ── where the metrics go ──────────────────────────────────────────────────────────────────────────

METRIC = "loss_modifiers/EntropyModifier.sample_mean_entropy"


def test_metrics_reach_the_log_and_tensorboard(tiny: list[str], tmp_path: Path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    flags = [*tiny, ON, "--entropy_modifier_enabled", "--tensorboard_log"]
    go(flags)
    steps = [row for row in rows(out) if "loss" in row]
    assert all(0 < row[METRIC] <= 1 for row in steps)
    assert not [name for row in rows(out) if "val_loss" in row for name in row if "/" in name]

    def read() -> dict[str, dict[int, float]]:
        events = accumulators.EventAccumulator(str(out / "tensorboard")).Reload()
        return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}

    written = read()
    for name, key in (("train/loss", "loss"), (METRIC, METRIC), ("train/perplexity", "perplexity")):
        assert written[name] == pytest.approx({row["step"]: row[key] for row in steps}, rel=1e-5)
    evaluations = [row for row in rows(out) if "val_loss" in row]
    assert written["val/loss"] == pytest.approx({row["step"]: row["val_loss"] for row in evaluations})
    assert set(written) >= {"val/perplexity", "val/bits_per_byte", "train/learning_rate"}

    # a new run does not mix with it; a resumed one goes on
    go([*flags, "--max_iters=3"])
    assert list(read()["train/loss"]) == [1, 2, 3]
    assert (out / "previous-1" / "tensorboard").is_dir()
    go([f"--out_dir={out}", "--resume", "--max_iters=5"])
    assert list(read()["train/loss"]) == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_weights_and_biases_offline(tiny: list[str], tmp_path: Path):
    """In a process of its own, since the library keeps its state in the process."""
    pytest.importorskip("wandb")
    home, out = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    flags = [*tiny, ON, "--entropy_modifier_enabled", "--wandb_log", "--wandb_project=mine", "--max_iters=3"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags],
        cwd=home,
        env={**os.environ, "WANDB_MODE": "offline", "HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (out / "wandb").glob("offline-run-*")
    (record,) = folder.glob("run-*.wandb")
    content = record.read_bytes()
    for name in (METRIC, "train/loss", "val/bits_per_byte", "entropy_modifier_enabled", "mine"):
        assert name.encode() in content
    assert not list(home.glob("wandb"))


@pytest.mark.parametrize(("key", "package"), [("wandb_log", "wandb"), ("tensorboard_log", "tensorboard")])
def test_a_tracker_that_is_not_installed(
    key: str, package: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == package else find(n, *a))
    message = rf"{key}=True needs the {package} package; `pip install 'lossmith\[track\]'`"
    with pytest.raises(UserError, match=message):
        go([*tiny, f"--{key}"])
    assert not list(tmp_path.rglob("config.yaml"))


def test_verbose_modifiers_are_shown_and_heard_no_longer_than_the_run(tiny: list[str]):
    logger = logging.getLogger("lossmith.modifiers")
    before = (logger.level, list(logger.handlers))
    flags = [*tiny, ON, "--entropy_modifier_enabled"]
    assert "sample weights from" not in go(flags)[1]
    shown = go([*flags, "--entropy_modifier_debug"])[1]
    assert shown.count("entropy: ") == 6  # a line a batch
    assert "sample weights from" in shown
    assert (logger.level, list(logger.handlers)) == before


# ── the judge ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def scorer(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a scorer of the tiny text."""
    out = tmp_path_factory.mktemp("scorer")
    keys = {"vocab_size": 300, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "max_iters": 3}
    flags = [f"--{name}={value}" for name, value in keys.items()]
    go([*MODES["scorer"], f"--dataset={text_file}", f"--out_dir={out}", *flags, "--device=cpu"])
    return out / "checkpoint-3"


def judged(tiny: list[str], checkpoint: object) -> list[str]:
    on = [ON, "--judge_weight_modifier_enabled", f"--judge_weight_checkpoint={checkpoint}"]
    return [*tiny, *MODES["masked"], *on]


def test_a_scorer_judges_a_masked_language_model(tiny: list[str], tmp_path: Path, scorer: Path):
    """With all modifiers on, each of them does what it says."""
    everything = [*judged(tiny, scorer), *SEVERAL, "--metrics_collector_enabled"]
    code, shown = go(everything)
    assert code == 0
    assert "TargetSmoothingModifier, MaskRatioWeightModifier, SequenceScoringJudgeWeightModifier" in shown
    row = rows(tmp_path / "run")[0]
    found = {name.removeprefix("loss_modifiers/"): value for name, value in row.items() if "/" in name}
    assert all(value is not None and math.isfinite(value) for value in found.values())
    judge = {k.partition(".")[2]: v for k, v in found.items() if k.startswith("SequenceScoring")}
    assert 0 < judge["min_wrongness"] <= judge["mean_wrongness"] <= judge["max_wrongness"] < 1
    assert 0.1 <= judge["min_factor"] <= judge["mean_factor"] <= judge["max_factor"] <= 10
    assert judge["min_factor"] < judge["max_factor"]
    assert found["EntropyModifier.weight_mean"] == pytest.approx(1, abs=1e-5)
    assert found["MaskRatioWeightModifier.min_weight"] >= 1
    assert found["TargetSmoothingModifier.smoothed_loss"] != found["TargetSmoothingModifier.original_loss"]
    assert found["MetricsCollectorModifier.nll"] == pytest.approx(math.log(row["perplexity"]), rel=1e-4)

    # the judge is not a part of what is saved
    task = make_task(load_config(everything))
    assert weights(tmp_path / "run" / "checkpoint-6").keys() <= task.build_model().state_dict().keys()


@pytest.mark.parametrize(("device", "dtype"), [("meta", "bfloat16"), ("cpu", "float16"), ("cpu", "float32")])
def test_the_judge_is_where_the_run_is(
    device: str, dtype: str, tiny: list[str], scorer: Path, monkeypatch: pytest.MonkeyPatch
):
    given = {}
    make = lossmith.create_loss_modifier_pipeline

    def pipeline(config: dict, **options: object) -> lossmith.LossModifierPipeline:
        given.update(config)
        return make({**config, "device": "cpu"}, **options)  # nothing can be loaded onto meta

    monkeypatch.setattr(lossmith, "create_loss_modifier_pipeline", pipeline)
    task = make_task(load_config(judged(tiny, scorer)))
    add_modifiers(task, device, dtype)
    assert (given["device"], given["dtype"]) == (device, dtype)
    (judge,) = (m.judge for m in task.pipeline.modifiers)  # pyright: ignore
    assert {str(p.dtype) for p in judge.model.parameters()} == {f"torch.{dtype}"}


def test_the_judge_sees_what_the_run_sees(tiny: list[str], scorer: Path):
    judge = lossmith.SequenceScoringJudgeWeightModifier({"checkpoint": str(scorer)}).judge
    assert judge.cls_token_id == 2  # pyright: ignore
    assert judge.block_size == 17  # pyright: ignore
    assert judge.vocab_size == 300  # pyright: ignore


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nowhere", "nowhere does not exist"),
        ("nothing", "needs a judge"),
        (
            "vocabulary",
            "has another tokenizer than this run: .* train it with the same --dataset and --vocab",
        ),
    ],
)
def test_a_judge_that_cannot_be_used(
    change: str, message: str, tiny: list[str], tmp_path: Path, scorer: Path
):
    paths = {"nowhere": tmp_path / "nowhere", "nothing": ""}
    flags = judged(tiny, paths.get(change, scorer))
    if change == "vocabulary":
        flags += ["--vocab_size=290"]
    with pytest.raises(UserError, match=message):
        go(flags)
    assert not list((tmp_path / "run").glob("config.yaml"))


def test_a_judge_that_is_no_scorer(tiny: list[str], tmp_path: Path):
    go([*tiny, *MODES["masked"], "--max_iters=3", f"--out_dir={tmp_path / 'other'}"])
    with pytest.raises(UserError, match="is a ModernBertForMaskedLM; expected a model for sequence"):
        go(judged(tiny, tmp_path / "other" / "checkpoint-3"))


def test_a_judge_whose_tokenizer_is_damaged(tiny: list[str], tmp_path: Path, scorer: Path):
    judge = tmp_path / "judge"
    shutil.copytree(scorer, judge)
    (judge / "tokenizer_config.json").unlink()
    assert go(judged(tiny, judge))[0] == 0
    (judge / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged; expected the judge's tokenizer"):
        go(judged(tiny, judge))


def test_a_judge_that_cannot_be_used_is_one_line_and_exit_code_2(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
):
    from lossmith.training import cli

    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *judged(tiny, "/nowhere/at/all")])
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert shown.err.startswith("error: judge checkpoint /nowhere/at/all does not exist")
    assert shown.err.count("\n") == 1


def test_evaluating_needs_no_judge(tiny: list[str], tmp_path: Path, scorer: Path):
    out = tmp_path / "run"
    go(judged(tiny, scorer))
    path = out / "config.yaml"
    path.write_text(path.read_text().replace(str(scorer), "/gone"))
    code, shown = go([f"--out_dir={out}", "--eval_only"])
    assert code == 0
    assert f"{json.loads((out / 'log.jsonl').read_text().splitlines()[-1])['val_loss']:.3f}" in shown
