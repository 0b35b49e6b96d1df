"""The corpus, its split, the tokenizer, the blocks and the windows."""

import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from lossmith.training.data.blocks import IGNORED, RandomBlocks, Windows
from lossmith.training.data.corpus import Corpus, load_corpus, split_corpus
from lossmith.training.data.tokenizer import CLS, END_OF_TEXT, MASK, bytes_per_token, encode, train_tokenizer
from lossmith.training.errors import UserError

# ── corpus ────────────────────────────────────────────────────────────────────────────────────────


def test_the_last_tenth_is_held_out_at_a_line_break():
    documents = ["".join(f"line {i} of {name}\n" for i in range(200)) for name in "abc"]
    corpus = split_corpus("three", documents)
    assert "".join(corpus.train + corpus.held_out) == "".join(documents)
    share = len("".join(corpus.held_out)) / len("".join(documents))
    assert 0.095 < share < 0.105
    assert corpus.train[-1].endswith("\n")


def test_a_text_of_one_line_is_split_all_the_same():
    corpus = split_corpus("one", ["abcdefghij" * 10])
    assert (len(corpus.train[0]), len(corpus.held_out[0])) == (90, 10)


@pytest.mark.parametrize(
    "text",
    [
        "word " * 4999 + "word\n",
        ("ab cde " * 50 + "\n") * 4,
        "x" * 950 + "\n" + "y" * 49,
        "x " * 475 + "\n" + "y " * 24 + "\n",
        "日本語" * 1000 + "\n",
        "x" * 891 + "\n" + "y" * 108,  # the nearer break is the one before
    ],
    ids=["one line", "four lines", "95 + 5", "95 + 5, in words", "no spaces", "before"],
)
def test_a_tenth_is_held_out_however_long_the_lines_are(text: str):
    corpus = split_corpus("long", [text])
    assert corpus.train[0] + corpus.held_out[0] == text
    assert 0.089 <= len(corpus.held_out[0]) / len(text) <= 0.111
    assert text.find(" ") < 0 or corpus.train[0][-1].isspace()


def test_the_default_text_has_nothing_of_the_held_out_part_in_the_training_part():
    corpus = load_corpus("pydoc")
    assert len("".join(corpus.train)) > 200_000
    seen = {" ".join(p.split()) for text in corpus.train for p in text.split("\n\n")}
    held_out = {" ".join(p.split()) for text in corpus.held_out for p in text.split("\n\n")}
    assert not {paragraph for paragraph in seen & held_out if len(paragraph) > 40}


def test_a_folder_of_texts_is_read_by_name_and_leaves_out_what_is_no_text(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second\n" * 100)
    (tmp_path / "sub" / "c.md").write_text("third\n" * 10)
    (tmp_path / "a.txt").write_text("first\n" * 100)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "zeros.bin").write_bytes(b"\0" * 100)
    (tmp_path / ".hidden").write_text("no")
    corpus = load_corpus(str(tmp_path))
    assert "".join(corpus.train + corpus.held_out) == "first\n" * 100 + "second\n" * 100 + "third\n" * 10


def test_a_split_that_the_folder_brings_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "data" / "novel"
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("to learn from")
    (folder / "val.txt").write_text("to be judged by")
    (folder / "readme.txt").write_text("not a part of it")
    monkeypatch.chdir(tmp_path)
    corpus = load_corpus("novel")
    assert (corpus.train, corpus.held_out) == (["to learn from"], ["to be judged by"])


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_a_held_out_part_may_have_several_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "train.txt").write_text("to learn from")
    (tmp_path / f"{name}.txt").write_text("to be judged by")
    corpus = load_corpus(str(tmp_path))
    assert (corpus.train, corpus.held_out) == (["to learn from"], ["to be judged by"])
    fake_hub(monkeypatch, {"train": Rows(text=["a"]), name: Rows(text=["b"])})
    assert load_corpus("someone/poems") == Corpus("someone/poems", ["a"], ["b"])


def test_a_missing_dataset_says_what_was_tried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"'nowhere' was not found\. Tried: .*data/nowhere.*pip install datasets"
    ):
        load_corpus("nowhere")


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: object) -> None:
    """Put a `datasets` in place whose `load_dataset` answers or raises `answer`."""

    def load_dataset(name: str) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


class Rows(dict):
    """As much of a `datasets.Dataset` as is used."""

    column_names = property(lambda self: list(self))


def test_the_hub_is_asked_last(monkeypatch: pytest.MonkeyPatch):
    fake_hub(monkeypatch, {"train": Rows(text=["a", " ", "b"]), "validation": Rows(text=["c"])})
    assert load_corpus("someone/poems") == Corpus("someone/poems", ["a", "b"], ["c"])
    fake_hub(monkeypatch, {"train": Rows(text=["0123456789" * 10])})
    assert load_corpus("someone/poems").held_out == ["0123456789"]
    fake_hub(monkeypatch, {"train": Rows(sentence=["a"])})
    with pytest.raises(UserError, match="has columns sentence; expected one named 'text'"):
        load_corpus("someone/poems")
    fake_hub(monkeypatch, OSError("no route"))
    with pytest.raises(UserError, match="which said: no route"):
        load_corpus("someone/poems")


