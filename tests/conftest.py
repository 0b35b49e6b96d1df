"""One thread, since tests are small and others want the cores; the same examples on every run, or with
HYPOTHESIS_PROFILE=random five times as many that nobody has seen."""

import collections
import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.utils._python_dispatch import TorchDispatchMode

from lossmith.engine.head import native_products
from lossmith.engine.native import build
from lossmith.engine.rows import blocks, native_rows

torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read on import; nobody waits for a hub that is not reached
if not torch.cuda.is_available():  # read when triton is first imported; elsewhere its kernels run as they are
    os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile(
    "lossmith",
    deadline=None,
    derandomize=True,
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile(
    "random", settings.get_profile("lossmith"), derandomize=False, max_examples=1000, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "lossmith"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many random cases each public function was given, and what a test has to show."""
    for report in terminalreporter.getreports(""):  # of what comes before and after tests
        known = dict(report.user_properties)
        if "fuzz_cases" in known:
            terminalreporter.write_line(f"{report.nodeid}: {known['fuzz_cases']:,} cases")
        if "shown" in known and report.when == "teardown":
            terminalreporter.write_line(f"{report.nodeid}:\n{known['shown']}")


@pytest.fixture(scope="module", autouse=True)
def what_is_loaded_stays() -> None:
    """A collection of garbage, which ends every training run, need not look at what is loaded again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def rng() -> torch.Generator:
    """Every test draws the same numbers, whatever ran before it."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=["compiled", "pytorch"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on the compiled rows and on PyTorch's: what a user has must not depend on a compiler."""
    if request.param == "pytorch":
        monkeypatch.setattr(native_rows, "takes", lambda *_: False)
        monkeypatch.setattr(native_products, "is_for", lambda **_: False)
    elif build.library() is None:
        pytest.skip("no C++ compiler here")
    return request.param


@pytest.fixture
def set_block_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Make PyTorch's rows be computed this many of ``num_classes`` at a time."""

    def set_to(num_rows: int, num_classes: int) -> None:
        monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", num_rows * num_classes)

    return set_to


class CountOps(TorchDispatchMode):
    """Counts the operators that reach the dispatcher, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def passes(self) -> tuple[int, int]:
        """How often the logits were swept forward and backward."""
        return self.counts["lossmith::row_stats"], self.counts["lossmith::row_grad"]


@pytest.fixture
def count_ops() -> CountOps:
    """``with count_ops as ops: ...; ops.passes``"""
    return CountOps()
