"""What only a GPU can show of a linear head: its memory, its products, what the host waits for."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import lossmith
from lossmith.engine.head.upstream import times

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

FOUR = {"label_smoothing": 0.1, "z_loss": 1e-3, "focal_gamma": 2.0, "confidence_penalty": 0.1}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ERRORS = {FP32: 1e-5, BF16: 6e-3, FP16: 1e-3}
STRATEGIES = ["auto", "two_sweep"]
MIB = 2**20


def case(
    num_tokens: int, num_classes: int, size: int, dtype: torch.dtype, *, bias: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Hidden states, weight, and bias where there is one; and targets, half of them ignored."""
    rng = torch.Generator("cuda").manual_seed(0)
    shapes = [(num_tokens, size), (num_classes, size), (num_classes,)][: 2 + bias]
    made = [torch.randn(shape, device="cuda", generator=rng) for shape in shapes]
    made[0] /= size**0.5
    targets = torch.randint(num_classes, (num_tokens,), device="cuda", generator=rng)
    targets[::2] = -100
    return [x.to(dtype).requires_grad_() for x in made], targets


def loss_of(leaves: list[Tensor], targets: Tensor, **options) -> Tensor:
    bias = leaves[2] if len(leaves) == 3 else None
    return lossmith.linear_cross_entropy(*leaves[:2], targets, bias=bias, **options)


@pytest.fixture(autouse=True)
def products_of_fp32():
    """Products of fp32 are of fp32, and not of tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("options", [{}, {"logits_dtype": "input"}, {"skip_ignored": True}], ids=str)
@pytest.mark.parametrize("rows", [100, 128, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_classes", [507, 50257])
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_against_fp64(dtype, num_classes, strategy, bias, rows, options):
    leaves, targets = case(600, num_classes, 64, dtype, bias=bias)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    budget = None if rows is None else rows * (num_classes + 64) * 4
    loss = loss_of(leaves, targets, strategy=strategy, memory_budget=budget, **FOUR, **options)
    expected = lossmith.cross_entropy(functional.linear(*exact), targets, **FOUR)
    is_rounded = "logits_dtype" in options and dtype != FP32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3 if is_rounded else 1e-5, atol=0)
    (loss * 3).backward()
    for found, of in zip(leaves, torch.autograd.grad(expected * 3, exact), strict=True):
        assert found.grad is not None
        assert (found.grad.double() - of).norm() <= ERRORS[dtype] * of.norm()
    assert not leaves[0].grad[::2].any()


@pytest.mark.parametrize("options", [{}, {"logits_dtype": "input"}, {"skip_ignored": True}], ids=str)
@pytest.mark.parametrize("budget", [None, 100 * MIB, 2**34])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_the_plan_is_right_within_5_percent(dtype, strategy, bias, budget, options):
    """Of the memory of a step besides inputs and gradients."""
    leaves, targets = case(8192, 50257, 1024, dtype, bias=bias)
    options = {"strategy": strategy, "memory_budget": budget, **options}
    loss_of(leaves, targets, **options).backward()  # compiles, and has the library allocate what it keeps
    for leaf in leaves:
        leaf.grad = None
    named = {"bias": leaves[2]} if bias else {}
    plan = lossmith.linear_cross_entropy.explain(*leaves[:2], targets, **named, **options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_of(leaves, targets, **options).backward()
    gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    found = torch.cuda.max_memory_allocated() - before - gradients
    assert found == pytest.approx(plan.peak_bytes, rel=0.05)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_gradient_times_an_upstream_gradient_is_rounded_once(dtype):
    gradient = torch.randn(10**6, device="cuda").to(dtype)
    factor = torch.tensor(1 / 3, device="cuda")
    expected = (gradient.double() * factor.double()).to(dtype)
    assert torch.equal(times(gradient, factor, into=gradient), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [128, None])
def test_no_step_but_the_first_waits_for_the_gpu(rows, strategy):
    leaves, targets = case(512, 507, 64, BF16)
    options = {"strategy": strategy, "memory_budget": None if rows is None else rows * 512 * 4}
    loss_of(leaves, targets, **options).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(leaves, targets, **options).backward()
        with pytest.raises(RuntimeError, match="synchroni"):
            loss_of(leaves, targets, skip_ignored=True, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_captured_step_replays_with_new_data(strategy):
    leaves, targets = case(512, 507, 64, BF16)
    options = {"strategy": strategy, "memory_budget": 128 * 512 * 4, **FOUR}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for leaf in leaves:
                leaf.grad = None
            loss_of(leaves, targets, **options).backward()
    torch.cuda.current_stream().wait_stream(side)
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_of(leaves, targets, **options)
        loss.backward()
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    graph.replay()
    captured = [loss.detach().clone(), *(leaf.grad.clone() for leaf in leaves)]
    fresh = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    expected = loss_of(fresh, targets, **options)
    expected.backward()
    for found, of in zip(captured, [expected.detach(), *(leaf.grad for leaf in fresh)], strict=True):
        torch.testing.assert_close(found, of)


def test_how_many_tokens_there_are_is_not_asked_while_a_graph_is_captured():
    leaves, targets = case(512, 507, 64, BF16)
    loss_of(leaves, targets).backward()
    with (
        pytest.raises(ValueError, match="skip_ignored=True needs to know"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        loss_of(leaves, targets, skip_ignored=True)


@pytest.mark.parametrize("options", [{}, {"logits_dtype": "input"}], ids=str)
def test_every_run_has_the_same_bits(options):
    leaves, targets = case(2048, 50257, 256, BF16)
    runs = []
    for _ in range(3):
        loss = loss_of(leaves, targets, memory_budget=512 * 50304 * 4, **options)
        runs.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
