"""The memory of a head on an accelerator, counted on meta tensors, is what the plan says."""

import pytest
import torch

import lossmith
import meta_case
from lossmith.engine.head import linear_head, native_products, packing, products, sizes
from lossmith.engine.head.chunks import Chunks
from lossmith.engine.head.factors import Factors
from lossmith.engine.head.sizes import rows_of_a_chunk
from lossmith.engine.rows import native_rows

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHAPE = (4096, 50257, 1024)
STRATEGIES = ["one_sweep", "two_sweep"]
MIB = 2**20
GPU = torch.device("meta")

pytestmark = pytest.mark.skipif(
    products.VERSION < products.ON_META, reason="this PyTorch copies some products"
)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("budget", [None, 40 * MIB, 2**34])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_the_plan_is_right_within_5_percent(dtype, strategy, budget, bias):
    head = meta_case.head(SHAPE, dtype, bias=bias)
    plan, peak, _ = meta_case.step(*head, strategy=strategy, memory_budget=budget)
    assert plan.num_chunks == {None: 2, 40 * MIB: 32, 2**34: 1}[budget]
    assert peak == pytest.approx(plan.peak_bytes, rel=0.05)
    assert plan.logits_bytes <= plan.peak_bytes


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32), (FP32, BF16), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("budget", [40 * MIB, 2**34])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_under_autocast(strategy, budget, dtypes, monkeypatch):
    monkeypatch.setattr(linear_head, "_autocast_dtype", lambda hidden: BF16)
    plan, peak, _ = meta_case.step(
        *meta_case.head(SHAPE, *dtypes, bias=True), strategy=strategy, memory_budget=budget
    )
    assert peak == pytest.approx(plan.peak_bytes, rel=0.05)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("budget", [40 * MIB, 2**34])
def test_with_one_gradient_alone(budget, frozen, strategy):
    hidden, weight, _, targets = meta_case.head(SHAPE, BF16)
    frozen = (hidden, weight)[frozen].requires_grad_(False)
    plan = lossmith.linear_cross_entropy.explain(
        hidden, weight, targets, strategy=strategy, memory_budget=budget
    )
    with meta_case.launches().kernels(), meta_case.Ledger(hidden, weight, targets) as ledger:
        lossmith.linear_cross_entropy(
            hidden, weight, targets, strategy=strategy, memory_budget=budget
        ).backward()
    (gradient,) = (x.grad for x in (hidden, weight) if x.grad is not None)
    assert ledger.peak - gradient.nbytes == pytest.approx(plan.peak_bytes, rel=0.05)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("budget", [2 * MIB, None])
def test_on_a_cpu_with_half_of_the_tokens_ignored(
    budget, strategy, dtype, arithmetic, set_block_rows, monkeypatch
):
    set_block_rows(8, 4000)
    monkeypatch.setattr(products, "PIECE_ELEMENTS", 2**14)
    monkeypatch.setattr(products, "SHORTEST_PIECE", 16)
    head = meta_case.head((512, 4000, 128), dtype, device="cpu")
    plan, peak, _ = meta_case.step(*head, strategy=strategy, memory_budget=budget)
    assert plan.num_tokens == 256
    assert plan.num_chunks == (1 if budget is None else 2)
    blocks = 3 * 8 * 4000 * 4 if arithmetic == "pytorch" else 0  # what PyTorch's rows compute in
    assert plan.peak_bytes * 0.9 <= peak <= plan.peak_bytes * 1.05 + blocks


# -- chunks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 100, 1024, 4096, 8192, 10000])
@pytest.mark.parametrize("budget", [None, 100 * MIB, 2**30])
def test_chunks_fill_whole_tiles_within_the_budget(num_tokens, budget):
    rows = rows_of_a_chunk(num_tokens, 50304, 4, GPU, budget)
    assert rows * 50304 * 4 <= (budget or 512 * MIB)
    assert rows >= num_tokens or rows % 128 == 0


