"""The pages as a site: it builds without a warning, leads where it says, and asks nobody for anything."""

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = ("mkdocs", "material", "mkdocstrings", "latex2mathml")
FETCHED = re.compile(r'<(?:script|img|iframe)[^>]* src="(?!data:)([^"]*)"|<link[^>]* href="([^"]*)"')


def script(name):
    """A script as a module."""
    loader = SourceFileLoader(f"script_{Path(name).stem}", str(ROOT / "scripts" / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def links():
    return script("links")


def test_the_picture_of_gradients_is_what_the_losses_do():
    gradients = script("site/gradients.py")
    number = re.compile(r"-?\d+\.\d+")
    drawn, now = gradients.OUTPUT.read_text(), gradients.picture()
    assert number.sub("", drawn) == number.sub("", now)  # every panel and line
    for before, after in zip(number.findall(drawn), number.findall(now), strict=True):
        assert abs(float(before) - float(after)) < 0.2


def test_links_signatures_and_goals_are_as_they_should_be(links):
    assert links.problems() == []


def test_the_script_notices_what_is_wrong(links, tmp_path, monkeypatch):
    for name in ("docs", "src/lossmith"):
        ignored = shutil.ignore_patterns("*.svg", "*.png", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text("")
    docs = tmp_path / "docs"
    monkeypatch.setattr(links, "ROOT", tmp_path)
    monkeypatch.setattr(links, "DOCS", docs)
    monkeypatch.setattr(links, "FRONT", docs / "index.md")
    (docs / "alone.md").write_text("# Alone\n\n[no](nowhere.md) [no](index.md#no-such-heading)\n")
    page = docs / "reference" / "functions.md"
    page.write_text(page.read_text().replace("::: lossmith.token_stats\n", ""))
    index = docs / "index.md"
    index.write_text(index.read_text().replace("inventing.md", "training.md"))
    found = "\n".join(links.problems())
    assert "docs/alone.md: nowhere.md leads nowhere" in found
    assert "docs/alone.md: index.md#no-such-heading: no such heading" in found
    assert "docs/alone.md is not linked from anywhere" in found
    assert "lossmith.token_stats has 0 signatures" in found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    for name in NEEDED:
        pytest.importorskip(name, reason=f"{name} is not installed: it is in the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_and_asks_nobody_for_anything(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        fetched = [either for pair in FETCHED.findall(page.read_text()) for either in pair if either]
        assert not [address for address in fetched if address.startswith(("http", "//"))], page


def test_the_reference_has_signatures_formulas_and_examples(site):
    page = (site / "reference" / "functions.html").read_text()
    assert 'id="lossmith.cross_entropy"' in page
    signature = page[page.index('id="lossmith.cross_entropy"') :]
    text = re.sub(r"<[^>]*>", "", signature[: signature.index("<math")])
    for option in ("label_smoothing", "z_loss", "denominator", "return_stats"):
        assert option in text
    assert "exclude_target" in text
    assert "Unpack" not in text
    assert "SmoothingMode" not in text
    assert "arithmatex" not in page


def test_drawings_take_the_colour_of_the_page_and_changes_are_the_changelog(site):
    assert "<svg" in (site / "how_it_works.html").read_text()
    assert "Unreleased" in (site / "changes.html").read_text()


def test_links_to_files_outside_of_the_pages_become_their_paths():
    pytest.importorskip("latex2mathml")
    hooks = script("site/hooks.py")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="modifiers/judge.md"))
    text = "[a](../cross_entropy.md#x) [b](../../config/nvamp.py) [`config/nvamp.py`](../../config/nvamp.py)"
    text += " [c](../../CHANGELOG.md#unreleased) [d](https://e.org)"
    expected = "[a](../cross_entropy.md#x) b (`config/nvamp.py`) `config/nvamp.py`"
    expected += " [c](../changes.md#unreleased) [d](https://e.org)"
    assert hooks.on_page_markdown(text, page) == expected
    page.file.src_uri = "contributing.md"  # which lies beside docs/
    assert "[How it works](how_it_works.md)" in hooks.on_page_markdown("", page)
    assert hooks.LINK.sub(lambda found: hooks._link(found, ROOT, ROOT / "docs"), "[a](config/nvamp.py)") == (
        "a (`config/nvamp.py`)"
    )
