"""What is said about installing is true of pyproject.toml."""

import re
from pathlib import Path

import lossmith

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
EXTRAS = set(
    re.findall(r"^(\w+) = \[", PROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0], re.M)
)
NAMED = re.compile(r"(?:lossmith|\.)\[([a-z,]+)\]")


def test_the_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.*)"', PROJECT, re.M)
    assert version is not None
    assert lossmith.__version__ == version[1]
    assert f"version: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_extra_that_somebody_is_told_to_install_is_there():
    pages = [
        ROOT / "README.md",
        ROOT / "Makefile",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "src").rglob("*.py"),
    ]
    named = {
        extra for page in pages for found in NAMED.findall(page.read_text()) for extra in found.split(",")
    }
    assert {"train", "report", "track"} <= named <= EXTRAS


def test_the_page_on_installing_lists_every_extra():
    page = (ROOT / "docs" / "install.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == EXTRAS


def test_readme_is_short_and_has_one_picture():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 120
    assert len(re.findall(r"!\[[^]]+\]\(([^)]+)\)", readme)) == 1
