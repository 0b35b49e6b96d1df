"""What a type checker says of a user's file: right calls have types, and wrong names and values are found."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

needs_pyright = pytest.mark.skipif(not importlib.util.find_spec("pyright"), reason="pyright is not installed")

ROOT = Path(__file__).parents[1]
# PyTorch's own functions that say nothing of their types, where a page calls them.
UNTYPED_IN_TORCH = re.compile(r'Type of "(backward|manual_seed|step)" is partially unknown')
STRICT_PAGES = [
    "README.md",
    "docs/index.md",
    "docs/normalisation.md",
    "docs/first_run.md",
    "docs/debug_a_run.md",
]
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

USER = """
import lossmith
import torch
from typing_extensions import assert_type

logits, targets = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
hidden, weight = torch.zeros(2, 3, 4), torch.zeros(5, 4)

assert_type(lossmith.cross_entropy(logits, targets, label_smoothing=0.1, shift=True), torch.Tensor)
loss, stats = lossmith.cross_entropy(logits, targets, mask=targets > 0, return_stats=True)
assert_type(stats, lossmith.TokenStats)
assert_type(stats.nll, torch.Tensor)
assert_type(lossmith.linear_cross_entropy(hidden, weight, targets, strategy="two_sweep"), torch.Tensor)
criterion = lossmith.CrossEntropyLoss(z_loss=1e-4)
assert_type(criterion(logits, targets), torch.Tensor)
assert_type(criterion(logits, targets, return_detailed=True), dict[str, torch.Tensor])
assert_type(criterion.evaluate(logits, targets), lossmith.LossOutput)
assert_type(lossmith.UnifiedLoss(vocab_size=5)(logits, targets), torch.Tensor)

lossmith.cross_entropy(logits, targets, label_smooth=0.1)  # wrong
lossmith.cross_entropy(logits, targets, reduction="average")  # wrong
lossmith.linear_cross_entropy(hidden, weight, targets, strategy="once")  # wrong
lossmith.linear_cross_entropy(hidden, weight, targets, focal=2.0)  # wrong
lossmith.CrossEntropyLoss(zloss=1e-4)  # wrong
lossmith.UnifiedLoss(vocab_size="5")  # wrong
"""


@needs_pyright
def test_a_type_checker_reads_the_public_calls(tmp_path):
    file = tmp_path / "user.py"
    file.write_text(USER)
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    shown = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", str(file)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    found = json.loads(shown.stdout)["generalDiagnostics"]
    lines = {item["range"]["start"]["line"]: item["message"] for item in found}
    wrong = {k for k, line in enumerate(USER.splitlines()) if line.endswith("# wrong")}
    assert set(lines) == wrong, {USER.splitlines()[k]: message for k, message in lines.items()}


def read_strictly(folder: Path) -> list[dict]:
    """What a type checker says of the files in a folder."""
    config = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT / "src")]}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", str(folder)]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return json.loads(shown.stdout)["generalDiagnostics"]


def assigned(source: str) -> list[str]:
    """The names that a file assigns to at its top."""
    targets = [t for node in ast.parse(source).body if isinstance(node, ast.Assign) for t in node.targets]
    return list(dict.fromkeys(n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)))


@needs_pyright
def test_nothing_that_a_public_call_returns_is_of_unknown_type(tmp_path):
    source = (ROOT / "tests" / "static_types" / "user_code.py").read_text()
    names = assigned(source)
    assert len(names) > 60
    revealing = "\n".join(f"reveal_type({name})" for name in names)
    (tmp_path / "user_code.py").write_text(f"{source}\n{revealing}\n")
    for page in STRICT_PAGES:
        blocks = CODE.findall((ROOT / page).read_text())
        (tmp_path / f"{page.replace('/', '_')[:-3]}.py").write_text("\n".join(blocks))
    found = read_strictly(tmp_path)
    revealed = [item["message"] for item in found if item["severity"] == "information"]
    assert len(revealed) == len(names)
    assert not [message for message in revealed if re.search(r"\b(Any|Unknown)\b", message)]
    wrong = [item for item in found if item["severity"] != "information"]
    assert not [item for item in wrong if not UNTYPED_IN_TORCH.search(item["message"])]
