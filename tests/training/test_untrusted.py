"""Configurations, logs, texts and judges are data: nothing in them is executed."""

import contextlib
import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from running import go
from traps import FOREIGN, Trap

from lossmith.integrations.judge import load_judge
from lossmith.training.config.reading import load_config
from lossmith.training.data import corpus
from lossmith.training.errors import UserError
from lossmith.training.run.folder import has_ended, step_in
from lossmith.training.untrusted import LARGEST_CONFIG, MIB, Unreadable, parse_json, read_bytes, read_text


def test_the_trap_works(sprung: Path):
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()
    sprung.unlink()


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


def test_what_is_read_is_a_regular_file_of_a_limited_size_and_utf_8(tmp_path: Path):
    path = tmp_path / "text"
    path.write_bytes(b"one\r\ntwo\rthree\n")
    assert read_text(path, 15) == "one\ntwo\nthree\n"
    with pytest.raises(Unreadable, match="it has 15 bytes, and at most 14 are read"):
        read_bytes(path, 14)
    path.write_bytes(b"one\xfftwo")
    with pytest.raises(Unreadable, match="byte 3 is not UTF-8 text"):
        read_text(path, 15)
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(Unreadable, match="not a regular file"):
            read_bytes(name, MIB)
    for name, message in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(Unreadable, match=message):
            read_bytes(name, MIB)
    with pytest.raises(Unreadable):
        read_bytes(Path("a\0b"), MIB)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "{", "", "\0", "nan"])
def test_json_that_is_none(text: str):
    with pytest.raises(Unreadable) as caught:
        parse_json(text)
    assert len(str(caught.value)) <= 80


# ── configurations ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n_layer = __import__('os').system('touch {sprung}')", "is not executed"),
        ("import os; os.system('touch {sprung}')", "is read, not executed"),
        ("n_layer = (lambda: 2)()", "is not executed"),
        ("dataset = f'{{open(\"/etc/passwd\").read()}}'", "is not executed"),
        ("@__import__('os').system\ndef f(): ...", "is read, not executed"),
        ("n_layer = " + "9" * 5000, "this is not Python: Exceeds the limit"),
        ("n_layer = 0x" + "f" * 60_000, "more than 4,000 digits"),
        ("n_layer = " + "not " * 20_000 + "1", "nested too deeply"),
        ("n_layer = " + "not " * 50_000 + "1", "it has 200,012 bytes, and at most 131,072 are read"),
        ("n_layer = 1" + " + 1" * 20_000, "nested too deeply"),
        ("n_layer = 1" + " < 1" * 20_000, "expects a plain value"),
        ("n_layer = " + "[" * 90 + "]" * 90, "lists in lists"),
        ("n_layer = " + "(" * 5_000, "this is not Python"),
        ("n_layer = 2\0", "this is not Python"),
        ("n_layer = '" + "x" * 50_000 + "'", r"came 'x{70,80} \.\.\. \(str\)"),
        ("n_layer = 2 # \udcff", "not UTF-8"),
    ],
    ids=range(16),
)
def test_a_config_file_with_code_or_of_unusual_size(content: str, message: str, tmp_path: Path, sprung: Path):
    path = tmp_path / "config.py"
    text = content.replace("{sprung}", str(sprung)).replace("{{", "{").replace("}}", "}")
    path.write_text(text + "\n", encoding="utf-8", errors="surrogateescape")
    begin = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        load_config([str(path)])
    assert len(str(caught.value)) < 500 + len(str(path))
    assert time.monotonic() - begin < 20


def test_a_config_file_that_is_a_pipe(tmp_path: Path):
    os.mkfifo(tmp_path / "config.py")
    with pytest.raises(UserError, match="it is not a regular file"):
        load_config([str(tmp_path / "config.py")])


LAUGHS = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]" for k in range(1, 40)), "n_layer: *a39"]
)


