"""Text: where it comes from and which part is held out.

The last tenth is held out, whatever the seed, unless the dataset has a validation split of its own.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lossmith.training import untrusted
from lossmith.training.errors import UserError

HELD_OUT_SHARE = 0.1
CUT_WITHIN = 0.01  # share of the text within which to look for the end of a line
COMMONPLACE = 40  # characters; shorter paragraphs, such as "Note:", recur without being quotations
LARGEST_TEXT = 4 * untrusted.GIB  # of a file
TRAIN_NAMES = ("train",)
HELD_OUT_NAMES = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out."""

    name: str
    train: list[str]
    held_out: list[str]


def load_corpus(dataset: str) -> Corpus:
    """Read `pydoc`, a path, a folder under `data/`, or a dataset of the Hugging Face hub."""
    if dataset == "pydoc":
        return split_corpus("Python's own documentation (pydoc)", python_documentation())
    if not dataset.strip():
        raise UserError("dataset is empty; expected `pydoc`, a text file, a folder, or a name. See --help.")
    for path in (Path(dataset).expanduser(), Path("data") / dataset):
        if path.is_file():
            return split_corpus(str(path), [read_text(path)])
        if path.is_dir():
            return read_folder(path)
    return read_from_hub(dataset)


def split_corpus(name: str, documents: list[str]) -> Corpus:
    """Hold out about the last tenth of the characters, starting at a line or a word."""
    documents = [document for document in documents if document.strip()]
    total = sum(map(len, documents))
    if not total:
        raise UserError(f"dataset {name} holds no text; expected at least a few thousand characters.")
    position, index = total - max(1, round(total * HELD_OUT_SHARE)), 0
    while position > len(documents[index]):
        position -= len(documents[index])
        index += 1
    document = documents[index]
    cut = place_to_cut(document, position, round(total * CUT_WITHIN))
    train = [*documents[:index], document[:cut]]
    held_out = [document[cut:], *documents[index + 1 :]]
    train, held_out = ([part for part in side if part.strip()] for side in (train, held_out))
    stripped = [document.strip() for document in documents]
    if not (train and held_out) and stripped != documents:  # one side was blank
        return split_corpus(name, stripped)
    return Corpus(name, train, held_out)


def place_to_cut(document: str, position: int, reach: int) -> int:
    """The nearest position after a line break, else after a space, within `reach`; else `position` itself."""
    for separator in "\n ":
        before = document.rfind(separator, max(0, position - reach - 1), position) + 1
        after = document.find(separator, position, position + reach) + 1
        found = [cut for cut in (before, after) if cut]
        if found:
            return min(found, key=lambda cut: abs(cut - position))
    return position


# ── sources ───────────────────────────────────────────────────────────────────────────────────────


def python_documentation() -> list[str]:
    """The reference documentation that ships with CPython, each paragraph once.

    Its topics quote one another. With the quotations, a twelfth of the held-out text would be in the
    training text.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for _, text in sorted(topics.items()):
        fresh = []
        for paragraph in re.split(r"\n[ \t]*\n", text.strip("\n")):
            words = " ".join(paragraph.split())
            if words not in seen or len(words) <= COMMONPLACE:
                fresh.append(paragraph)
            seen.add(words)
        if fresh:
            documents.append("\n\n".join(fresh) + "\n")
    return documents


def read_text(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        return untrusted.read_text(path, LARGEST_TEXT)
    except untrusted.NotText as error:
        raise UserError(
            f"dataset {path} is not UTF-8 text (byte {error.position} cannot be read). "
            "Convert it, for example with `iconv -t utf-8`."
        ) from None
    except untrusted.Unreadable as error:
        raise UserError(f"dataset {path} cannot be read: {error}. Check its permissions.") from None


def read_folder(folder: Path) -> Corpus:
    """All text files under a folder in order of their names, or its `train.*` and `val.*`."""
    texts: dict[Path, str] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            try:
                texts[path] = read_text(path)
            except UserError:
                continue  # a picture or an archive among the texts
    texts = {path: text for path, text in texts.items() if "\0" not in text and text.strip()}
    if not texts:
        raise UserError(
            f"dataset {folder} holds no UTF-8 text file; expected .txt files or the like "
            "(nanoGPT's train.bin holds tokens of another vocabulary, not text)."
        )
    train, held_out = (
        [text for path, text in texts.items() if path.parent == folder and path.stem in names]
        for names in (TRAIN_NAMES, HELD_OUT_NAMES)
    )
    if train and held_out:
        return Corpus(str(folder), train, held_out)
    return split_corpus(str(folder), list(texts.values()))


def read_from_hub(name: str) -> Corpus:
    """A dataset of the Hugging Face hub."""
    tried = f"a file or folder {name}, a folder {Path('data') / name}"
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise UserError(
            f"dataset {name!r} was not found. Tried: {tried}, and the Hugging Face hub, for which the "
            "`datasets` package is missing. Check the path, or `pip install datasets`."
        ) from None
    try:
        runs_scripts = int(getattr(datasets, "__version__", "4").split(".")[0]) < 4
        options: dict[str, Any] = {"trust_remote_code": False} if runs_scripts else {}
        loaded = datasets.load_dataset(name, **options)
    except Exception as error:  # the hub raises errors of many classes
        raise UserError(
            f"dataset {name!r} was not found. Tried: {tried}, and the Hugging Face hub, which said: {error}"
        ) from None
    texts = {}
    for split, rows in loaded.items():
        if "text" not in rows.column_names:
            raise UserError(
                f"dataset {name!r} has columns {', '.join(rows.column_names)}; expected one named 'text'. "
                "Write that column to a text file and pass its path."
            )
        texts[str(split)] = [text for text in rows["text"] if text.strip()]
    train, held_out = (
        next((texts[split] for split in names if split in texts), None)
        for names in (TRAIN_NAMES, HELD_OUT_NAMES)
    )
    if train and held_out:
        return Corpus(name, train, held_out)
    return split_corpus(name, train or [text for rows in texts.values() for text in rows])
