"""The command line used wrongly, as people do: one or two lines that say what to write, and exit code 2."""

import math
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from running import go, rows

from lossmith.training import cli
from lossmith.training.config.reading import load_config
from lossmith.training.errors import UserError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a few files that are no use."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.yaml").write_text("mine: 1\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 10)
    for name, text in {
        "unknown": "n_layers = 2\nfoo = 3\nseed = 1\nn_heads = 2\n",
        "range": "seed = 1\nmax_iters = 0\n",
        "type": "max_iters = 'ten'\n",
        "choice": "device = 'gpu'\n",
        "call": "n_layer = int(2)\n",
        "syntax": "n_layer = = 2\n",
        "nul": 'out_dir = "a\\0b"\n',
        "half": 'out_dir = "\\ud800"\n',
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


USAGES = {
    # a value of another kind: the flag, what it expects, its range, what came
    "--max_iters=ten": "--max_iters: max_iters expects a whole number; came 'ten' (str). Write for example "
    "max_iters=720 (max_iters >= 1).",
    "--max_iters=1.5": "came 1.5 (float). Write for example max_iters=720 (max_iters >= 1).",
    "--max_iters=": "--max_iters: max_iters expects a whole number; came ''",
    "--max_iters": "--max_iters needs a value; came nothing",
    "--learning_rate=fast": "expects a number; came 'fast' (str). Write for example learning_rate=0.002 "
    "(learning_rate > 0).",
    "--dropout=none": "(dropout >= 0 and < 1).",
    "--learning_rate=1e-3 --learning_rate=slow": "learning_rate expects a number; came 'slow'",
    "--compile=maybe": "--compile: compile expects True or False; came 'maybe'",
    "--temperature_bounds=3": "--temperature_bounds: temperature_bounds expects two numbers; came 3",
    "--target_smoothing_special_tokens=a,b": "expects token ids; came 'a,b'",
    "type.py": "type.py:1: max_iters expects a whole number; came 'ten' (str). Write for example "
    "max_iters=720 (max_iters >= 1).",
    # a value out of range: where it was set
    "--max_iters=0": "--max_iters: max_iters=0 is out of range; expected max_iters >= 1.",
    "--dropout=2": "--dropout: dropout=2.0 is out of range; expected dropout >= 0 and < 1.",
    "--seed=-1": "--seed: seed=-1 is out of range",
    "--max_iters=1e300": "--max_iters: max_iters=1e+300 is out of range; expected",
    "--batch_size=1e300": "--batch_size: batch_size=1e+300 is out of range; expected",
    "range.py": "range.py:2: max_iters=0 is out of range; expected max_iters >= 1.",
    "--device=gpu": "--device: device='gpu'; expected one of auto, cpu, cuda, mps.",
    "--device=cuda:0": "--device: device='cuda:0'; expected one of auto, cpu, cuda, mps.",
    "--device=CPU": "expected one of auto, cpu, cuda, mps.",
    "choice.py": "choice.py:1: device='gpu'; expected one of auto, cpu, cuda, mps.",
    "--dtype=fp16": "--dtype: dtype='fp16'; expected one of auto, float32, bfloat16, float16.",
    "--mode=lm": "--mode: mode='lm'; expected one of language_model, token_classifier, sequence_scorer.",
    "--loss=ce": "--loss: loss='ce'; expected one of cross_entropy, nvamp, unified.",
    # no such key
    "--unknown": "--unknown: there is no key 'unknown'. `--help` lists the keys.",
    "--batchsize=3": "Did you mean batch_size?",
    "unknown.py": "unknown.py:1: there is no key 'n_layers'. Did you mean n_layer? Nor are there 'foo' "
    "(unknown.py:2), 'n_heads' (unknown.py:4).",
    # words in the wrong place
    "max_iters=3": "came 'max_iters=3'. Write --max_iters=3.",
    "-max_iters=3": "came '-max_iters=3'. Write --max_iters=3.",
    "--max_iters=3 10": "came '10'. A flag's value follows it directly: --max_iters=100.",
    "range.py type.py": "one config file ending in .py; came 'type.py'",
    "-x": "expected --key=value or one config file ending in .py; came '-x'",
    "--": "there is no key ''",
    # files that are no use
    "nowhere.py": "config file nowhere.py cannot be read: No such file or directory",
    "folder.py": "config file folder.py cannot be read: Is a directory",
    "call.py": "call.py:1: n_layer expects a plain value",
    "syntax.py": "syntax.py:1: this is not Python",
    "nul.py": "cannot be written to",
    "half.py": "cannot be written to",
    "--out_dir=file": "out_dir=file cannot be written to: File exists. Pass --out_dir",
    "--out_dir=file/x": "out_dir=file/x cannot be written to: Not a directory",
    "--out_dir=foreign": "foreign/config.yaml was not written by a run",
    "--out_dir=foreign --eval_only": "foreign/config.yaml lacks vocab_size",
    "--out_dir=empty --resume": "--resume: there is no run in empty",
    "--resume --eval_only": "resume and eval_only are both on",
    "--dataset=nowhere": "dataset 'nowhere' was not found",
    "--dataset=": "dataset is empty",
    "--dataset=empty": "dataset empty holds no UTF-8 text file",
    "--dataset=binary": "dataset binary is not UTF-8 text",
    # what does not go together
    "--mode=token_classifier --use_mtp": "use_mtp=True is about a language model, but mode=token_classifier. "
    "Leave use_mtp out.",
    "--mode=sequence_scorer --label_smoothing=0.1": "Leave label_smoothing out.",
    "--use_mtp": "Leave use_mtp out, or pass --loss=unified.",
    "--n_head=3": "Try --n_embd=126.",
    "--min_lr=1": "Try --min_lr=0.0002.",
    "--loss_modifiers_enabled --judge_weight_modifier_enabled": "needs a judge",
    "--loss_modifiers_enabled --judge_weight_modifier_enabled --judge_weight_checkpoint=nowhere": "judge "
    "checkpoint nowhere does not exist. Pass the folder of a trained sequence scorer.",
    "--loss_modifiers_enabled --judge_weight_modifier_enabled --judge_weight_checkpoint=empty": "judge "
    "checkpoint empty has no config.json",
    "--loss_modifiers_enabled=please": "loss_modifiers_enabled expects True or False; came 'please'",
}


@pytest.mark.parametrize("usage", USAGES)
def test_a_wrong_usage(usage: str, here: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *usage.split()])
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert shown.err.startswith("error: ")
    assert 1 <= shown.err.count("\n") <= 2
    assert USAGES[usage] in shown.err
    assert "Traceback" not in shown.out + shown.err
    assert not list(here.rglob("checkpoint-*"))


@pytest.mark.parametrize("args", [["trian"], ["--max_iters=3"], ["TRAIN"], ["--version"], []])
def test_a_wrong_command(args: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert "lossmith train" in shown.out + shown.err


def test_a_value_out_of_range_may_be_set_right_by_a_flag(here: Path):
    assert load_config(["range.py", "--max_iters=3"]).max_iters == 3


def test_a_model_that_has_become_no_number_at_the_end_is_said(tiny: list[str], tmp_path: Path):
    with pytest.raises(UserError, match=r"the validation loss became nan by step 2, .*Lower --learning_rate"):
        go([*tiny, "--max_iters=2", "--warmup_iters=1", "--learning_rate=1e38", "--eval_interval=5"])
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "run") if "loss" in row)


def test_a_tracker_that_refuses_leaves_the_earlier_run_where_it_was(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("wandb")
    from lossmith.training.run import trackers

    def refuse(config: object) -> None:
        raise UserError("wandb_log=True, but Weights & Biases said: no")

    go(tiny)
    monkeypatch.setattr(trackers, "weights_and_biases", refuse)
    with pytest.raises(UserError, match="said: no"):
        go([*tiny, "--wandb_log", "--tensorboard_log"])
    assert not list((tmp_path / "run").glob("previous-*"))
    assert (tmp_path / "run" / "checkpoint-6").is_dir()
    assert not (tmp_path / "run" / "tensorboard").exists()