def test_what_holds_no_text(tmp_path: Path):
    with pytest.raises(UserError, match="holds no UTF-8 text file"):
        load_corpus(str(tmp_path))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="holds no text"):
        load_corpus(str(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 3"):
        load_corpus(str(tmp_path / "latin.txt"))
    with pytest.raises(UserError, match="dataset is empty"):
        load_corpus("")


# ── tokens ────────────────────────────────────────────────────────────────────────────────────────

CORPUS = Corpus("small", ["le café noir\n" * 50, "das Übermaß der Dinge\n" * 50], ["日本語 und café 🙂\n"])


def test_any_text_survives_the_tokenizer_and_its_bytes_are_counted():
    tokenizer = train_tokenizer(CORPUS, 280)
    sizes = bytes_per_token(tokenizer)
    assert len(sizes) == 280
    for text in [*CORPUS.train, *CORPUS.held_out, "\t\x00\r\n"]:
        tokens = encode(tokenizer, [text])
        assert tokenizer.decode(tokens[1:]) == text
        assert sizes[tokens].sum() == len(text.encode())


def test_each_document_follows_an_end_of_text():
    tokenizer = train_tokenizer(CORPUS, 280)
    tokens = encode(tokenizer, ["ab", "c"])
    assert tokenizer.convert_ids_to_tokens(tokens.tolist()) == [END_OF_TEXT, "a", "b", END_OF_TEXT, "c"]


def test_the_end_of_text_spelled_out_in_a_text_is_just_text():
    text = f"ab{END_OF_TEXT}c {END_OF_TEXT}{MASK}{CLS}"
    tokenizer = train_tokenizer(Corpus("marked", [text * 20], ["x"]), 259)
    start = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    tokens = encode(tokenizer, [text, END_OF_TEXT])
    assert tokens.tolist().count(start) == 2  # one before each document
    assert tokens[0] == start
    sizes = bytes_per_token(tokenizer)
    assert sizes[:3].tolist() == [0, 0, 0]
    assert not (tokens == tokenizer.mask_token_id).any()
    assert not (tokens == tokenizer.cls_token_id).any()
    assert sizes[tokens].sum() == len(text.encode()) + len(END_OF_TEXT)
    assert tokenizer.decode(tokens[tokens != start]) == text + END_OF_TEXT


def test_a_vocabulary_that_the_text_cannot_fill():
    with pytest.raises(
        UserError, match=r"vocab_size=5000 is too large for small.* Pass --vocab_size=(\d+)"
    ) as caught:
        train_tokenizer(CORPUS, 5000)
    remedy = int(str(caught.value).split("--vocab_size=")[1].split()[0])
    assert len(train_tokenizer(CORPUS, remedy)) == remedy


# ── blocks and windows ────────────────────────────────────────────────────────────────────────────


def test_a_block_depends_on_the_seed_and_its_number_alone():
    tokens = torch.arange(1000)
    short, long = (RandomBlocks(tokens, 8, n, seed=1) for n in (10, 10_000))
    other = RandomBlocks(tokens, 8, 10, seed=2)
    starts = [int(long[i]["input_ids"][0]) for i in range(10_000)]
    assert all(torch.equal(short[i]["input_ids"], long[i]["input_ids"]) for i in range(10))
    assert any(not torch.equal(short[i]["input_ids"], other[i]["input_ids"]) for i in range(10))
    # every offset can come, the first and the last included
    assert (min(starts), max(starts)) == (0, 992)
    assert torch.equal(short[0]["labels"][1:], short[0]["input_ids"][1:])
    assert short[0]["labels"][0] == IGNORED


@pytest.mark.parametrize("length", [2, 7, 8, 9, 15, 16, 50])
def test_the_windows_predict_every_token_but_the_first_exactly_once(length: int):
    predicted = []
    for window in [Windows(torch.arange(length), 8)[i] for i in range(len(Windows(torch.arange(length), 8)))]:
        assert len(window["input_ids"]) == len(window["labels"]) == 8
        for given, target in zip(window["input_ids"][:-1], window["labels"][1:], strict=True):
            if target != IGNORED:
                assert given == target - 1
                predicted.append(int(target))
    assert predicted == list(range(1, length))


def test_texts_that_are_too_short():
    with pytest.raises(UserError, match=r"8 tokens but block_size=8.* Pass --block_size=2"):
        RandomBlocks(torch.arange(8), 8, 10, seed=1)
    with pytest.raises(UserError, match="held-out text has 1 tokens"):
        Windows(torch.arange(1), 8)
