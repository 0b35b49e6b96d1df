"""The rooms of the package import in one direction; the core depends on torch alone."""

import ast
import graphlib
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
    {"perplexities", "testing"},
    {"analysis"},
    {"integrations"},
    {"report"},
    {"training"},
]
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
OUTSIDE_THE_CORE = {"integrations", "report", "training"}
# Of one's own room, inside a method: a modifier that is called alone is applied by a pipeline of it.
CALLED_ALONE = ("lossmith.modifiers.configured_modifier", "lossmith.modifiers.pipeline")
FILES = sorted(SOURCE.rglob("*.py"))
# What a GPU needs besides torch, and only once rows are computed there.
KERNELS = {
    f"triton_{name}"
    for name in ("arithmetic", "statistics", "gradient", "sampling", "derivation", "family", "weighing")
}
# Upwards, and only when it is asked for: a judge that is a checkpoint is loaded by the integration.
ASKED_FOR = {("modifiers", "lossmith.integrations.judge")}


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


def opened_later(path: Path) -> set[str]:
    """Modules that are imported by name while the program runs."""
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    named = (
        call for call in calls if ast.unparse(call.func).split(".")[-1] in ("import_module", "__import__")
    )
    return {
        call.args[0].value
        for call in named
        if isinstance(call.args[0], ast.Constant) and call.args[0].value.startswith("lossmith.")
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_rooms_import_downwards(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    later = {name for name in opened_later(path) if (room, name) not in ASKED_FOR}
    for name in imports_of(path) | later:
        other = name.split(".")[1] if name.startswith("lossmith.") else None
        if other is None or other == room:
            continue
        if other not in LEVELS:  # a public name of the package: `from lossmith import cross_entropy`
            assert room in OUTSIDE_THE_CORE, (
                f"{path.name}, in the core, imports {name} from the package's face"
            )
            continue
        assert LEVELS[other] < LEVELS[room], f"{room} must not import {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_the_core_depends_on_torch_alone(path):
    if room_of(path) in OUTSIDE_THE_CORE:
        return
    top = {name.split(".")[0] for name in imports_of(path)}
    if path.stem in KERNELS:
        top -= {"triton"}
    # torch itself depends on typing_extensions
    assert top <= set(sys.stdlib_module_names) | {"torch", "lossmith", "typing_extensions"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_kernels_are_imported_when_they_run(path):
    if path.stem in KERNELS:
        return
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names = {node.module or "", *(alias.name for alias in node.names)}
            assert not {name.split(".")[-1] for name in names} & KERNELS


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_functions_stay_short_and_nothing_is_global(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Global), f"line {node.lineno}: state of the whole process"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node) is not None
            first = node.body[0].end_lineno if has_docstring else node.lineno
            assert node.end_lineno - first <= 60, f"{node.name} in line {node.lineno} is too long"


def test_no_file_imports_itself_by_way_of_others():
    """Imports for type checkers alone do not count."""
    known = {".".join(("lossmith", *path.relative_to(SOURCE).with_suffix("").parts)) for path in FILES}
    edges = {}
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in [
            n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
        ]:
            node.body = [ast.Pass()]
        modules = (n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module)
        name = ".".join(("lossmith", *path.relative_to(SOURCE).with_suffix("").parts))
        edges[name] = {module for module in modules if module in known and (name, module) != CALLED_ALONE}
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda p: p.name)
def test_no_test_module_is_imported(path):
    """What several share has a file of its own."""
    assert not [name for name in imports_of(path) if name.split(".")[-1].startswith("test_")]


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
