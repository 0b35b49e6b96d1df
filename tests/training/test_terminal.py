"""What reaches the terminal: escape bytes and markup of others are shown, never obeyed."""

import ast
import io
import sys
import unicodedata
import warnings
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from running import go, rows

from lossmith.training import cli
from lossmith.training.config.reading import load_config
from lossmith.training.run.runner import run
from lossmith.training.run.terminal import say, visible

SOURCE = Path(__file__).parents[2] / "src" / "lossmith" / "training"
TITLE = "\x1b]0;owned\x07"
EVIL = f"{TITLE}\x1b[31mred\x9b2J\r\u202e\u2066\b[bold]x[/bold][red]"


def obeyed(shown: str) -> set[str]:
    """The characters of a text that a terminal would act on."""
    return {c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n"} | {
        c for c in shown if unicodedata.bidirectional(c) in ("RLO", "LRO", "RLE", "LRE", "PDF", "RLI", "LRI")
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é, 漢字, ל, 👩\u200d💻, a\tb\nc", "plain, é, 漢字, ל, 👩\u200d💻, a\tb\nc"),
        ("\x1b[31mred", r"\x1b[31mred"),
        (TITLE, r"\x1b]0;owned\x07"),
        ("a\rb\r\nc", "a\\x0db\\x0d\nc"),
        ("\x9b2J\x85\x7f\x00\b", r"\x9b2J\x85\x7f\x00\x08"),
        ("\u202eabc\u2069\u061c\u200e", r"\u202eabc\u2069\u061c\u200e"),
        ("a\u2028b", r"a\u2028b"),
        ("\udcff", r"\udcff"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_a_terminal_would_act_on_is_spelled_out(text: str, shown: str):
    assert visible(text) == shown


def printed(what: object, **options: bool) -> str:
    console = Console(file=io.StringIO(), width=60, **options)  # pyright: ignore[reportArgumentType]
    say(console, what)  # pyright: ignore[reportArgumentType]
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_texts_tables_and_panels():
    table = Table()
    table.add_column("[red]column")
    table.add_row(Text(EVIL))
    styled = Text.assemble(("one\x1b", "bold"), " two", ("\x9bthree", "red"))
    for what in (EVIL, Text(EVIL), styled, table, Panel(Text(EVIL)), Panel(styled)):
        shown = printed(what)
        assert not obeyed(shown)
        assert "\\x1b" in shown or "\\x9b" in shown
    assert "[bold]x[/bold][red]" in printed(EVIL)
    assert "[bold]x[/bold][red]" in printed(Text(EVIL))


def test_styles_stay_where_they_were():
    text = Text.assemble("\x1b", ("bold", "bold"), "\x1bplain\x1b", ("red", "red"))
    shown = printed(text, force_terminal=True)
    assert "\x1b[1mbold\x1b[0m" in shown
    assert "\x1b[31mred\x1b[0m" in shown
    assert shown.count("\\x1b") == 3


def test_a_panel_keeps_its_shape_and_its_text():
    lines = printed(Panel(Text("\x1b" * 30 + "end"))).splitlines()
    assert {len(line) for line in lines} == {60}
    assert "".join(line.strip("│ ") for line in lines[1:-1]) == r"\x1b" * 30 + "end"


# ── whole runs ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def evil_text(tmp_path: Path) -> Path:
    """A text that is mostly escape sequences, in a file called like one."""
    path = tmp_path / f"{EVIL.replace('/', '')}.txt"
    path.write_text(f"{EVIL} the a \x1b[2J model\r {TITLE}\n" * 300, encoding="utf-8", newline="")
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="no such file names there")
@pytest.mark.parametrize("mode", [[], ["--objective=masked"], ["--mode=token_classifier"]])
def test_a_run_on_an_evil_text(tiny: list[str], evil_text: Path, tmp_path: Path, mode: list[str]):
    out = tmp_path / EVIL.replace("/", "")
    flags = [*tiny, *mode, f"--dataset={evil_text}", f"--out_dir={out}", "--vocab_size=290"]
    shown = go([*flags, "--sample_tokens=100"])[1]
    shown += go([f"--out_dir={out}", "--eval_only"])[1]
    shown += go(flags)[1]
    assert not obeyed(shown)
    assert r"\x1b]0;owned\x07" in shown
    assert r"\u202e\u2066\x08[bold]x[bold][red]" in shown  # the file's name, without its slash
    assert rows(out)


@pytest.mark.parametrize(
    "args",
    [
        [f"--dataset={EVIL}"],
        [f"--out_dir=/nowhere/{EVIL}", "--resume"],
        [f"--out_dir=/dev/null/{EVIL}"],
        [f"--{EVIL}=3"],
        [f"--{EVIL}"],
        [f"--seed={EVIL}"],
        [f"--mode={EVIL}"],
        [EVIL],
        [f"{EVIL}.py"],
        ["--dataset=a\nb"],
    ],
)
def test_a_mistake_with_escape_bytes_is_one_plain_line(capsys: pytest.CaptureFixture[str], args: list[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *args])
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert not obeyed(shown.out + shown.err)
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    if EVIL in args[0] and "/" not in args[0]:
        assert "[red]" in shown.err


def test_a_config_file_with_escape_bytes(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    for content in (
        f"seed = {EVIL}\n",
        f"dataset = {EVIL!r}\n",
        f"x = {EVIL!r}\n",
        f"# {EVIL}\nseed = 'x'\n",
    ):
        file = tmp_path / "evil.py"
        file.write_text(content, newline="")
        with pytest.raises(SystemExit):
            cli.main(["train", str(file)])
        shown = capsys.readouterr()
        assert not obeyed(shown.out + shown.err)


@pytest.mark.parametrize("args", [[EVIL], [f"--{EVIL}"], ["train", "--help"]])
def test_the_command_line_s_own_mistakes(capsys: pytest.CaptureFixture[str], args: list[str]):
    with pytest.raises(SystemExit):
        cli.main(args)
    shown = capsys.readouterr()
    assert not obeyed(shown.out + shown.err)


def test_warnings_of_libraries_are_said_by_the_run_once(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from lossmith.training.run import runner

    original = runner.load_corpus

    def load_corpus(dataset: str):
        for _ in range(2):
            warnings.warn(f"look at {EVIL}", UserWarning, stacklevel=1)
        return original(dataset)

    monkeypatch.setattr(runner, "load_corpus", load_corpus)
    console = Console(file=io.StringIO(), width=200)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert run(load_config(tiny), console) == 0
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert shown.count(r"warning: look at \x1b]0;owned\x07") == 1
    assert not obeyed(shown)
    assert capsys.readouterr().err == ""


def test_everything_is_printed_in_one_place():
    """`say` alone prints; the help and the bar of a run hold nothing of a user's."""
    allowed = {"terminal.py", "cli.py"}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and path.name not in allowed:
                name = getattr(node.func, "attr", getattr(node.func, "id", None))
                assert name not in ("print", "log_message"), f"{path.name}:{node.lineno} prints"
