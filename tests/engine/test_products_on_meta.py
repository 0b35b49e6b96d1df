"""Products on an accelerator, as far as meta tensors show them: their launches and temporaries."""

import pytest
import torch

from linear_case import Ledger
from lossmith.engine.head import products
from lossmith.engine.head.products import wide_product

HALVES = [torch.bfloat16, torch.float16]
N, K, M = 256, 64, 1000


def run(dtype: torch.dtype, into: torch.dtype, is_sum: bool, stride: int = M) -> Ledger:
    a, b = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((N, K), (M, K)))
    target = torch.empty(N, stride, dtype=into, device="meta")[:, :M]
    with Ledger(a, b, target) as ledger:
        wide_product(a, b.t(), into=target, is_sum=is_sum)
    return ledger


@pytest.mark.parametrize("is_sum", [False, True])
@pytest.mark.parametrize("stride", [M, 1024])
@pytest.mark.parametrize(
    "dtypes",
    [
        *((half, wide) for half in HALVES for wide in (half, torch.float32)),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_nothing_is_made_besides_the_product(dtypes, stride, is_sum):
    if dtypes[0] != dtypes[1] and products.ON_META > products.VERSION:
        pytest.skip("this PyTorch has no such product")
    ledger = run(*dtypes, is_sum=is_sum, stride=stride)
    assert sum(ledger.counts.values()) == 1
    assert ledger.peak == 0


@pytest.mark.parametrize("is_sum", [False, True])
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_factors_are_never_widened(half, is_sum, monkeypatch):
    """Without such products: the weight in fp32 would be as large as the weight twice, for every chunk."""
    monkeypatch.setattr(products, "has_wide_results", lambda device: False)
    ledger = run(half, torch.float32, is_sum)
    assert ledger.counts == {"mm": 1, "add_" if is_sum else "copy_": 1}
    assert ledger.peak == N * M * 2


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_version_whose_sums_want_halves(half, monkeypatch):
    """PyTorch 2.9 refuses an fp32 matrix to add to."""
    if products.ON_META > products.VERSION:
        pytest.skip("this PyTorch has no such product of meta tensors")
    monkeypatch.setattr(products, "VERSION", (2, 9))
    monkeypatch.setattr(products, "has_wide_results", lambda device: True)
    ledger = run(half, torch.float32, True)
    assert ledger.counts == {"mm": 1, "add_": 1}
    assert ledger.peak == N * M * 4
    assert run(half, torch.float32, False).peak == 0


def test_processors_without_such_products(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(products, "VERSION", (2, 13))
    for hip, capability, has in ((None, (8, 0), True), (None, (7, 5), False), ("6.0", (9, 4), False)):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert products.has_wide_results(device) is has
    assert not products.has_wide_results(torch.device("xpu"))
    monkeypatch.setattr(products, "VERSION", (2, 7))
    assert not products.has_wide_results(device)
    assert not products.has_wide_results(torch.device("meta"))
