"""A corpus and a model small enough to train in a second."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

WORDS = """
    the a model token loss reads writes learns predicts small large quickly of and every next
""".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some 12,000 characters with an accent in it, so that bytes and characters differ."""
    choose = random.Random(0)
    lines = [
        " ".join(choose.choice(WORDS) for _ in range(9)).capitalize() + " à la carte." for _ in range(180)
    ]
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tiny(text_file: Path, tmp_path: Path) -> list[str]:
    """Flags of a run that takes about a second; later flags win over these."""
    keys = {
        "dataset": text_file,
        "out_dir": tmp_path / "run",
        "vocab_size": 300,
        "block_size": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "max_iters": 6,
        "eval_interval": 3,
        "log_interval": 1,
        "warmup_iters": 2,
        "batch_size": 4,
        "sample_tokens": 8,
        "device": "cpu",
    }
    return [f"--{name}={value}" for name, value in keys.items()]


@pytest.fixture
def sprung(tmp_path: Path) -> Iterator[Path]:
    """The file that a trap leaves; it must not be there after the test."""
    path = tmp_path / "sprung"
    yield path
    assert not path.exists()
