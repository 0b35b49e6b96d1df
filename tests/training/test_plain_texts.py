"""Texts of keys are texts: nothing in them is looked up, decoded or run, wherever they come from."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from running import go

from lossmith.training.config.reading import load_config
from lossmith.training.config.saved_run import save_config

SECRET = "correct horse battery staple"
SPELLS = [
    "${oc.env:LOSSMITH_SECRET}",
    "${oc.decode:${oc.env:LOSSMITH_SECRET}}",
    "${oc.create:{a: 1}}",
    "${oc.select:seed}",
    "${seed}",
    "${.seed}",
    "x${seed}${",
    "\\${seed}",
    "\\\\${seed}",
    "$LOSSMITH_SECRET",
    "${LOSSMITH_SECRET}",
    "%(LOSSMITH_SECRET)s",
    "{LOSSMITH_SECRET}",
    "!!python/name:os.system",
    "*a",
    "&a b",
]


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSSMITH_SECRET", SECRET)


@pytest.mark.parametrize("text", SPELLS)
def test_a_text_is_itself_as_a_flag_in_a_file_and_in_a_saved_run(text: str, tmp_path: Path):
    file = tmp_path / "keys.py"
    file.write_text(f"wandb_project = {text!r}\n")
    assert load_config([f"--wandb_project={text}"]).wandb_project == text
    config = load_config([str(file), f"--out_dir={tmp_path}"])
    assert config.wandb_project == text
    save_config(config)
    assert load_config([f"--out_dir={tmp_path}", "--resume"]).wandb_project == text
    assert SECRET not in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("text", [text for text in SPELLS if text.startswith("${") and "{a" not in text])
def test_a_saved_run_that_was_written_by_hand_is_taken_literally(text: str, tmp_path: Path):
    path = save_config(load_config([f"--out_dir={tmp_path}"]))
    lines = [line for line in path.read_text().splitlines() if not line.startswith("wandb_project:")]
    path.write_text("\n".join([*lines, f"wandb_project: {text}", ""]))
    assert load_config([f"--out_dir={tmp_path}", "--eval_only"]).wandb_project == text


def test_a_number_cannot_be_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LAYERS", "2")
    path = save_config(load_config([f"--out_dir={tmp_path}"]))
    path.write_text(path.read_text().replace("batch_size: 8", "batch_size: ${oc.decode:${oc.env:LAYERS}}"))
    with pytest.raises(ValueError, match=r"batch_size expects a whole number.*; came '\$\{oc\.decode"):
        load_config([f"--out_dir={tmp_path}", "--resume"])


def test_no_secret_is_shown_or_written_in_a_run(tiny: list[str], tmp_path: Path):
    flags = [*tiny, "--wandb_project=${oc.env:LOSSMITH_SECRET}"]
    shown = go([*flags, "--max_iters=3"])[1]
    out = tmp_path / "run"
    shown += go([f"--out_dir={out}", "--resume", "--max_iters=6"])[1]
    shown += go([f"--out_dir={out}", "--eval_only"])[1]
    assert SECRET not in shown
    for path in out.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    "value",
    [1e-3, 1e-05, 1e22, 0.1, 5e-324],
)
def test_numbers_come_back_exactly(tmp_path: Path, value: float):
    save_config(load_config([f"--out_dir={tmp_path}", f"--weight_decay={value!r}"]))
    assert load_config([f"--out_dir={tmp_path}", "--resume"]).weight_decay == value


@pytest.mark.parametrize("spelled", ["1e-3", "0.001", "1.0e-3", ".001", "1E-3", "+1e-3"])
def test_numbers_as_people_write_them(tmp_path: Path, spelled: str):
    path = save_config(load_config([f"--out_dir={tmp_path}", "--weight_decay=7"]))
    path.write_text(path.read_text().replace("weight_decay: 7.0", f"weight_decay: {spelled}"))
    assert load_config([f"--out_dir={tmp_path}", "--resume"]).weight_decay == 1e-3


@pytest.mark.parametrize(
    "text",
    [
        "1e3", "12", "0x1f", "1_000", "yes", "null", "~", "2024-01-01", "1:30", "é",
        "\x1b[31m", "\u202e", "a\nb",
    ],
)  # fmt: skip
def test_texts_that_look_like_something_else_stay_texts(tmp_path: Path, text: str):
    save_config(load_config([f"--out_dir={tmp_path}", f"--wandb_project={text}"]))
    assert load_config([f"--out_dir={tmp_path}", "--resume"]).wandb_project == text


def test_a_name_that_is_no_unicode_survives(tmp_path: Path):
    text = b"novel-\xff".decode(errors="surrogateescape")
    save_config(load_config([f"--out_dir={tmp_path}", f"--dataset={text}"]))
    assert load_config([f"--out_dir={tmp_path}", "--resume"]).dataset == text


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path):
    path = save_config(load_config([f"--out_dir={tmp_path}"]))
    with path.open("a") as file:
        file.write("seed: 5\n")
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read .*seed"):
        load_config([f"--out_dir={tmp_path}", "--resume"])


@pytest.mark.parametrize("spelled", ["!!python/object/apply:os.getcwd []", "!!python/name:os.system ''"])
def test_nothing_in_a_saved_run_is_run(tmp_path: Path, spelled: str):
    path = save_config(load_config([f"--out_dir={tmp_path}"]))
    path.write_text(path.read_text().replace("wandb_project: lossmith", f"wandb_project: {spelled}"))
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read"):
        load_config([f"--out_dir={tmp_path}", "--resume"])


def test_a_saved_run_is_also_what_other_readers_of_yaml_read(tmp_path: Path):
    yaml = pytest.importorskip("yaml")
    config = load_config([f"--out_dir={tmp_path}", "--weight_decay=1e-5"])
    found = yaml.safe_load(save_config(config).read_text())
    assert (found["weight_decay"], found["temperature_bounds"]) == (1e-5, [0.5, 2.0])
    json.dumps(found)
