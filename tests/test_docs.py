"""What the documentation says is there, and its code runs."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import lossmith

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ENTRANCES = [ROOT / "docs" / name for name in ("index.md", "modifiers.md", "unified.md")]
LINK = re.compile(r"\]\(([^)#]+?)(?:#[^)]*)?\)")
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PARTS = ("arithmetic", "statistics", "gradient", "sampling", "derivation", "weighing")
KERNELS = {f"triton_{name}" for name in PARTS}
CORE = [m.name for m in pkgutil.walk_packages(lossmith.__path__, "lossmith.") if ".training" not in m.name]


def test_the_api_page_lists_exactly_the_exported_names():
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(lossmith.__all__)
    assert len(listed) == len(set(listed))


def test_the_statistics_page_lists_every_statistic():
    from lossmith.engine.statistics.stats import STATISTIC_NAMES

    page = (ROOT / "docs" / "objectives.md").read_text()
    assert not [name for name in STATISTIC_NAMES if f"`{name}`" not in page]
    assert not [name for name in STATISTIC_NAMES if f"{name}:" not in lossmith.TokenStats.__doc__]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page):
    """The blocks of a page run in turn, as a reader would type them."""
    blocks = CODE.findall(page.read_text())
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


def test_every_page_is_linked_from_an_entrance():
    linked = {
        (page.parent / target).resolve() for page in ENTRANCES for target in LINK.findall(page.read_text())
    }
    assert set((ROOT / "docs").rglob("*.md")) - linked <= {ENTRANCES[0]}


@pytest.mark.parametrize("module", CORE)
def test_docstring_examples_run(module):
    if module.rsplit(".", 1)[1] in KERNELS:
        pytest.importorskip("triton")
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


@pytest.mark.parametrize("name", lossmith.__all__)
def test_public_docstrings_are_complete(name):
    """Formula or purpose, every argument, and an example that runs for what is called."""
    public = getattr(lossmith, name)
    text = inspect.getdoc(public) or ""
    assert text, f"{name} has no docstring"
    if inspect.isfunction(public):
        assert "Example:" in text
        for argument in inspect.signature(public).parameters:
            assert re.search(rf"\b{argument}\b", text), f"{name} does not document {argument}"


def test_the_module_and_the_function_have_the_same_options():
    function = inspect.signature(lossmith.cross_entropy).parameters
    module = inspect.signature(lossmith.CrossEntropyLoss).parameters
    per_batch = {"logits", "targets", "denominator", "mask", "token_weight", "return_stats"}
    assert set(module) == set(function) - per_batch
    for name in module:
        if name != "shift":  # None, which an integration may decide on; a function has no model
            assert module[name].default == function[name].default
