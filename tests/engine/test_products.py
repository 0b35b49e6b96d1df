"""Products of a head's factors, compiled and by PyTorch, against fp64."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import lossmith
from lossmith.engine.head import native_products, products
from lossmith.engine.head.products import wide_product

HALF = torch.bfloat16


@pytest.fixture(params=["compiled", "pytorch"], autouse=True)
def way(request, monkeypatch) -> str:
    """Each test on the compiled products, small ones too, and on PyTorch's, in small pieces."""
    if request.param == "pytorch":
        monkeypatch.setattr(native_products, "is_for", lambda **_: False)
        monkeypatch.setattr(products, "PIECE_ELEMENTS", 1)
        monkeypatch.setattr(products, "SHORTEST_PIECE", 7)
    elif not native_products.is_for(both_are_bf16=True):
        pytest.skip("needs a C++ compiler and AVX-512, on Intel's processors that of bf16")
    monkeypatch.setattr(native_products, "WORTH_IT", 0)
    monkeypatch.setattr(native_products, "THIN", 0)
    return request.param


@pytest.fixture
def compiled(way) -> None:
    if way == "pytorch":
        pytest.skip("PyTorch promises no such thing")


def needs_products_of(dtype: torch.dtype) -> None:
    if not native_products.is_for(both_are_bf16=dtype == HALF):
        pytest.skip("MKL has the products of fp32 on Intel's processors")


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


