"""Findings: planted faults are found, each by its own name, and healthy runs give no alarm."""

import io
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")

from every_mode import MODES
from rich.console import Console
from running import findings_of, go

from lossmith.training.config.reading import load_config
from lossmith.training.run.findings import (
    History,
    Limit,
    far_from_knowing_nothing,
    find,
    too_small_a_text,
)
from lossmith.training.run.progress import LogFile
from lossmith.training.run.telling import TellFindings, limits_of

Curve = Callable[[float], float]  # of the share of the run that is over
LIMITS = (
    Limit("loss_modifiers/M.min_weight", 0.1, "m_min_weight"),
    Limit("loss_modifiers/M.max_weight", 10.0, "m_max_weight"),
)


def falling(start: float, end: float) -> Curve:
    """A loss as it falls in healthy runs: fast, then ever more slowly."""
    return lambda t: end + (start - end) * (1 + 30 * t) ** -0.7


def healthy(start: float = 7.6, end: float = 3.0) -> Curve:
    return falling(start, end)


def run_of(
    loss: Curve,
    validation: Curve | None = None,
    parts: dict[str, Curve] | None = None,
    *,
    noise: float = 0.03,
    num: int = 100,
    seed: int = 0,
    rate: Curve = lambda t: 2e-3 * (0.55 + 0.45 * math.cos(math.pi * t)),
    others: dict[str, Curve] | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of a run of 10 `num` steps, with an evaluation after every tenth row."""
    draw = random.Random(seed)
    for k in range(1, num + 1):
        t = k / num
        row = {"step": 10 * k, "loss": loss(t) * (1 + noise * draw.gauss(0, 1)), "learning_rate": rate(t)}
        row |= {name: curve(t) for name, curve in (others or {}).items()}
        yield row | {f"loss/{name}": curve(t) for name, curve in (parts or {}).items()}
        if validation is not None and k % (num // 10) == 0:
            value = validation(t) * (1 + noise / 10 * draw.gauss(0, 1))
            yield {"step": 10 * k, "val_loss": value, "val_tokens": 1000}


def found(log: Iterator[dict[str, Any]]) -> dict[str, int]:
    """What is found in a log, and at which step first."""
    history, said = History(1000, LIMITS), {}
    for row in log:
        history.add(row)
        for name, text in find(history):
            assert text[0].isupper() or text.startswith(("loss", "m_"))
            assert text.endswith(".")
            said.setdefault(name, history.step)
    return said


def constant(value: float) -> Curve:
    return lambda _: value


def jump(at: float, before: float, after: float) -> Curve:
    return lambda t: before if t < at else after


FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "learned by heart": (
        "over-fitting",
        {"loss": falling(7.6, 0.1), "validation": lambda t: 4 + 5 * (t - 0.3) ** 2},
    ),
    "slowly learned by heart": (
        "over-fitting",
        {"loss": falling(7.6, 2.5), "validation": lambda t: 4.2 + 0.6 * abs(t - 0.4)},
    ),
    "a scorer that over-fits": (
        "over-fitting",
        {"loss": falling(0.12, 0.001), "validation": lambda t: 0.03 + 0.05 * abs(t - 0.3)},
    ),
    "blows up": ("divergence", {"loss": lambda t: healthy()(t) + (0 if t < 0.5 else 4)}),
    "drifts up": ("divergence", {"loss": lambda t: healthy()(t) + max(0, t - 0.4) * 8}),
    "rises from the start": ("divergence", {"loss": lambda t: 7.6 + 10 * t}),
    "never learns": ("plateau", {"loss": constant(7.6), "noise": 0.001}),
    "stops learning": ("plateau", {"loss": lambda t: healthy()(min(t, 0.2)), "noise": 0.002}),
    "a z-loss too strong": (
        "dominates:loss/z_loss",
        {"loss": constant(90), "parts": {"cross_entropy": healthy(), "z_loss": constant(85)}},
    ),
    "a reward of entropy that takes over": (
        "dominates:loss/penalty",
        {
            "loss": healthy(),
            "parts": {"cross_entropy": healthy(), "penalty": jump(0.5, -0.1, -60)},
        },
    ),
    "a part that is 0": (
        "does nothing:loss/ngram_penalty",
        {"loss": healthy(), "parts": {"cross_entropy": healthy(), "ngram_penalty": constant(0.0)}},
    ),
    "a part that dies": (
        "does nothing:loss/mtp_loss",
        {"loss": healthy(), "parts": {"cross_entropy": healthy(), "mtp_loss": jump(0.4, 0.3, 0.0)}},
    ),
    "weights at their lower limit": (
        "clamp:loss_modifiers/M.min_weight",
        {"loss": healthy(), "others": {"loss_modifiers/M.min_weight": constant(0.1)}},
    ),
    "weights at their upper limit": (
        "clamp:loss_modifiers/M.max_weight",
        {"loss": healthy(), "others": {"loss_modifiers/M.max_weight": jump(0.6, 9.0, 10.0)}},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str):
    name, planted = FAULTS[fault]
    said = found(run_of(**planted))
    assert name in said
    if name != "divergence":
        assert set(said) == {name}


HEALTHY: dict[str, dict[str, Any]] = {
    "plain": {"loss": healthy(), "validation": falling(7.6, 3.4)},
    "noisy": {"loss": healthy(), "validation": falling(7.6, 3.4), "noise": 0.1},
    "long": {"loss": falling(10.8, 2.9), "validation": falling(10.8, 3.0), "num": 1000, "noise": 0.01},
    "a constant learning rate": {"loss": falling(10.8, 2.9), "rate": constant(1e-3), "num": 500},
    "validation levels off": {"loss": falling(7.6, 3.0), "validation": falling(7.6, 4.2)},
    "a scorer": {"loss": falling(0.12, 0.015), "validation": falling(0.12, 0.02), "noise": 0.2},
    "a loss below 0": {"loss": lambda t: healthy()(t) - 5, "noise": 0.02},
    "short": {"loss": healthy(), "validation": healthy(), "num": 10},
    "parts": {
        "loss": healthy(),
        "parts": {"cross_entropy": healthy(), "z_loss": constant(1e-7), "penalty": jump(0.1, 0.0, 1e-6)},
    },
    "weights near their limits": {
        "loss": healthy(),
        "others": {
            "loss_modifiers/M.max_weight": lambda t: 10.0 if round(100 * t) % 9 else 9.5,
            "loss_modifiers/M.min_weight": constant(0.11),
        },
    },
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", HEALTHY)
def test_a_healthy_run_gives_no_alarm(kind: str, seed: int):
    assert found(run_of(**HEALTHY[kind], seed=seed)) == {}


def test_values_that_are_no_numbers_are_passed_over():
    history = History(100)
    for row in (
        {"step": 1, "loss": None},
        {"step": 2, "loss": math.nan, "loss/a": None},
        {"step": 3, "val_loss": None, "val_tokens": 1},
        {"step": 4, "finding": "of another run"},
    ):
        history.add(row)
        assert not list(find(history))
    assert history.steps == history.evaluations == []


def test_evaluations_of_other_data_are_not_compared():
    history = History(100)
    for step, tokens in ((1, 100), (2, 100), (3, 999)):
        history.add({"step": step, "val_loss": 1.0, "val_tokens": tokens})
    assert [row["step"] for row in history.evaluations] == [1, 2]


def test_a_text_is_small_for_its_model_and_its_run():
    assert "400 tokens for 1,300,000 parameters" in str(too_small_a_text(400, 1_300_000, 700_000))
    assert too_small_a_text(110_000, 1_300_000, 737_000) is None  # the default run
    assert too_small_a_text(400, 1_300_000, 2_000) is None  # a few passes
    assert too_small_a_text(400, 1_000, 700_000) is None  # a small model


@pytest.mark.parametrize(("first", "is_far"), [(7.6, False), (8.2, True), (3.0, True), (math.nan, True)])
def test_a_first_loss_is_near_that_of_knowing_nothing_or_not(first: float, is_far: bool):
    assert (far_from_knowing_nothing(first, 7.625, 0.5) is not None) == is_far


# ── in runs ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", MODES)
def test_a_short_healthy_run_has_no_findings(mode: str, tiny: list[str], tmp_path: Path):
    flags = ["--max_iters=40", "--eval_interval=10", "--learning_rate=1e-3", "--batch_size=16"]
    _, shown = go([*tiny, *MODES[mode], *flags])
    assert findings_of(tmp_path / "run") == []
    assert "finding" not in shown


@pytest.mark.slow
def test_three_hundred_words_are_learned_by_heart(tiny: list[str], tmp_path: Path):
    """Said before training, since the text is small, and during it, once."""
    draw = random.Random(1)
    words = "one two three fox runs over lazy river bank sees moon and stars above the old house".split()  # noqa: SIM905
    text = tmp_path / "small.txt"
    text.write_text("\n".join(" ".join(draw.choice(words) for _ in range(10)) for _ in range(30)))
    flags = [
        f"--dataset={text}", "--max_iters=200", "--eval_interval=20", "--log_interval=5", "--n_embd=64",
        "--learning_rate=1e-2", "--weight_decay=0", "--batch_size=8",
    ]  # fmt: skip
    _, shown = go([*tiny, *flags])
    small, by_heart = findings_of(tmp_path / "run")
    assert small["step"] == 0
    assert small["finding"].startswith("the text is small: ")
    assert by_heart["name"] == "over-fitting"
    assert shown.count(by_heart["finding"]) == 1
    assert f"warning: {small['finding']}" in shown


def test_a_modifier_that_cannot_act_and_a_key_without_effect_are_findings(tiny: list[str], tmp_path: Path):
    flags = ["--loss_modifiers_enabled", "--mask_ratio_weight_enabled", "--smoothing_mode=exclude_target"]
    _, shown = go([*tiny, *flags, "--max_iters=2", "--warmup_iters=1"])
    key, modifier = (row["finding"] for row in findings_of(tmp_path / "run"))
    assert key == "smoothing_mode has no effect without label_smoothing."
    assert modifier.startswith("MaskRatioWeightModifier weighs all samples alike")
    assert key in shown
    assert modifier in shown


def test_a_part_that_dominates_is_said_in_a_run_and_on_the_trackers(tiny: list[str], tmp_path: Path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    go([*tiny, "--loss=unified", "--z_loss=100", "--tensorboard_log"])
    (row,) = findings_of(tmp_path / "run")
    assert (row["name"], row["step"]) == ("dominates:loss/z_loss", 5)
    events = accumulators.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert events.Tags()["tensors"] == ["finding/text_summary"]


# ── said once ─────────────────────────────────────────────────────────────────────────────────────


def test_a_resumed_run_remembers_and_does_not_repeat(tiny: list[str], tmp_path: Path):
    config = load_config(tiny)
    path = tmp_path / "log.jsonl"
    told: list[tuple[int, str]] = []
    for begin in (0, 8):
        console = Console(file=io.StringIO(), width=200)
        log = LogFile(path)
        findings = TellFindings(console, log, [lambda *said: told.append(said)], config, ["known before."])
        state: Any = SimpleNamespace(global_step=begin, max_steps=99, is_world_process_zero=True)
        log.on_train_begin(None, state, None)
        findings.on_train_begin(None, state, None)
        for step in range(begin + 1, begin + 9):
            state.global_step = step
            logs = {"loss": 10.0, "loss/cross_entropy": 0.1, "loss/z_loss": 9.9}
            log.on_log(None, state, None, logs)
            findings.on_log(None, state, None, logs)
    assert len(findings.history.steps) == 16
    assert told[0] == (0, "known before.")
    assert [step for step, _ in told] == [0, 5]
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in kept if "finding" in row] == [0, 5]


def test_the_limits_of_weights_are_those_of_the_keys(tiny: list[str]):
    flags = ["--loss_modifiers_enabled", "--mask_ratio_weight_enabled", "--mask_ratio_weight_max_weight=3"]
    metrics = {limit.metric: limit.value for limit in limits_of(load_config([*tiny, *flags]))}
    assert metrics == {
        "loss_modifiers/MaskRatioWeightModifier.min_weight": 0.1,
        "loss_modifiers/MaskRatioWeightModifier.max_weight": 3.0,
    }
    assert limits_of(load_config(tiny)) == ()
