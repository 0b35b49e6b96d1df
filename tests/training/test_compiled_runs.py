"""A compiled run is the run it would have been."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from running import go, rows

UNIFIED = [
    "--loss=unified", "--use_mtp", "--num_future_tokens=1", "--shared_projection", "--use_focal_loss",
    "--use_immediate_repetition_penalty", "--label_smoothing=0.1",
]  # fmt: skip


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="to PyTorch 2.7 it crashes; 2.8 was not tried")
@pytest.mark.slow
def test_a_compiled_run_of_the_unified_loss(tiny: list[str], tmp_path: Path):
    found = {}
    for name, more in {"eager": [], "compiled": ["--compile"]}.items():
        code, shown = go([*tiny, *UNIFIED, *more, "--max_iters=4", f"--out_dir={tmp_path / name}"])
        assert code == 0
        assert (", compiled" in shown) == (name == "compiled")
        found[name] = [row for row in rows(tmp_path / name) if "loss" in row]
    for ours, theirs in zip(found["compiled"], found["eager"], strict=True):
        losses = {key: value for key, value in theirs.items() if "loss" in key}
        assert len(losses) > 4
        assert {key: ours[key] for key in losses} == pytest.approx(losses, rel=1e-4, abs=1e-6)
