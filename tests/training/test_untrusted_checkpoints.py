"""Checkpoints and their tokenizers are data: nothing in them is executed, with a good manifest either."""

import contextlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from running import go, reseal
from traps import FOREIGN, Trap

from lossmith.training.errors import UserError

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
