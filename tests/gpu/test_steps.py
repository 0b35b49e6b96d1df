"""What only a GPU can show of whole steps: graphs, scalers, frozen inputs, many chunks, drawn ids."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch

import lossmith

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

FOUR = {"label_smoothing": 0.1, "z_loss": 1e-2, "focal_gamma": 2.0, "confidence_penalty": 0.1}


def case(num_tokens=32, num_classes=507):
    rng = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(2, num_tokens // 2, num_classes, device="cuda", generator=rng).mul_(3)
    targets = torch.randint(num_classes, (2, num_tokens // 2), device="cuda", generator=rng)
    targets[0, 0] = -100
    return logits.requires_grad_(), targets


def unified():
    return lossmith.UnifiedLoss(
        507, use_ngram_penalty=True, use_focal_loss=True, adaptive_temperature=True, eos_token_id=1
    ).cuda()


@pytest.mark.parametrize("make", [unified, lossmith.NVAMPLoss, lambda: lossmith.CrossEntropyLoss(**FOUR)])
def test_a_first_step_is_captured_after_a_warm_up_and_moves_all_state(make):
    criterion, (logits, targets) = make(), case()
    other = copy.deepcopy(criterion)
    lossmith.warm_up(criterion, logits, targets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = criterion(logits, targets)
        loss.backward()
    assert logits.grad is not None
    for _ in range(3):
        with torch.no_grad():
            logits.mul_(1.5)
        graph.replay()
        fresh = logits.detach().clone().requires_grad_()
        expected = other(fresh, targets)
        expected.backward()
        assert torch.equal(loss, expected)
        assert torch.equal(logits.grad, fresh.grad)
    for name, value in other.state_dict().items():  # the capture itself moved nothing
        assert torch.equal(criterion.state_dict()[name], value), name


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step(mode):
    criterion = lossmith.CrossEntropyLoss(**FOUR)
    compiled = torch.compile(criterion, fullgraph=True, mode=mode)
    logits, targets = case()
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        logits.grad = None
        compiled(logits, targets).backward()
        found, logits.grad = logits.grad.clone(), None
        criterion(logits, targets).backward()
        torch.testing.assert_close(found, logits.grad)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_over_a_head(mode):
    """One sweep of four chunks, in one graph."""
    head = torch.nn.Linear(32, 5000, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(512, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(5000, (512,), device="cuda")

    def loss(hidden, weight, **options):
        return lossmith.linear_cross_entropy(
            hidden, weight, targets, memory_budget=128 * 5056 * 4, **options, **FOUR
        )

    compiled = torch.compile(lambda *given: loss(*given, strategy="one_sweep"), fullgraph=True, mode=mode)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = torch.autograd.grad(compiled(hidden, head.weight), (hidden, head.weight))
        found = [gradient.clone() for gradient in found]
        expected = torch.autograd.grad(loss(hidden, head.weight), (hidden, head.weight))
        torch.testing.assert_close(found, list(expected), rtol=1e-2, atol=1e-5)


def test_a_gradient_scaler():
    hidden = torch.randn(64, 32, device="cuda")
    head = torch.nn.Linear(32, 5000, bias=False, device="cuda")
    targets = torch.randint(5000, (64,), device="cuda")
    found = []
    for scale in (None, 2.0**16):
        head.weight.grad = None
        scaler = torch.amp.GradScaler("cuda", init_scale=scale or 1.0, enabled=scale is not None)
        with torch.autocast("cuda", torch.float16, enabled=scale is not None):
            loss = lossmith.linear_cross_entropy(hidden, head.weight, targets, z_loss=1e-3)
        scaler.scale(loss).backward()
        found.append(head.weight.grad / (scale or 1.0))
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_of_a_head(frozen):
    given = {"hidden": torch.randn(64, 32, device="cuda"), "weight": torch.randn(507, 32, device="cuda")}
    targets = torch.randint(507, (64,), device="cuda")
    for name, tensor in given.items():
        tensor.requires_grad_(name != frozen)
    lossmith.linear_cross_entropy(**given, targets=targets).backward()
    for name, tensor in given.items():
        assert (tensor.grad is None) == (name == frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_128_chunks_are_one(dtype):
    num_tokens, num_classes = 128 * 128, 1031
    rng = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(num_tokens, 64, device="cuda", generator=rng).to(dtype)
    weight = torch.randn(num_classes, 64, device="cuda", generator=rng).to(dtype)
    targets = torch.randint(num_classes, (num_tokens,), device="cuda", generator=rng)
    found = []
    for memory_budget in (128 * 1088 * 4, 2**34):
        leaves = [given.clone().requires_grad_() for given in (hidden, weight)]
        loss = lossmith.linear_cross_entropy(*leaves, targets, **FOUR, memory_budget=memory_budget)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-4}
    for many, one in zip(*found, strict=True):
        torch.testing.assert_close(many, one, **tolerance)


def test_ids_are_drawn_as_often_as_they_should_and_again_from_a_seed():
    from lossmith.engine.sampling import sample_ids

    logits = torch.randn(50257, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) * 3
    logits[7] = -torch.inf
    rows = logits.expand(20000, -1)
    torch.manual_seed(0)
    ids = sample_ids(rows)
    torch.manual_seed(0)
    assert torch.equal(ids, sample_ids(rows))
    share = logits.double().softmax(-1)
    top = share.topk(50).indices
    counts, expected = ids.bincount(minlength=50257).double()[top], 20000 * share[top]
    assert ((counts - expected).square() / expected).sum() < 110  # 50 degrees of freedom
    assert not (ids == 7).any()


def test_an_id_out_of_range_stops_with_a_message():
    code = (
        "import torch, lossmith\n"
        "targets = torch.tensor([1, 9], device='cuda')\n"
        "lossmith.cross_entropy(torch.zeros(2, 5, device='cuda'), targets).item()\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "outside [0, V)" in ran.stderr + ran.stdout


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_no_kernel_reads_or_writes_beyond_its_memory():
    code = (
        "import torch, lossmith\n"
        "z = torch.randn(1 + 5 * 507, device='cuda').bfloat16()[1:].view(5, 507).detach().requires_grad_()\n"
        "y = torch.tensor([0, 506, -100, 3, 7], device='cuda')\n"
        "loss = lossmith.UnifiedLoss(507, use_ngram_penalty=True, eos_token_id=1).cuda()\n"
        "loss(z.unsqueeze(0), y.unsqueeze(0)).backward()\n"
        "lossmith.cross_entropy(z, y, temperature=0.7, softcap=9.0, z_loss=0.1).backward()\n"
    )
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
