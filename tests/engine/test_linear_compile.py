"""Under ``torch.compile(fullgraph=True)``: the same loss and gradients over a head, ignored rows included."""

import math
import shutil
from collections import Counter

import pytest
import torch
from torch import Tensor

import linear_case
import lossmith
from linear_case import IGNORE, B, D, Head, T, V
from lossmith import AdaptiveCrossEntropyLoss, CrossEntropyLoss, NVAMPLoss, Objective, Term, UnifiedLoss
from lossmith.engine.head.graph_operators import head_chunk_grad_op, head_chunk_op
from lossmith.engine.head.two_sweeps import head_grad_op, head_stats_op
from slow_but import slow_but

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 7), reason="PyTorch 2.6 cannot trace an objective")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


FULL = {
    "label_smoothing": 0.1,
    "special_tokens": (1,),
    "z_loss": 0.01,
    "focal_gamma": 2.0,
    "confidence_penalty": 0.1,
    "temperature": 0.7,
    "softcap": 8.0,
}


def of_objective(criterion, **more):
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        inputs = {"hidden_states": hidden, "lm_head_weight": weight, "lm_head_bias": bias}
        return criterion(targets=targets, memory_budget=8 * V * 4, **inputs, **more)

    return loss


def of_options(**options):
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        found = lossmith.linear_cross_entropy(
            hidden, weight, targets, bias=bias, memory_budget=8 * V * 4, **options
        )
        return found.sum()

    return loss


def statistics(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    stats = lossmith.linear_token_stats(hidden, weight, targets, bias=bias, temperature=0.8)
    focal = stats.nll * (1 - stats.target_prob) ** 2 + 0.1 * stats.normalized_wrong_entropy
    return torch.where(stats.is_valid, focal + 0.01 * stats.unscaled.logsumexp**2, 0.0).sum()


def candidates(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    stats = lossmith.linear_token_stats(
        hidden,
        weight,
        targets,
        bias=bias,
        candidates=torch.zeros_like(targets).unsqueeze(-1),
        memory_budget=1,
    ).compute("entropy", "candidate_log1m_prob")
    return (stats.entropy - stats.candidate_log1m_prob.sum(-1)).mean()


LOSSES = {
    "plain": of_options(),
    "full": of_options(class_weight=torch.linspace(1, 2, V), **FULL),
    "shift": of_options(shift=True, reduction="sequence_mean"),
    "none": of_options(reduction="none"),
    "statistics": statistics,
    "candidates": candidates,
    "module": of_objective(CrossEntropyLoss(label_smoothing=0.1)),
    "adaptive": of_objective(AdaptiveCrossEntropyLoss()),
    "nvamp": of_objective(NVAMPLoss(gamma=0.5)),
    "objective": of_objective(
        Objective([Term("u", lambda s, b: s.nll * s.entropy, 0.5, token_weight=lambda s, b: s.target_prob)])
    ),
    "unified": of_objective(UnifiedLoss(V, use_focal_loss=True, use_ngram_penalty=True, z_loss=0.01)),
    "unified_mtp": of_objective(UnifiedLoss(V, D, use_mtp=True, shared_projection=True)),
}


def check(loss, head: Head, targets: Tensor, *, backend: str = "aot_eager", tolerance: float = 1e-5) -> None:
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    found = []
    for function in (loss, compiled):
        value = function(head.hidden, head.weight, head.bias, targets)
        found.append((value.detach(), *torch.autograd.grad(3 * value, head.leaves)))
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", slow_but(["plain", "nvamp", "unified"], LOSSES))
def test_compiled_equals_eager(name):
    torch.manual_seed(0)
    check(LOSSES[name], linear_case.head(dtype=torch.float32), linear_case.targets())


@pytest.mark.slow
def test_fp64_and_half_precision_compile():
    check(LOSSES["full"], linear_case.head(), linear_case.targets())
    head, targets = linear_case.head(dtype=torch.bfloat16), linear_case.targets()
    values = []
    for function in (LOSSES["full"], torch.compile(LOSSES["full"], fullgraph=True, backend="aot_eager")):
        value = function(*head.leaves, targets)
        gradients = torch.autograd.grad(value, head.leaves)
        assert [g.dtype for g in gradients] == [torch.bfloat16] * 3
        values.append((value, *gradients))
    torch.testing.assert_close(*values, rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_all_ignored_and_frozen_inputs_compile():
    head = linear_case.head(dtype=torch.float32)
    check(LOSSES["plain"], head, torch.full((B, T), IGNORE))
    head.weight.requires_grad_(False)
    found = []
    for function in (LOSSES["plain"], torch.compile(LOSSES["plain"], fullgraph=True, backend="aot_eager")):
        value = function(*head.leaves, linear_case.targets())
        found.append(torch.autograd.grad(value, (head.hidden, head.bias)))
    torch.testing.assert_close(*found)


def test_autocast_compiles():
    head, targets = linear_case.head(dtype=torch.float32), linear_case.targets()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(LOSSES["plain"], head, targets, tolerance=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "full", "nvamp", "statistics"])
def test_other_numbers_of_tokens_compile_once(name):
    torch._dynamo.config.error_on_recompile = True
    try:
        compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager", dynamic=True)
        for rows, tokens in ((3, 5), (2, 7), (5, 4)):
            head = linear_case.head(rows, tokens, dtype=torch.float32)
            targets = linear_case.targets(rows, tokens)
            values = [loss(*head.leaves, targets) for loss in (LOSSES[name], compiled)]
            torch.testing.assert_close(*values)
            torch.testing.assert_close(*(torch.autograd.grad(value, head.leaves) for value in values))
    finally:
        torch._dynamo.config.error_on_recompile = False


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ and there is no g++")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own imports
@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "unified"])
def test_with_inductor(name):
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return LOSSES[name](torch.tanh(hidden) * 2, weight, bias, targets)

    check(loss, linear_case.head(dtype=torch.float32), linear_case.targets(), backend="inductor")


