"""Under ``torch.compile(fullgraph=True)``: the same loss and gradient, ignored rows included."""

import shutil

import pytest
import torch
from torch import Tensor

import lossmith
from lossmith import Objective, Term
from lossmith.engine.rows.operators import row_stats_op
from slow_but import slow_but

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 7), reason="PyTorch 2.6 cannot trace an objective")
IGNORE, B, T, V = -100, 2, 4, 6


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(B, T, V, generator=rng)).to(dtype)
    targets = torch.randint(V, (B, T), generator=rng)
    targets[0, 1:3] = IGNORE
    return logits, targets


def custom(z: Tensor, targets: Tensor) -> Tensor:
    """A loss of one's own on the statistics, as the documentation shows it."""
    stats = lossmith.token_stats(z, targets, temperature=0.8)
    focal = stats.nll * (1 - stats.target_prob) ** 2 + 0.1 * stats.normalized_wrong_entropy
    return (
        torch.where(stats.is_valid, focal + 0.01 * stats.unscaled.logsumexp**2, 0.0).sum()
        / stats.is_valid.sum()
    )


def announced(z: Tensor, targets: Tensor) -> Tensor:
    candidates = torch.zeros_like(targets).unsqueeze(-1)
    stats = lossmith.token_stats(z, targets, candidates=candidates).compute("entropy", "candidate_log1m_prob")
    return (stats.entropy - stats.candidate_log1m_prob.sum(-1)).mean()


FULL = {
    "label_smoothing": 0.1,
    "special_tokens": (1,),
    "z_loss": 0.01,
    "focal_gamma": 2.0,
    "confidence_penalty": 0.1,
    "temperature": 0.7,
    "softcap": 8.0,
    "shift": True,
}
LOSSES = {
    "plain": lossmith.cross_entropy,
    "full": lambda z, t: lossmith.cross_entropy(z, t, class_weight=torch.linspace(1, 2, V), **FULL),
    "sequence_mean": lambda z, t: lossmith.cross_entropy(z, t, reduction="sequence_mean", mask=t != 2),
    "none": lambda z, t: lossmith.cross_entropy(z, t, reduction="none").sum(),
    "denominator": lambda z, t: lossmith.cross_entropy(z, t, denominator=(t >= 0).sum()),
    "module": lossmith.CrossEntropyLoss(label_smoothing=0.1),
    "objective": Objective(
        [Term("u", lambda s, b: s.nll * s.entropy, 0.5, token_weight=lambda s, b: s.target_prob)]
    ),
    "custom": custom,
    "announced": announced,
}


def check(loss, logits: Tensor, targets: Tensor, backend: str, **options: object) -> None:
    compiled = torch.compile(loss, fullgraph=True, backend=backend, **options)
    found = []
    for function in (loss, compiled):
        z = logits.clone().requires_grad_()
        value = function(z, targets)
        (3 * value).backward()
        found.append((value.detach(), z.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert not found[1][1][targets == IGNORE].any() or loss is LOSSES["full"]  # which shifts


@pytest.mark.parametrize("name", slow_but(["plain", "full", "sequence_mean", "objective"], LOSSES))
def test_compiled_equals_eager(name):
    check(LOSSES[name], *batch(), backend="aot_eager")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_compile(dtype):
    check(LOSSES["full"], *batch(dtype), backend="aot_eager")


def test_an_all_ignored_batch_compiles():
    logits, targets = batch()
    check(lossmith.cross_entropy, logits, torch.full_like(targets, IGNORE), backend="aot_eager")


@pytest.mark.slow
def test_another_number_of_tokens_compiles():
    logits, targets = batch()
    compiled = torch.compile(lossmith.cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for part in (slice(0, 2), slice(0, 1)):
        for tokens in (4, 3, 2):
            z = logits[part, :tokens].clone().requires_grad_()
            loss = compiled(z, targets[part, :tokens])
            loss.backward()
            torch.testing.assert_close(loss, lossmith.cross_entropy(z, targets[part, :tokens]))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ and there is no g++")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own imports
@pytest.mark.slow
def test_through_a_linear_layer_with_inductor():
    hidden, weight = torch.randn(B, T, 3), torch.randn(V, 3)
    _, targets = batch()

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return lossmith.cross_entropy(h @ w.T, targets, z_loss=0.01, label_smoothing=0.1)

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = function(h, w)
        found.append((value.detach(), *torch.autograd.grad(value, (h, w))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [None, torch.tensor(0.5)], ids=["plain", "temperature"])
def test_the_operator_keeps_its_promises(temperature):
    """PyTorch's own checks: schema, fake kernel, autograd registration, tracing."""
    logits, targets = batch()
    candidates = torch.zeros(B, T, 2, dtype=torch.long)
    needs_unscaled = -1 if temperature is None else 1
    arguments = (
        logits.requires_grad_(),
        targets,
        candidates,
        torch.ones(V),
        temperature,
        5.0,
        IGNORE,
        31,
        needs_unscaled,
    )
    torch.library.opcheck(row_stats_op, arguments)
