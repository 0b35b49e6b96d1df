"""What only a GPU can show of the rows: sizes, places in memory, streams, captures, repeatability."""

import pytest
import torch
from torch import Tensor

import lossmith

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

FOUR = {"label_smoothing": 0.1, "z_loss": 1e-2, "focal_gamma": 2.0, "confidence_penalty": 0.1}
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def case(num_tokens: int, num_classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(num_tokens, num_classes, device="cuda", generator=rng).mul_(3).to(dtype)
    targets = torch.randint(num_classes, (num_tokens,), device="cuda", generator=rng)
    targets[0] = -100
    return logits.requires_grad_(), targets


def loss_and_gradient(logits: Tensor, targets: Tensor, **options) -> tuple[Tensor, Tensor]:
    logits.grad = None
    loss = lossmith.cross_entropy(logits, targets, **options)
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", [1, 2, 507, 4097, 50257, 131072, 262147])
@pytest.mark.parametrize("options", [{}, FOUR, {**FOUR, "temperature": 0.7, "softcap": 30.0}], ids=len)
def test_against_fp64(num_classes, dtype, options):
    logits, targets = case(16, num_classes, dtype)
    exact = logits.detach().double().requires_grad_()
    found, expected = (loss_and_gradient(z, targets, **options) for z in (logits, exact))
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-6)
    tolerance = DTYPES[dtype] * expected[1].abs().max().item()
    torch.testing.assert_close(found[1].double(), expected[1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("bits", [31, 32])
def test_offsets_beyond_31_and_32_bits(bits):
    num_classes = 131072
    num_tokens = 2**bits // num_classes + 3
    logits = torch.zeros(num_tokens, num_classes, device="cuda", dtype=torch.bfloat16)
    targets = torch.full((num_tokens,), -100, device="cuda")
    last = torch.randn(num_classes, device="cuda").bfloat16()
    logits[-1], targets[-1] = last, 77
    found = loss_and_gradient(logits.requires_grad_(), targets, **FOUR)
    expected = loss_and_gradient(last[None].clone().requires_grad_(), targets[-1:], **FOUR)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][-1], expected[1][0])
    assert not found[1][:-1].any()


def test_rows_that_begin_two_bytes_past_a_boundary():
    memory = torch.randn(8 * 507 + 1, device="cuda").bfloat16()
    targets = torch.arange(8, device="cuda")
    shifted = memory[1:].view(8, 507).detach().requires_grad_()
    plain = shifted.detach().clone().requires_grad_()
    for found, expected in zip(
        *(loss_and_gradient(z, targets, **FOUR) for z in (shifted, plain)), strict=True
    ):
        assert torch.equal(found, expected)


PATHS = {
    "cross-entropy": lossmith.CrossEntropyLoss,
    "all four": lambda: lossmith.CrossEntropyLoss(**FOUR),
    "nvamp": lossmith.NVAMPLoss,
    "unified": lambda: lossmith.UnifiedLoss(
        507, use_ngram_penalty=True, use_focal_loss=True, adaptive_temperature=True, eos_token_id=1
    ).cuda(),
}


@pytest.mark.parametrize("name", PATHS)
def test_no_step_but_the_first_waits_for_the_gpu(name):
    criterion, (logits, targets) = PATHS[name](), case(32, 507)
    given = logits.view(2, 16, 507), targets.view(2, 16)
    criterion(*given).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion(*given).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["cross-entropy", "all four"])
def test_a_captured_step_replays_with_new_data(name):
    criterion, (logits, targets) = PATHS[name](), case(32, 507)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            logits.grad = None
            criterion(logits, targets).backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    logits.grad = None
    with torch.cuda.graph(graph):
        loss = criterion(logits, targets)
        loss.backward()
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
    graph.replay()
    captured = loss.detach().clone(), logits.grad.clone()
    fresh = logits.detach().clone().requires_grad_()
    expected = criterion(fresh, targets)
    expected.backward()
    assert torch.equal(captured[0], expected)
    assert torch.equal(captured[1], fresh.grad)


def test_every_run_has_the_same_bits():
    logits, targets = case(512, 50257, torch.bfloat16)
    first, *others = (loss_and_gradient(logits, targets, **FOUR) for _ in range(4))
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


def test_another_coefficient_is_the_same_kernel():
    from lossmith.engine.rows import triton_gradient, triton_statistics

    kernels = (triton_statistics.statistics_of_row, triton_gradient.gradient_of_tile)

    def compiled() -> int:
        return sum(len(held[0]) for kernel in kernels for held in kernel.device_caches.values())

    logits, targets = case(8, 507)
    loss_and_gradient(logits, targets, **FOUR, temperature=0.5, softcap=20.0)
    before = compiled()
    for step in range(50):
        options = {
            **FOUR,
            "z_loss": 1e-3 * (step + 1),
            "temperature": 0.5 + step / 100,
            "softcap": 20.0 + step,
        }
        loss_and_gradient(*case(8 + step, 507 + step), **options)
    assert compiled() == before


def test_nothing_to_learn():
    logits, targets = case(4, 507)
    loss, gradient = loss_and_gradient(logits.detach().fill_(torch.nan).requires_grad_(), targets.fill_(-100))
    assert loss == 0
    assert not gradient.any()
