"""A step that is not finite: which part, where, and what it came from; the batch saved and computed again."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from planted import LAST_NORM, Fault, plant, with_gradient, with_parameter, with_row
from running import call, findings_of, go, rows
from safetensors.torch import save_file
from traps import Trap

from lossmith.training.errors import UserError
from lossmith.training.run.batch_file import read_batch

FILE = "nonfinite-5.safetensors"
PLACE = "sample 2, position 7"
# name: (module, fault, flags, the parts and the place, where it began)
FAULTS: dict[str, tuple[str, Fault, list[str], str, str]] = {
    "hidden states": (
        LAST_NORM,
        with_row(math.nan),
        ["--z_loss=1e-4"],
        f"cross_entropy, z_loss not finite at {PLACE}",
        "the weights were finite, and the output of model.norm was the first that was not",
    ),
    "deeper": (
        "model.layers.0.mlp",
        with_row(math.inf),
        [],
        f"cross_entropy not finite at {PLACE}",
        "the output of model.layers.0.mlp was the first that was not",
    ),
    "logits": (
        "lm_head",
        with_row(math.inf),
        ["--z_loss=1e-4", "--materialize_logits"],
        f"cross_entropy, z_loss not finite at {PLACE}",
        "the weights were finite, and the output of lm_head was the first that was not",
    ),
    "a part": (
        LAST_NORM,
        with_row(1e30),
        ["--loss=unified", "--router_z_loss_weight=0", "--z_loss=1e-4"],
        f"z_loss not finite at {PLACE}",
        "the weights, hidden states and logits there were finite, so it began in the loss",
    ),
    "all logits at once": (
        LAST_NORM,
        with_row(1e30),
        ["--z_loss=1e-4", "--materialize_logits"],
        f"z_loss not finite at {PLACE}",
        "the weights and logits there were finite, so it began in the loss",
    ),
    "a parameter": (
        LAST_NORM,
        with_parameter,
        [],
        "cross_entropy not finite at sample 0, position 0",
        "the parameter model.norm.weight was not finite before this step",
    ),
    "a gradient": (
        "model.layers.0.mlp",
        with_gradient,
        ["--z_loss=1e-4"],
        "the loss was finite and the gradient not",
        "it is finite where the loss begins; in the model, model.layers.0.mlp.down_proj.weight is where",
    ),
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of the run."""
    return tmp_path / "run"


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(
    name: str,
    tiny: list[str],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    module, fault, flags, parts, origin = FAULTS[name]
    with monkeypatch.context() as patch:
        plant(patch, module, fault)
        with pytest.raises(UserError) as caught:
            go([*tiny, *flags])
    said = str(caught.value)
    assert re.match(
        r"the loss became (nan|inf) by step [56], so training stopped\. It began in step 5: ", said
    )
    for text in (parts, origin, f"lossmith replay {out / FILE}", "--resume from"):
        assert text in said
    (finding,) = findings_of(out)
    assert (finding["step"], finding["name"]) == (5, "not finite:5")
    assert parts in finding["finding"]
    code, shown, _ = call(capsys, "replay", out / FILE)
    assert code == 0
    assert f"{FILE}: step 5, micro-batch 0" in shown
    assert origin in shown
    assert f"--resume goes through this step again, from {out / 'checkpoint-3'}" in shown
    if name == "a gradient":
        assert "Every part is finite" in shown
    else:
        assert f"Found: {parts.partition(' not')[0]} not finite." in shown


def test_the_token_to_be_predicted_is_named(tiny: list[str], out: Path, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, LAST_NORM, with_row(math.nan))
    with pytest.raises(UserError, match=r"position 7 \(predicting '.+'\)"):
        go(tiny)


@pytest.mark.parametrize(
    ("flags", "module", "where"),
    [
        (["--objective=masked"], "model.final_norm", r"not finite at sample \d, position \d+"),
        (["--mode=token_classifier"], "model.final_norm", f"cross_entropy not finite at {PLACE}"),
        (["--mode=sequence_scorer"], "model.final_norm", r"squared_error not finite at sample 2;"),
    ],
)
def test_every_mode_has_places(
    flags: list[str],
    module: str,
    where: str,
    tiny: list[str],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    with monkeypatch.context() as patch:
        plant(patch, module, with_row(math.nan))
        with pytest.raises(UserError, match=where):
            go([*tiny, *flags])
    for path in (out, out / "checkpoint-3"):  # the newest in the run's folder
        code, shown, _ = call(capsys, "replay", path)
        assert code == 0
        assert f"{out / FILE}: step 5" in shown
        assert "not finite." in shown


def test_of_several_micro_batches_the_bad_one_is_saved(
    tiny: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
):
    num = 0

    def second(module: object, output: torch.Tensor) -> torch.Tensor:
        nonlocal num
        num += 1
        return with_row(math.nan)(module, output) if num != 1 else output

    plant(monkeypatch, LAST_NORM, second)
    with pytest.raises(UserError, match="It began in step 5, micro-batch 1: cross_entropy not finite"):
        go([*tiny, "--gradient_accumulation_steps=3"])
    saved = read_batch(out / FILE)
    assert (saved.step, saved.micro_batch, saved.checkpoint) == (5, 1, "checkpoint-3")
    assert saved.inputs["input_ids"].shape == saved.inputs["labels"].shape == (4, 16)
    assert saved.random["cpu"].dtype == torch.uint8


def test_what_is_computed_again_is_what_was_computed(
    tiny: list[str], out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Of a batch whose loss is finite: with modifiers, heads and a temperature that moves."""
    flags = [
        "--loss=unified",
        "--use_mtp",
        "--adaptive_temperature",
        "--use_contrastive_loss",
        "--dropout=0.1",
    ]
    flags += ["--loss_modifiers_enabled", "--entropy_modifier_enabled", "--target_smoothing_enabled"]
    with monkeypatch.context() as patch:
        plant(patch, "model.layers.0.mlp", with_gradient, steps=(5,))
        with pytest.raises(UserError):
            go([*tiny, *flags])
    row = rows(out)[4 + 1]  # after the evaluation at step 3
    assert row["step"] == 5
    _, shown, _ = call(capsys, "replay", out / FILE)
    total = float(re.search(r"they sum to (\d+\.\d+)", shown)[1])  # pyright: ignore[reportOptionalSubscript]
    assert total == pytest.approx(row["loss"], rel=1e-5)
    for name, value in row.items():
        if name.startswith("loss/"):
            found = re.search(rf" {name.removeprefix('loss/')} (\S+)", shown)
            assert found is not None
            assert float(found[1]) == pytest.approx(value, rel=1e-4, abs=1e-7)


def test_skipped_steps_are_said_and_saved_three_times(
    tiny: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
):
    plant(monkeypatch, LAST_NORM, with_row(math.nan), steps=(2, 3, 5, 6))
    code, shown = go([*tiny, "--on_nonfinite=skip", "--z_loss=1e-4"])
    assert code == 0
    names = sorted(path.name for path in out.glob("nonfinite-*"))
    assert names == [f"nonfinite-{step}.safetensors" for step in (2, 3, 5)]
    assert [finding["step"] for finding in findings_of(out)] == [2, 3, 5]
    assert shown.count("finding: Not finite: step ") == 3
    assert "Further ones are skipped and counted without a look." in shown
    assert "warning: 4 steps were skipped" in shown


@pytest.mark.slow
def test_a_run_owns_its_batches(tiny: list[str], out: Path, monkeypatch: pytest.MonkeyPatch):
    """They are moved with it, and one that another wrote is not overwritten."""
    with monkeypatch.context() as patch:
        plant(patch, LAST_NORM, with_row(math.nan))
        with pytest.raises(UserError):
            go(tiny)
    go(tiny)
    assert (out / "previous-1" / FILE).is_file()
    assert not (out / FILE).exists()
    (out / FILE).write_text("mine")
    with monkeypatch.context() as patch:
        plant(patch, LAST_NORM, with_row(math.nan))
        with pytest.raises(UserError, match="The batch could not be saved"):
            go(tiny)
    assert (out / FILE).read_text() == "mine"


# ── files that anybody may have written ───────────────────────────────────────────────────────────


@pytest.fixture
def saved(tiny: list[str], out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        plant(patch, LAST_NORM, with_row(math.nan))
        with pytest.raises(UserError):
            go(tiny)
    return out / FILE


def rewritten(path: Path, **changes: object) -> None:
    """Change what a file says of itself."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        said = json.loads(file.metadata()["lossmith"])
    save_file(tensors, path, {"lossmith": json.dumps({**said, **changes})})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "not of format 1"),
        ({"step": "five"}, "step is no int"),
        ({"call": []}, "call is no dict"),
        ({"call": {"given": {}, "options": {}, "autocast": ""}}, "it has no targets"),
        ({"call": {"given": {"targets": {"same as": "x"}}, "options": {}, "autocast": ""}}, "cannot be read"),
        ({"config": {"lss": "x"}}, "there is no key 'lss'"),
        ({"config": {"n_layer": [[[[[[[[[[1]]]]]]]]]]}}, "not of format 1"),
        ({"config": {"loss": "nvamp"}}, "does not fit the loss of its own configuration|step 5"),
    ],
)
def test_a_file_that_is_not_as_expected_is_refused(
    saved: Path, changes: dict, message: str, capsys: pytest.CaptureFixture[str]
):
    rewritten(saved, **changes)
    code, out, err = call(capsys, "replay", saved)
    assert code in (0, 2)
    assert re.search(message, err + out)


def test_nothing_in_a_file_is_executed(tmp_path: Path, sprung: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / FILE
    torch.save({"x": Trap(sprung)}, path)
    code, _, err = call(capsys, "replay", path)
    assert code == 2
    assert "cannot be read as a batch that lossmith train saved" in err


@pytest.mark.parametrize("make", [lambda p: p.write_text("x"), lambda p: None, lambda p: p.mkdir()])
def test_no_such_file(tmp_path: Path, make, capsys: pytest.CaptureFixture[str]):
    make(tmp_path / FILE)
    code, _, err = call(capsys, "replay", tmp_path / FILE)
    assert code == 2
    assert "cannot be read" in err or "there is no batch in" in err
