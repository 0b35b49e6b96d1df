"""Products of a head's factors, by whichever library makes them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lossmith
from lossmith.engine import products
from lossmith.engine.products import wide_product

needs_onednn = pytest.mark.skipif(not products.has_onednn(), reason="needs oneDNN and AVX-512")


class Seen(TorchDispatchMode):
    """The names of the operators that ran."""

    def __enter__(self):
        self.names: set[str] = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch):
    monkeypatch.setattr(products, "WORTH_ONEDNN", 0)


def in_memory_of(kind: str, x: Tensor) -> Tensor:
    """The same matrix, otherwise in memory."""
    if kind == "transposed":
        return x.t().contiguous().t()
    if kind == "columns":
        wide = torch.full((x.shape[0], x.shape[1] + 5), float("nan"), dtype=x.dtype)
        wide[:, 3 : 3 + x.shape[1]] = x
        return wide[:, 3 : 3 + x.shape[1]]
    return x


SIZES = st.integers(1, 40)
LAYOUTS = st.sampled_from(["rows", "transposed", "columns"])


@given(
    SIZES, SIZES, SIZES, LAYOUTS, LAYOUTS, LAYOUTS, st.booleans(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_wide_product_is_the_product_rounded_once(n, k, m, of_a, of_b, of_into, is_sum, dtype):
    rng = torch.Generator().manual_seed(n * 1681 + k * 41 + m)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a = torch.randn(n, k, generator=rng).to(dtype)
    b = torch.randn(k, m, generator=rng).to(dtype)
    before = torch.randn(n, m, generator=rng).to(wide)
    into = in_memory_of(of_into, before.clone())
    wide_product(in_memory_of(of_a, a), in_memory_of(of_b, b), into=into, is_sum=is_sum)
    expected = a.double() @ b.double() + (before.double() if is_sum else 0)
    size = a.double().abs() @ b.double().abs() + before.double().abs()
    assert ((into.double() - expected).abs() <= 4 * torch.finfo(wide).eps * size).all()


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    a, b, into = torch.randn(3, 4), torch.randn(4, 5), torch.empty(3, 5)
    with Seen() as seen:
        wide_product(a, b, into=into)
    torch.testing.assert_close(into, a @ b)
    assert not any("mkldnn" in name for name in seen.names)


@needs_onednn
def test_onednn_takes_fp32_products_whose_first_factor_lies_in_rows():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    for first, is_taken in ((a, True), (in_memory_of("transposed", a), False), (a.double(), False)):
        into = torch.empty(3, 5, dtype=first.dtype)
        with Seen() as seen:
            wide_product(first, b.to(first.dtype), into=into)
        assert any("mkldnn" in name for name in seen.names) == is_taken


@needs_onednn
def test_small_products_stay_where_no_kernel_has_to_be_made(monkeypatch):
    monkeypatch.setattr(products, "WORTH_ONEDNN", 61)
    with Seen() as seen:
        wide_product(torch.randn(3, 4), torch.randn(4, 5), into=torch.empty(3, 5))
    assert not any("mkldnn" in name for name in seen.names)


@pytest.mark.parametrize("strategy", ["one_sweep", "two_sweep"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_head_by_onednn_equals_fp64(strategy, is_tied):
    torch.manual_seed(0)
    hidden, targets = torch.randn(40, 16), torch.randint(300, (40,))
    targets[::7] = -100
    weight = torch.randn(16, 300).t() if is_tied else torch.randn(300, 16)
    found, expected = [], []
    for dtype, into in ((torch.float32, found), (torch.float64, expected)):
        h, w = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
        if dtype == torch.float32:
            loss = lossmith.linear_cross_entropy(h, w, targets, strategy=strategy, memory_budget=9 * 300 * 4)
        else:
            loss = torch.nn.functional.cross_entropy(h @ w.t(), targets)
        into += [loss.detach(), *torch.autograd.grad(loss, (h, w))]
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)
