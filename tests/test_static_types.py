"""What a type checker says of a user's file: right calls have types, and wrong names and values are found."""

import importlib.util
import json
import subprocess
import sys

import pytest

needs_pyright = pytest.mark.skipif(not importlib.util.find_spec("pyright"), reason="pyright is not installed")

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