@pytest.mark.parametrize("wrong", slow_but([V], [V, -1, 10**9]))
def test_an_id_out_of_range_is_an_error_not_a_crash(wrong):
    head, targets = linear_case.head(dtype=torch.float32), linear_case.targets()
    targets[1, 1] = wrong
    compiled = torch.compile(LOSSES["plain"], fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=rf"class ids in \[0, {V}\).*{wrong}"):
        compiled(*head.leaves, targets)


# ── one sweep in a graph ──────────────────────────────────────────────────────────────────────────────

knows_fixed_sizes = pytest.mark.skipif(
    torch.__version__ < (2, 9), reason="PyTorch 2.8 does not say whether the number of tokens is fixed"
)


class Recorder:
    """A compiler's backend that counts the operators of the library."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        names = (str(node.target) for node in graph.graph.nodes)
        self.counts.update(name.split(".")[1] for name in names if name.startswith("lossmith."))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@knows_fixed_sizes
@pytest.mark.parametrize("strategy", slow_but(["auto"], ["auto", "one_sweep", "two_sweep"]))
def test_a_chunk_is_computed_once(strategy):
    """Three products a chunk, and four."""
    recorder, head, targets = Recorder(), linear_case.head(dtype=torch.float32), linear_case.targets()
    check(of_options(strategy=strategy, **FULL), head, targets, backend=recorder)
    if strategy == "two_sweep":
        assert recorder.counts["head_stats"] == 1
        assert not recorder.counts["head_chunk"]
    else:
        num_chunks = math.ceil(B * T / 8)
        assert recorder.counts["head_chunk"] == recorder.counts["head_chunk_grad"] == num_chunks > 1
        assert not recorder.counts["head_stats"]


@knows_fixed_sizes
@pytest.mark.parametrize("skip_ignored", slow_but([True], [True, False]))
@pytest.mark.parametrize(
    "dtype", slow_but([torch.float16], [torch.float64, torch.bfloat16, torch.float16]), ids=str
)
def test_one_sweep_in_a_graph_equals_fp64(dtype, skip_ignored):
    """With what makes single steps of the arithmetic differ, and a loss so small that its gradient in fp16
    would be 0 without a lift."""
    options = dict(FULL, strategy="one_sweep", skip_ignored=skip_ignored, denominator=torch.tensor(1e6))
    head, targets = linear_case.head(dtype=dtype), linear_case.targets()
    exact = linear_case.head()
    for leaf, given in zip(exact.leaves, head.leaves, strict=True):
        leaf.data = given.detach().double()
    compiled = torch.compile(of_options(**options), fullgraph=True, backend="aot_eager")
    found, wanted = [
        torch.autograd.grad(7e5 * loss(*leaves, targets), leaves)
        for loss, leaves in ((compiled, head.leaves), (of_options(**options), exact.leaves))
    ]
    for given, right in zip(found, wanted, strict=True):
        assert given.dtype == dtype
        tolerance = 1e-10 if dtype == torch.float64 else 0.03
        assert (given.double() - right).norm() <= tolerance * right.norm()


@knows_fixed_sizes
def test_chunks_without_a_target_in_a_graph():
    """The first, so that a sum begins with nothing, and the last."""
    targets = linear_case.targets().flatten()
    targets[:4] = targets[-4:] = IGNORE
    for some in (targets, torch.full_like(targets, IGNORE)):
        loss = of_options(strategy="one_sweep", z_loss=0.1)
        check(loss, linear_case.head(len(targets), dtype=torch.float32), some)


@pytest.mark.slow
@knows_fixed_sizes
def test_what_is_frozen_in_a_graph():
    for frozen in range(3):
        head, targets = linear_case.head(dtype=torch.float32), linear_case.targets()
        head.leaves[frozen].requires_grad_(False)
        rest = [leaf for leaf in head.leaves if leaf.requires_grad]
        eager = of_options(strategy="one_sweep")
        compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
        found = [torch.autograd.grad(loss(*head.leaves, targets), rest) for loss in (eager, compiled)]
        torch.testing.assert_close(*found)


@knows_fixed_sizes
def test_a_whole_output_of_a_graph():
    """Its parts are there, for logging; to train on one by itself is an error that says what to do."""
    criterion, head, targets = CrossEntropyLoss(z_loss=0.1), linear_case.head(), linear_case.targets()
    inputs = {"hidden_states": head.hidden, "lm_head_weight": head.weight, "targets": targets}
    compiled = torch.compile(criterion.evaluate, fullgraph=True, backend="aot_eager")
    output, eager = compiled(**inputs), criterion.evaluate(**inputs)
    for found in (output, eager):
        found.total.backward(retain_graph=True)
    torch.testing.assert_close(output.total, eager.total)
    torch.testing.assert_close(output.parts, eager.parts)
    torch.testing.assert_close(output.stats.nll, eager.stats.nll)
    torch.testing.assert_close(output.metrics["accuracy"], eager.metrics["accuracy"])
    for own in (output.parts["z_loss"], output.stats.nll.mean()):
        with pytest.raises(RuntimeError, match=r"gradient of its own.*strategy='two_sweep'"):
            (output.total + own).backward(retain_graph=True)


@knows_fixed_sizes
def test_a_term_that_reads_nothing_in_a_graph():
    first = Term("first", lambda s, b: b.targets.to(b.scale.dtype), reads=(), scope="token")
    head, targets = linear_case.head(dtype=torch.float32), linear_case.targets()
    check(of_objective(Objective([first])), head, targets)


@knows_fixed_sizes
def test_a_gradient_that_one_sweep_would_lose_is_refused_in_a_graph():
    slope = torch.nn.Parameter(torch.ones(()))
    term = Term("own", lambda s, b: s.nll * slope, reads=("nll",), scope="token")
    compiled = torch.compile(of_objective(Objective([term])), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"the terms 'own'.*scope='batch'"):
        compiled(*linear_case.head().leaves, linear_case.targets())


@knows_fixed_sizes
def test_where_one_sweep_is_refused_in_a_graph():
    head, targets = linear_case.head(dtype=torch.float32), linear_case.targets()
    open_ended = torch.compile(
        of_options(strategy="one_sweep"), fullgraph=True, backend="aot_eager", dynamic=True
    )
    with pytest.raises(Exception, match=r"one_sweep.*number of tokens open"):
        open_ended(*head.leaves, targets)
    torch._dynamo.reset()
    many = linear_case.head(200, dtype=torch.float32), torch.zeros(200, dtype=torch.long)
    chunks = torch.compile(of_options(strategy="one_sweep"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"one_sweep.*25 chunks.*memory_budget"):
        chunks(*many[0].leaves, many[1])
    torch._dynamo.reset()
    recorder = Recorder()
    check(of_options(), *many, backend=recorder)
    assert recorder.counts["head_stats"] == 1
    assert not recorder.counts["head_chunk"]


@pytest.mark.skipif(torch.__version__ >= (2, 9), reason="it is possible")
@pytest.mark.skipif(torch.__version__ < (2, 8), reason="PyTorch 2.7 does not say what was raised")
def test_one_sweep_is_refused_before():
    head, targets = linear_case.head(dtype=torch.float32), linear_case.targets()
    compiled = torch.compile(of_options(strategy="one_sweep"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"one_sweep.*torch\.compile"):
        compiled(*head.leaves, targets)


@pytest.mark.parametrize("narrow", slow_but([True], [True, False]))
def test_the_operators_of_a_chunk_keep_their_promises(narrow):
    head, targets = linear_case.head(6, dtype=torch.bfloat16), torch.tensor([0, 1, IGNORE, 3, 4, 2])
    inputs = [leaf.detach() for leaf in head.leaves]
    arguments = (*inputs, targets, torch.zeros(6, 2, dtype=torch.long), None, None, 5.0, IGNORE, 31, 1, 2, 6)
    named = {"narrow_logits": narrow, "skip_ignored": False}  # all of the memory is written
    torch.library.opcheck(head_chunk_op, arguments, named)
    *raw, logits = head_chunk_op(*arguments, **named)
    grads = [torch.randn_like(value) if value.is_floating_point() else None for value in raw]
    for needed in ([True, True, True], [False, True, False], [True, False, False]):
        weight_sum = torch.zeros(V, D) if needed[1] else None
        own = (raw, grads, needed, logits.clone(), weight_sum)
        torch.library.opcheck(head_chunk_grad_op, (*arguments, *own), named)


@pytest.mark.parametrize("dtype", slow_but([torch.float32], [torch.float32, torch.float64]), ids=str)
@pytest.mark.parametrize("bias", slow_but([True], [True, False]))
@pytest.mark.parametrize("temperature", slow_but([0.5], [None, 0.5]))
def test_the_operators_keep_their_promises(temperature, bias, dtype):
    """PyTorch's own checks: schema, fake kernels, autograd registration, tracing."""
    head, targets = linear_case.head(6, dtype=dtype, bias=bias), torch.tensor([0, 1, IGNORE, 3, 4, 2])
    divisor = None if temperature is None else torch.tensor(temperature, dtype=dtype)
    needs_unscaled = -1 if temperature is None else 1
    arguments = (
        head.hidden,
        head.weight,
        head.bias,
        targets,
        torch.zeros(6, 2, dtype=torch.long),
        torch.ones(V, dtype=dtype),
        divisor,
        5.0,
        IGNORE,
        31,
        needs_unscaled,
        dtype,
        2 * V * dtype.itemsize,
    )
    torch.library.opcheck(head_stats_op, arguments)
    with torch.no_grad():
        raw = head_stats_op(*arguments)
    grads = [torch.randn_like(value) if value.is_floating_point() else None for value in raw]
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    for needed in ([True, True, bias], [True, False, False], [False, True, False]):
        torch.library.opcheck(head_grad_op, (*detached, raw, grads, needed))