SHAPES = [(1, 1, 1), (13, 600, 33), (25, 513, 545), (300, 2, 1100), (12, 512, 512), (37, 2049, 1057)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (HALF, HALF), (torch.float32, HALF)], ids=str
)
def test_blocks_and_their_edges(shape, dtypes, rng, three_threads):
    """More than one block of either side, whole tiles and rests of them; every layout of both factors."""
    n, k, m = shape
    a, b = torch.randn(n, k, generator=rng).to(dtypes[0]), torch.randn(k, m, generator=rng).to(dtypes[1])
    exact = a.double() @ b.double()
    bound = 4 * k**0.5 * 2**-24 * (1 + a.double().abs() @ b.double().abs())
    for of_a, of_b in itertools.product(("rows", "transposed", "columns"), repeat=2):
        for before in (float("nan"), 1.0):
            into = torch.full((n, m), before)
            wide_product(in_memory_of(of_a, a), in_memory_of(of_b, b), into=into, is_sum=before == 1)
            assert ((into.double() - exact - int(before == 1)).abs() <= bound).all()


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_factor_that_is_expanded(dtype):
    row = torch.randn(1, 70).to(dtype)
    into = torch.empty(30, 40)
    wide_product(row.expand(30, 70), torch.ones(70, 1).to(dtype).expand(70, 40), into=into)
    torch.testing.assert_close(into, row.float().sum().expand(30, 40))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_shapes_that_do_not_match(dtype, compiled):
    needs_products_of(dtype)
    ones = functools.partial(torch.ones, dtype=dtype)
    with pytest.raises(ValueError, match=r"\[30, 40\] @ \[40, 50\] into \[29, 50\]"):
        wide_product(ones(30, 40), ones(40, 50), into=torch.empty(29, 50))
    with pytest.raises(ValueError, match="cannot put"):
        wide_product(ones(30, 41), ones(40, 50), into=torch.empty(30, 50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_in_its_row(dtype):
    a, b = torch.ones(14, 40, dtype=dtype), torch.ones(40, 35, dtype=dtype)
    a[3, 7], a[13, 0], b[5, 34] = float("nan"), float("inf"), -float("inf")
    into = torch.empty(14, 35)
    wide_product(a, b, into=into)
    torch.testing.assert_close(into, a.float() @ b.float(), equal_nan=True)


def test_nothing_is_written_beside(way):
    whole = torch.full((30, 80), 7.0)
    into = whole[2:28, 5:71]
    wide_product(torch.ones(26, 9), torch.ones(9, 66), into=into)
    assert (into == 9).all()
    into.fill_(7.0)
    assert (whole == 7).all()


def test_the_sum_of_two_products_is_fp32(way):
    """What comes second is not lost in a bf16 result."""
    one, small = torch.ones(2, 2).bfloat16(), torch.full((2, 2), 2.0**-12).bfloat16()
    into = torch.empty(2, 2)
    wide_product(one, one, into=into)
    wide_product(small, one, into=into, is_sum=True)
    assert (into == 2 + 2.0**-11).all()


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_threads_change_nothing(threads, dtype, rng, compiled):
    needs_products_of(dtype)
    a, b = torch.randn(100, 700, generator=rng).to(dtype), torch.randn(700, 1300, generator=rng).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            found.append(torch.empty(100, 1300))
            wide_product(a, b, into=found[-1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_what_is_left_to_pytorch(compiled, monkeypatch):
    takes, into = native_products.takes, torch.empty(3, 5)
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    takes_fp32 = native_products.is_for(both_are_bf16=False)
    assert takes(a.bfloat16(), b.bfloat16(), into)
    assert takes(a, b, into) == takes(a.bfloat16(), b, into) == takes_fp32
    assert not takes(a.double(), b.double(), into.double())
    assert not takes(a.half(), b.half(), into)
    for dtype in (torch.float32, HALF):
        a, b, wide_a, wide_b = (torch.randn(shape).to(dtype) for shape in ((3, 4), (4, 5), (6, 8), (8, 10)))
        monkeypatch.setattr(native_products, "WORTH_IT", 0)
        monkeypatch.setattr(native_products, "THIN", 0)
        assert not takes(wide_a[::2, ::2], b, into)
        assert not takes(a, wide_b[::2, ::2], into)
        assert not takes(a, b, torch.empty(5, 3).t())
        monkeypatch.setattr(native_products, "WORTH_IT", 3 * 4 * 5 + 1)
        assert not takes(a, b, into)
        monkeypatch.setattr(native_products, "WORTH_IT", 0)
        monkeypatch.setattr(native_products, "THIN", 4)
        assert not takes(a, b, into)


def test_no_memory(compiled, monkeypatch):
    class Library:
        def lossmith_is_for(self, both_are_bf16):
            return 1

        def lossmith_product(self, given):
            return 0

    monkeypatch.setattr(native_products, "library", Library)
    with pytest.raises(MemoryError, match="no memory for the packed factors"):
        wide_product(torch.ones(3, 4), torch.ones(4, 5), into=torch.empty(3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("strategy", ["one_sweep", "two_sweep"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_head_of_them_equals_fp64(strategy, is_tied, dtype):
    torch.manual_seed(0)
    hidden, targets = torch.randn(40, 16).to(dtype), torch.randint(300, (40,))
    targets[::7] = -100
    weight = (torch.randn(16, 300).t() if is_tied else torch.randn(300, 16)).to(dtype)
    found, expected = [], []
    for wide, into in ((dtype, found), (torch.float64, expected)):
        h, w = (x.detach().to(wide).requires_grad_() for x in (hidden, weight))
        if wide == dtype:
            loss = lossmith.linear_cross_entropy(h, w, targets, strategy=strategy, memory_budget=9 * 300 * 4)
        else:
            loss = torch.nn.functional.cross_entropy(h @ w.t(), targets)
        into += [loss.detach(), *torch.autograd.grad(loss, (h, w))]
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, **close)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [HALF, torch.float16], ids=str)
@pytest.mark.parametrize("is_sum", [False, True])
def test_a_product_in_the_factors_own_dtype(dtype, is_sum, rng):
    a, b = torch.randn(40, 300, generator=rng).to(dtype), torch.randn(300, 50, generator=rng).to(dtype)
    before = torch.randn(40, 50, generator=rng).to(dtype)
    into = in_memory_of("columns", before.clone())
    wide_product(a, b, into=into, is_sum=is_sum)
    expected = a.double() @ b.double() + int(is_sum) * before.double()
    torch.testing.assert_close(into, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
