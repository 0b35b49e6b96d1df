"""How many kernels a step launches and what it moves stays within a budget, counted without a device."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import lossmith
from lossmith.engine.head import products

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("launches", ROOT / "benchmarks" / "launches.py")
assert SPEC is not None
assert SPEC.loader is not None
launches = sys.modules["launches"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(launches)

# Forward and backward together; PyTorch's own is there to be compared with.
BUDGET = {
    "F.cross_entropy": 5,
    "cross-entropy": 11,
    "cross-entropy, all four": 12,
    "cross-entropy at a temperature, with a mask and class weights": 24,
    "NVAMP": 77,
    "pipeline: entropy, smoothing": 116,
    "UnifiedLoss, most parts": 145,
    "UnifiedLoss, adaptive temperature": 162,
}


def test_every_path_has_a_budget():
    assert set(BUDGET) == set(launches.PATHS)


@pytest.mark.parametrize("name", BUDGET)
def test_a_step_stays_within_its_budget(name):
    step = launches.PATHS[name]()
    assert 0 < step.total <= BUDGET[name]
    if name != "F.cross_entropy":  # each logit is read, read again, and its gradient written: once
        assert step.bytes_per_element == 6
    if torch.__version__.startswith("2.13"):  # others split some operators differently
        assert launches.row(name, step) in (ROOT / "docs" / "engine.md").read_text()


# Over a head: three products, and what a chunk launches besides.
BUDGET_OF_HEAD = {
    "cross-entropy, 1 chunk": 40,
    "cross-entropy, 8 chunks": 160,
    'the same, `logits_dtype="input"`': 152,
    "all four, 1 chunk": 52,
    "all four, 8 chunks": 210,
    "all four, 8 chunks, two sweeps": 180,
    "NVAMP, 8 chunks": 198,
}


def test_every_path_over_a_head_has_a_budget():
    assert set(BUDGET_OF_HEAD) == set(launches.HEAD_PATHS)


@pytest.mark.parametrize("name", BUDGET_OF_HEAD)
def test_a_step_over_a_head_stays_within_its_budget(name):
    if products.ON_META > products.VERSION:
        pytest.skip("this PyTorch copies some products")
    step = launches.HEAD_PATHS[name]()
    assert 0 < step.total <= BUDGET_OF_HEAD[name]
    if torch.__version__.startswith("2.13"):
        assert launches.row(name, step) in (ROOT / "docs" / "engine.md").read_text()


def test_what_is_counted():
    """Views and memory without a kernel are no launches, and what runs in the operators is not seen."""
    x = torch.ones(4, 4, device="meta")
    with launches.Launches(large=16) as counted:
        (x.view(16).unsqueeze(0) * 2).detach().sum()
        torch.empty_like(x)
    assert counted.counts == {"aten::mul": 1, "aten::sum": 1}
    assert counted.moved == 4 * (16 + 16) + 4 * 16


def test_state_moves_in_place():
    """A CUDA graph that is replayed moves the memory that it was captured with, and no other."""
    criterion = lossmith.UnifiedLoss(11, adaptive_temperature=True)
    parameter = torch.nn.Parameter(torch.randn(2, 3, 11))
    optimizer = torch.optim.SGD([parameter], lr=50.0)
    places = {}
    for step in range(6):
        criterion(parameter, torch.zeros(2, 3).long()).backward()
        optimizer.step()
        state = {**criterion.state_dict(keep_vars=True), **dict(criterion._means._sums.items())}
        if step == 0:
            before = {name: value.clone() for name, value in state.items()}
            places = {name: value.data_ptr() for name, value in state.items()}
    assert {name: value.data_ptr() for name, value in state.items()} == places
    moved = {name for name, value in state.items() if not torch.equal(value, before[name])}
    assert {"base.temperature.value", "base.temperature.history", "base.temperature.num_steps"} < moved