@pytest.mark.parametrize(
    "content",
    [
        "n_layer: !!python/object/apply:os.system ['touch {sprung}']",
        "!!python/object/new:os.system ['touch {sprung}']",
        "n_layer: !!python/name:os.system",
        "n_layer: !!bool nonsense",
        "n_layer: !!timestamp nonsense",
        "n_layer: 2001-99-99",
        "n_layer: " + "9" * 5000,
        "n_layer: 0x" + "f" * 60_000,
        "n_layer: " + "[" * 60_000,
        "n_layer: " + "{a: " * 20_000,
        "? " * 20_000,
        "- " * 20_000,
        "x: " * 1,
        LAUGHS,
        "[1]: 2",
        "n_layer: \xff\udcff",
        "\n".join(f"k{k}: 1" for k in range(8_000)),
        "x" * (LARGEST_CONFIG + 1),
    ],
    ids=range(18),
)
def test_a_saved_configuration_with_tags_aliases_or_of_unusual_size(
    content: str, tmp_path: Path, sprung: Path
):
    path = tmp_path / "config.yaml"
    path.write_text(content.replace("{sprung}", str(sprung)), encoding="utf-8", errors="surrogateescape")
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_config([f"--out_dir={tmp_path}", "--resume"])
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))
    assert time.monotonic() - begin < 20


# ── logs ──────────────────────────────────────────────────────────────────────────────────────────


def test_lines_of_a_log_that_are_none_are_dropped_on_resuming(tiny: list[str], tmp_path: Path):
    out = tmp_path / "run"
    go(tiny)
    bad = [
        b"\xff\xfe", b'{"step": "six"}', b'{"step": 1e400}', b'{"step": ' + b"9" * 5000 + b"}", b"[" * 50_000,
        b'{"step": null}', b'{"step": true}', b"5", b"\0", b'{"loss": 1}',
    ]  # fmt: skip
    with (out / "log.jsonl").open("ab") as log:
        log.write(b"\n".join(bad) + b"\n")
    assert go([f"--out_dir={out}", "--resume", "--max_iters=7"])[0] == 0
    lines = (out / "log.jsonl").read_text().splitlines()
    assert all(step_in(line) is not None for line in lines)
    assert step_in(lines[-1]) == 7
    assert has_ended(out, 7)
    assert not has_ended(out, 5)


# ── texts ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_text_of_unusual_size_is_refused_before_it_is_read(tmp_path: Path):
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.truncate(corpus.LARGEST_TEXT + 1)  # it takes no room
    with pytest.raises(UserError, match=r"huge\.txt cannot be read: it has 4,294,967,297 bytes"):
        corpus.load_corpus(str(path))


def test_a_folder_of_texts_with_programs_in_it(tmp_path: Path, sprung: Path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "texts.py").write_text(f"import os\nos.system('touch {sprung}')\n" * 20)
    (folder / "data.pkl").write_bytes(pickle.dumps(Trap(sprung)))
    os.mkfifo(folder / "pipe")
    (folder / "zeros").symlink_to("/dev/zero")
    found = corpus.load_corpus(str(folder))
    assert "os.system" in "".join(found.train + found.held_out)  # text, as any other


def test_a_dataset_of_the_hub_runs_no_script(tmp_path: Path, sprung: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    class Older:
        __version__ = "2.19.0"

        @staticmethod
        def load_dataset(name: str, **options: Any) -> Any:
            asked.update(options)
            raise ValueError("it has a script")

    monkeypatch.setitem(__import__("sys").modules, "datasets", Older)
    with pytest.raises(UserError, match="it has a script"):
        corpus.load_corpus("someone/poems")
    assert asked == {"trust_remote_code": False}


# ── judges ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("content", [{"model": Trap}, Trap, {"config": Trap}], ids=range(3))
def test_a_judge_that_is_a_pickle(content: Any, tmp_path: Path, sprung: Path):
    path = tmp_path / "judge.pt"
    trap = Trap(sprung)
    filled = trap if content is Trap else dict.fromkeys(content, trap)
    for write in (lambda: torch.save(filled, path), lambda: path.write_bytes(pickle.dumps(filled))):
        write()
        with pytest.raises(ValueError, match="cannot be read without running code"):
            load_judge(path)


@pytest.mark.parametrize("key", FOREIGN)
def test_a_judge_whose_configuration_names_other_code(key: str, tmp_path: Path, sprung: Path):
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    judge = tmp_path / "judge"
    small = ModernBertConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=17, num_labels=1, pad_token_id=0, cls_token_id=1,
    )  # fmt: skip
    ModernBertForSequenceClassification(small).save_pretrained(judge)
    (judge / "evil.py").write_text(f"import os\nos.system('touch {sprung}')\n")
    path = judge / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: FOREIGN[key]}))
    with contextlib.suppress(ValueError):
        load_judge(judge)