def test_a_budget_of_less_than_a_tile():
    assert rows_of_a_chunk(1000, 50304, 4, GPU, 1) == 1
    assert rows_of_a_chunk(1000, 50304, 4, GPU, 100 * 50304 * 4) == 100


def test_chunks_are_as_large_as_the_sum_that_each_of_them_moves():
    """512 MiB of logits beside a sum of 2 GiB would be 8 chunks, each of which reads and writes that sum."""
    head = meta_case.head((8192, 131072, 4096), BF16)
    plan, _, _ = meta_case.step(*head)
    assert (plan.num_chunks, plan.chunk_rows) == (2, 4096)
    assert plan.logits_bytes == plan.accumulator_bytes == 2 * 2**30


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_chunk_where_that_is_lighter_than_several_and_their_sum(strategy):
    shape = (1500, 131072, 4096)
    budget = 512 * MIB  # 1024 rows
    one, of_one, _ = meta_case.step(*meta_case.head(shape, BF16), memory_budget=budget, strategy=strategy)
    assert (one.num_chunks, one.accumulator_bytes) == (1, 0)
    more = meta_case.head((5000, *shape[1:]), BF16)
    several, of_several, _ = meta_case.step(*more, memory_budget=budget, strategy=strategy)
    assert (several.num_chunks, several.chunk_rows) == (5, 1024)
    assert of_one < of_several


def test_rows_begin_where_an_accelerator_loads_them_fastest():
    hidden, weight, _, targets = meta_case.head((256, 50257, 64), BF16)
    buffer = Chunks(Factors(hidden, weight, None, BF16, None), targets, -100).buffer()
    assert buffer.shape == (256, 50257)
    assert buffer.stride() == (50304, 1)


# -- values -------------------------------------------------------------------------------------


@pytest.fixture
def like_an_accelerator(monkeypatch):
    """A CPU's arithmetic in the memory of an accelerator."""
    monkeypatch.setattr(sizes, "is_cpu", lambda device: False)
    monkeypatch.setattr(packing, "packs", lambda targets: False)
    monkeypatch.setattr(native_rows, "takes", lambda *_: False)
    monkeypatch.setattr(native_products, "is_for", lambda **_: False)


@pytest.mark.parametrize("rows", [128, 256, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32)], ids=str)
def test_values_in_the_memory_of_an_accelerator(dtypes, strategy, bias, rows, like_an_accelerator):
    hidden, weight, b, targets = meta_case.head((600, 507, 16), *dtypes, bias=bias, device="cpu")
    hidden.data[::2] = torch.nan  # where there is no target
    leaves = [x for x in (hidden, weight, b) if x is not None]
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    with torch.autocast("cpu", BF16, enabled=dtypes[0] != dtypes[1]):
        budget = rows * 512 * 4
        plan = lossmith.linear_cross_entropy.explain(hidden, weight, targets, bias=b, memory_budget=budget)
        assert plan.chunk_rows == min(rows, 600)
        assert plan.logits_bytes == plan.chunk_rows * 512 * 4
        assert (plan.accumulator_bytes > 0) == (rows < 600 and dtypes[1] == BF16)
        loss = lossmith.linear_cross_entropy(
            hidden, weight, targets, bias=b, strategy=strategy, memory_budget=budget, **options
        )
    loss.backward()
    exact = [x.detach()[1::2] if x is hidden else x.detach() for x in leaves]
    exact = [x.to(BF16 if BF16 in dtypes else FP32).double().requires_grad_() for x in exact]
    logits = torch.nn.functional.linear(*exact)
    expected = lossmith.cross_entropy(logits, targets[1::2], **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for found, of in zip(leaves, torch.autograd.grad(expected, exact), strict=True):
        gradient = found.grad.double()
        if found is hidden:
            assert not gradient[::2].any()
            gradient = gradient[1::2]
        assert (gradient - of).norm() <= (1e-5 if dtypes == (FP32, FP32) else 4e-3) * of.norm()
