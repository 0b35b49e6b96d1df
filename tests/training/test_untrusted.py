"""Configurations, checkpoints, tokenizers, texts and judges are data: nothing in them is executed."""

import contextlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from running import go, reseal

from lossmith.integrations.judge import load_judge
from lossmith.training.config.reading import load_config
from lossmith.training.data import corpus
from lossmith.training.errors import UserError
from lossmith.training.run.folder import has_ended, step_in
from lossmith.training.untrusted import LARGEST_CONFIG, MIB, Unreadable, parse_json, read_bytes, read_text


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    """The file that a trap leaves; it must not be there after the test."""
    return tmp_path / "sprung"


@pytest.fixture(autouse=True)
def nothing_is_executed(sprung: Path) -> Any:
    yield
    assert not sprung.exists()


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


# ── checkpoints ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a loss with a state."""
    out = tmp_path_factory.mktemp("trained") / "run"
    keys = {
        "dataset": text_file, "out_dir": out, "vocab_size": 300, "block_size": 16, "n_layer": 1, "n_head": 2,
        "n_embd": 16, "max_iters": 4, "eval_interval": 4, "warmup_iters": 2, "sample_tokens": 0,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in keys.items()]
    assert go([*flags, "--device=cpu", "--loss=unified", "--use_mtp"])[0] == 0
    return out


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run's last checkpoint, in its run."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run" / "checkpoint-4"


def refused(checkpoint: Path) -> str:
    """The message with which a run refuses to go on from a checkpoint that was sealed as it is."""
    reseal(checkpoint)
    with pytest.raises(UserError) as caught:
        go([f"--out_dir={checkpoint.parent}", "--resume", "--max_iters=6"])
    assert len(str(caught.value)) < 1000
    assert str(checkpoint) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("way", ["bare", "saved by PyTorch"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "lossmith_loss.pt"])
def test_a_pickle_that_calls_something(name: str, way: str, copied: Path, sprung: Path):
    if way == "bare":
        (copied / name).write_bytes(pickle.dumps(Trap(sprung)))
    else:
        torch.save({"state": Trap(sprung), "param_groups": []}, copied / name)
    refused(copied)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "scaler.pt", "training_args.bin", "optimizer.bin"])
def test_a_pickle_under_a_name_that_the_library_knows(name: str, copied: Path, sprung: Path):
    torch.save({"state": Trap(sprung)}, copied / name)
    reseal(copied)
    with contextlib.suppress(UserError):
        go([f"--out_dir={copied.parent}", "--resume", "--max_iters=6"])


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "tokenizer.json", "trainer_state.json"]
)
@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{}", '{"a": ' + "9" * 5000 + "}", "\0", "\udcff"])
def test_json_of_a_checkpoint_that_is_something_else(name: str, content: str, copied: Path):
    if (name, content) == ("tokenizer_config.json", "{}"):
        return  # it says nothing, and nothing is needed
    (copied / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(copied)


FOREIGN = {
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    "attn_implementation": "someone/evil-kernel",
    "_attn_implementation": "someone/evil-kernel",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "trust_remote_code": True,
}


@pytest.mark.parametrize("key", FOREIGN)
@pytest.mark.parametrize("way", ["--resume", "--eval_only"])
def test_a_configuration_that_names_other_code(key: str, way: str, copied: Path, sprung: Path):
    (copied / "evil.py").write_text(f"import os\nos.system('touch {sprung}')\n")
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: FOREIGN[key]}))
    tokenizer = copied / "tokenizer_config.json"
    auto_map = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "evil.Tokenizer"}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | auto_map))
    reseal(copied)
    steps = ["--max_iters=5"] if way == "--resume" else []
    assert go([f"--out_dir={copied.parent}", way, *steps])[0] == 0  # only its sizes are read


@pytest.mark.parametrize("target", ["../outside.safetensors", "/etc/passwd", "evil.bin", 5])
@pytest.mark.parametrize("way", ["--resume", "--eval_only"])
def test_an_index_of_weights_that_names_other_files(target: Any, way: str, copied: Path):
    shutil.copy(copied / "model.safetensors", copied.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": target}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    (copied / "model.safetensors").unlink()
    reseal(copied)
    with pytest.raises(UserError, match=r"checkpoint-4/model\.safetensors"):
        go([f"--out_dir={copied.parent}", way, *(["--max_iters=6"] if way == "--resume" else [])])


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../outside": {"size": 1, "sha256": "0"}}},
        {"files": {"/etc/passwd": {"size": 1, "sha256": "0"}}},
        {"files": {"a": {"size": -1, "sha256": "0"}}},
        {"files": {"a": {"size": 1, "sha256": "0", "more": 1}}},
        {"files": []},
        {"step": -4},
        {"step": True},
        {"num_ranks": "1"},
    ],
    ids=range(8),
)
def test_a_manifest_that_was_made_up(change: dict[str, Any], copied: Path):
    path = copied / "lossmith_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"lossmith_manifest\.json is damaged; expected the list"):
        go([f"--out_dir={copied.parent}", "--resume", "--max_iters=6"])


# ── tokenizers ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
                           "invert": False}},
        {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}},
        {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
                     "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}},
        {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}},
        {"post_processor": {"type": "evil"}},
        {"added_tokens": [{"id": 2**31, "content": "xyzzy", "single_word": False, "lstrip": False,
                           "rstrip": False, "normalized": False, "special": True}]},
    ],
    ids=range(8),
)  # fmt: skip
def test_a_tokenizer_with_odd_content(change: dict[str, Any], copied: Path):
    path = copied / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(copied)


def test_a_tokenizer_with_other_numbers(copied: Path):
    path = copied / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] = 2**31
    path.write_text(json.dumps(content))
    refused(copied)


# ── texts ─────────────────────────────────────────────────────────────────────────────────────────


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
