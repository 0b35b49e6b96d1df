"""The rooms of the package import in one direction; the core depends on torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "lossmith"

# From the ground up: a room imports from its own folder and from what stands before it here.
ORDER = [
    {"options"},
    {"core"},
    {"engine"},
    {"equation"},
    {"terms"},
    {"components"},
    {"objectives"},
    {"modifiers"},
    {"functional"},
    {"linear_functional"},
    {"corpus_perplexity", "testing"},
    {"integrations"},
    {"training"},
]
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
OUTSIDE_THE_CORE = {"integrations", "training", "report"}
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            found.add(node.module or "")
            if node.module == "lossmith":
                found |= {f"lossmith.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_rooms_import_downwards(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    for name in imports_of(path):
        other = name.split(".")[1] if name.startswith("lossmith.") else None
        if other is None or other == room:
            continue
        if other not in LEVELS:  # a public name of the package: `from lossmith import cross_entropy`
            assert room in OUTSIDE_THE_CORE, (
                f"{path.name}, in the core, imports {name} from the package's face"
            )
            continue
        assert room != "report", "the report reads files and imports nothing of the library"
        assert LEVELS[other] < LEVELS[room], f"{room} must not import {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_the_core_depends_on_torch_alone(path):
    if room_of(path) in OUTSIDE_THE_CORE:
        return
    top = {name.split(".")[0] for name in imports_of(path)}
    assert top <= set(sys.stdlib_module_names) | {"torch", "lossmith"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_importing_the_package_is_cheap():
    """No framework, and nothing compiled, on import."""
    code = (
        "import sys, torch; before = set(sys.modules); import lossmith; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new & {'transformers', 'omegaconf', 'typer', 'rich', 'triton'}));"
        "from lossmith.engine.native import build; print(build.library.cache_info().currsize)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split("\n")[:2] == ["[]", "0"]
