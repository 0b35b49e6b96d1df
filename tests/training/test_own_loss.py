"""A loss of one's own, by `--loss=module:function` and from Python; and who may name a module."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("transformers")
pytest.importorskip("typer")

from planted import LAST_NORM, plant, with_row
from running import call, go, rows, weights

import lossmith
import lossmith.training
from lossmith.training.config.reading import load_config
from lossmith.training.errors import UserError

SOURCE = '''
from pathlib import Path
import torch, lossmith

Path("imported").write_text("yes")


class Scaled(lossmith.Objective):
    """Cross-entropy with a temperature that it learns, and a term of its own; its state counts batches."""

    def __init__(self, size=0, trains=True):
        own = lossmith.Term("margin", lambda s, b: (s.top_wrong_logit - s.target_logit + 1).relu(), 0.1)
        super().__init__([lossmith.Term("plain", lambda s, b: s.nll), own])
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=trains)
        self.register_buffer("num_batches", torch.zeros(()))
        self.size = size

    def complete(self, output, inputs):
        self.num_batches += 1
        return super().complete(output, inputs)

    def terms(self, token_loss=None):
        plain, own = super().terms(token_loss)
        scale = self.scale
        return [lossmith.Term("plain", lambda s, b: s.nll * scale), own]


def make_loss():
    return Scaled()


def of_config(config):
    return Scaled(config.n_embd)


def untrained():
    return Scaled(trains=False)


def fails():
    return 1 / 0


instance = lossmith.CrossEntropyLoss(label_smoothing=0.1)
nothing = lambda: 3
ignores = lambda: lossmith.CrossEntropyLoss(ignore_index=0)
aligned = lambda: lossmith.CrossEntropyLoss(shift=False)
summed = lambda: lossmith.CrossEntropyLoss(reduction="sum")
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a module in it; a file tells whether it was imported."""
    folder = tmp_path / "here"
    folder.mkdir()
    name = f"mine_{abs(hash(str(tmp_path))) % 10**9}"  # a new one each time, since Python imports once
    (folder / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def module(here: Path) -> str:
    return next(here.glob("mine_*.py")).stem


def was_imported(here: Path) -> bool:
    return (here / "imported").exists()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def state(out: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(out / f"checkpoint-{step}" / "lossmith_loss.pt", weights_only=True)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "make_loss"),
        (["--objective=masked"], "untrained"),
        (["--loss_modifiers_enabled", "--entropy_modifier_enabled"], "make_loss"),
    ],
)
def test_it_trains_and_its_state_is_saved(
    flags: list[str], name: str, tiny: list[str], module: str, out: Path
):
    code, shown = go([*tiny, *flags, f"--loss={module}:{name}"])
    assert code == 0
    assert f"objective   {module}:{name}" in shown
    row = rows(out)[0]
    assert row["loss/plain"] + row["loss/margin"] == pytest.approx(row["loss"], rel=1e-5)
    assert state(out, 6)["base.num_batches"] == 6
    assert (state(out, 6)["base.scale"] != 1) == (name == "make_loss")  # it was trained


def test_parameters_that_nothing_would_train_are_refused(tiny: list[str], module: str):
    with pytest.raises(UserError, match="has parameters to train, which only objective=causal does"):
        go([*tiny, "--objective=masked", f"--loss={module}:make_loss"])


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tiny: list[str], module: str, out: Path):
    own = f"--loss={module}:of_config"
    go([*tiny, own])
    assert yaml.safe_load((out / "config.yaml").read_text())["loss"] == f"{module}:of_config"
    whole, whole_state = weights(out / "checkpoint-6"), state(out, 6)
    shutil.rmtree(out / "checkpoint-6")
    with pytest.raises(UserError, match=rf"which is code, .*pass --loss={module}:of_config if you trust"):
        load_config([f"--out_dir={out}", "--resume"])
    go([f"--out_dir={out}", "--resume", own])
    assert state(out, 6).keys() == whole_state.keys()
    assert all(torch.equal(value, whole_state[name]) for name, value in state(out, 6).items())
    again = weights(out / "checkpoint-6")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_from_python(tiny: list[str], out: Path, module: str):
    keys = dict(flag[2:].split("=") for flag in tiny)
    typed: dict[str, Any] = {name: int(value) if value.isdigit() else value for name, value in keys.items()}
    margin = lossmith.Term("margin", lambda s, _: (s.top_wrong_logit - s.target_logit + 1).relu(), 0.1)

    def own() -> lossmith.Objective:
        temperature = lossmith.AdaptiveTemperature()
        return lossmith.Objective(
            [lossmith.Term("plain", lambda s, _: s.nll), margin], temperature=temperature
        )

    assert lossmith.training.train(objective=own(), **typed) == 0
    assert {"loss/plain", "loss/margin"} <= rows(out)[0].keys()
    assert state(out, 6)["base.temperature.num_steps"] == 6
    with pytest.raises(UserError, match=r"call lossmith\.training\.train with that objective again"):
        load_config([f"--out_dir={out}", "--resume"])
    more: dict[str, Any] = {"out_dir": str(out), "resume": True, "max_iters": 8}
    assert lossmith.training.train(objective=own(), **more) == 0
    assert state(out, 8)["base.temperature.num_steps"] == 8
    with pytest.raises(UserError, match="there is no key 'max_itres'"):
        lossmith.training.train(objective="masked", max_itres=3)


# ── who may name a module ─────────────────────────────────────────────────────────────────────────


def test_only_the_command_itself_imports_it(
    tiny: list[str], here: Path, module: str, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    (here / "config.py").write_text(f"loss = '{module}:make_loss'\n")
    with pytest.raises(UserError, match=r"config\.py:1: loss=.* is code, and a config file is read"):
        load_config(["config.py", *tiny])
    go(tiny)  # a run whose saved configuration somebody has changed
    path = out / "config.yaml"
    path.write_text(path.read_text().replace("loss: cross_entropy", f"loss: {module}:make_loss"))
    code, _, err = call(capsys, "train", f"--out_dir={out}", "--resume", "--max_iters=9")
    assert (code, "which is code" in err) == (2, True)
    for command in (["compare", out], ["watch", "--once", out], ["report", out, "-o", here / "x.html"]):
        assert call(capsys, *command)[0] == 0
    for command in (["train", "--eval_only", f"--out_dir={out}"], ["sample", out], ["analyze", out]):
        assert call(capsys, *command)[0] == 0
    assert not was_imported(here)


def test_a_saved_batch_imports_nothing_until_it_is_told_to(
    tiny: list[str], here: Path, module: str, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    own = f"--loss={module}:make_loss"
    with monkeypatch.context() as patch:
        plant(patch, LAST_NORM, with_row(float("nan")))
        with pytest.raises(UserError, match="plain, margin not finite at sample 2, position 7"):
            go([*tiny, own])
    (here / "imported").unlink()
    code, _, err = call(capsys, "replay", out)
    assert (code, "which is code" in err) == (2, True)
    assert not was_imported(here)
    code, shown, _ = call(capsys, "replay", out, own)
    assert code == 0
    assert "Found: plain, margin not finite." in shown


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("nowhere:make_loss", r"there is no module nowhere; expected nowhere\.py in .*here"),
        ("{}:nobody", r"has no nobody; expected a function that returns an objective"),
        ("{}:fails", r"raised ZeroDivisionError: division by zero \(.*mine_\d+\.py, line \d+\)"),
        ("{}:nothing", r"gives a int; expected a lossmith\.Objective"),
        ("{}:ignores", r"has ignore_index=0; the trainer marks .* by -100"),
        ("{}:aligned", r"has shift=False, but this mode's logits predict the next token"),
        ("{}:summed", r"has reduction=sum; the trainer divides by what it counted"),
        ("mine", r"expected one of cross_entropy, nvamp, unified"),
        ("objective=Mine", r"was given in Python; call lossmith\.training\.train"),
    ],
)
def test_mistakes(loss: str, message: str, tiny: list[str], module: str):
    with pytest.raises(UserError, match=message):
        go([*tiny, f"--loss={loss.format(module)}"])


def test_keys_of_other_losses_and_modes_without_a_loss(tiny: list[str], module: str, here: Path):
    own = f"--loss={module}:instance"
    with pytest.raises(UserError, match=r"label_smoothing=0.1 is a key of loss=cross_entropy"):
        load_config([*tiny, own, "--label_smoothing=0.1"])
    with pytest.raises(UserError, match="is about a language model"):
        load_config([*tiny, own, "--mode=sequence_scorer"])
    assert not was_imported(here)
    assert go([*tiny, own])[0] == 0
    assert json.loads((Path(load_config(tiny).out_dir) / "log.jsonl").read_text().splitlines()[0])["loss"] > 0
