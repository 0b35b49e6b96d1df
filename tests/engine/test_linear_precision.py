"""The error budget: how far a fused head is from fp64 over many chunks, next to the naive way in its dtype.

``python tests/engine/test_linear_precision.py`` prints the table of docs/linear.md.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import lossmith
from slow_but import slow_but

SHAPES = [(2048, 2000, 64), (252, 507, 123)]  # N, V, D
HALF = torch.bfloat16
Errors = tuple[float, ...]
Values = list[Tensor]
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def case(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Random tokens, or ones that mostly know their targets and have much in common."""
    num_tokens, num_classes, size = shape
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_classes, size, generator=rng)
    targets = torch.randint(num_classes, (num_tokens,), generator=rng)
    hidden = torch.randn(num_tokens, size, generator=rng)
    if kind == "correlated":
        hidden = 0.9 * hidden + 1.8 * weight[targets] + 3 * torch.randn(1, size, generator=rng)
    return (hidden / size**0.5).to(dtype), weight.to(dtype), targets


def run(loss_of: Way, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Values:
    """Loss and gradients, in fp64."""
    h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    loss = loss_of(h, w, targets)
    return [x.double() for x in (loss.detach(), *torch.autograd.grad(loss, (h, w)))]


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(hidden @ weight.T, targets)


@functools.cache
def naive_run(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, computed_in: torch.dtype) -> Values:
    """Of the naive way, in some precision: what many ways are compared with."""
    return run(naive, *case(kind, shape, dtype), computed_in)


def errors(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, *ways: Way) -> list[Errors]:
    """Of the naive way and of each of these: relative errors of the loss and of both gradients (of norms)."""
    exact = naive_run(kind, shape, dtype, torch.float64)
    found = [naive_run(kind, shape, dtype, dtype)]
    found += [run(way, *case(kind, shape, dtype), dtype) for way in ways]
    return [
        tuple(float((x - e).norm() / e.norm()) for x, e in zip(values, exact, strict=True))
        for values in found
    ]


def fused(num_chunks: int, strategy: str, logits_dtype: str = "wide") -> Way:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows = -(-len(hidden) // num_chunks)
        budget = rows * len(weight) * hidden.element_size()
        plan = lossmith.linear_cross_entropy.explain(hidden, weight, targets, memory_budget=budget)
        assert plan.num_chunks >= min(num_chunks, len(hidden) // 2)
        options = {"strategy": strategy, "memory_budget": budget, "logits_dtype": logits_dtype}
        return lossmith.linear_cross_entropy(hidden, weight, targets, **options)

    return loss


def upcast(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy((hidden @ weight.T).float(), targets)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("strategy", ["one_sweep", "two_sweep"])
@pytest.mark.parametrize("num_chunks", slow_but([128], [128, 2048]))
def test_the_loss_is_within_a_millionth_over_many_chunks(num_chunks, strategy, dtype):
    _, (loss, *_) = errors("random", SHAPES[0], dtype, fused(num_chunks, strategy))
    assert loss < 1e-6


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("strategy", ["one_sweep", "two_sweep"])
@pytest.mark.parametrize("num_chunks", slow_but([1, 128], [1, 16, 128]))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "correlated"])
def test_gradients_are_no_worse_than_the_naive_ones(kind, shape, num_chunks, strategy, dtype):
    naive, ours = errors(kind, shape, dtype, fused(num_chunks, strategy))
    eps = torch.finfo(dtype).eps
    factor = 2.0 if dtype == torch.float32 else 1.02
    for our, their in zip(ours[1:], naive[1:], strict=True):
        assert our <= factor * their + eps / 64, (ours, naive)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "correlated"])
def test_the_loss_of_a_token_is_closer_than_that_of_rounded_logits(kind, shape, seed):
    hidden, weight, targets = case(kind, shape, HALF, seed)
    exact = functional.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none")
    naive = functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
    ours = lossmith.linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert (ours - exact).norm() < 0.75 * (naive - exact).norm()


@pytest.mark.parametrize("strategy", ["one_sweep", "two_sweep"])
@pytest.mark.parametrize("num_chunks", [1, 16])
@pytest.mark.parametrize("kind", slow_but(["correlated"], ["random", "correlated"]))
def test_rounded_logits_are_no_worse_than_the_naive_ones(kind, num_chunks, strategy):
    naive, upcasted, ours = errors(kind, SHAPES[0], HALF, upcast, fused(num_chunks, strategy, "input"))
    assert ours[0] <= upcasted[0] + 1e-6
    assert all(our <= 1.02 * their for our, their in zip(ours[1:], naive[1:], strict=True))


@pytest.mark.parametrize("strategy", ["one_sweep", "two_sweep"])
def test_the_sum_of_the_weights_gradient_does_not_drown(strategy):
    """In half precision a sum of thousands of equal summands stops growing; here it is fp32."""
    hidden = torch.ones(4096, 8, dtype=HALF).requires_grad_()
    weight = torch.zeros(4, 8, dtype=HALF).requires_grad_()
    loss = lossmith.linear_cross_entropy(
        hidden,
        weight,
        torch.zeros(4096, dtype=torch.long),
        reduction="sum",
        strategy=strategy,
        memory_budget=4 * 2,
    )
    loss.backward()
    assert weight.grad[1:].eq(1024).all()
    assert weight.grad[0].eq(-3072).all()
    assert loss.item() == pytest.approx(4096 * 1.3862943611, rel=1e-6)


def main() -> None:
    """The table of docs/linear.md."""
    for kind in ("random", "correlated"):
        for dtype in (torch.float32, HALF):
            ways = {
                "`F.cross_entropy(h @ W.T)`": None,
                "the same, logits in fp32": upcast,
                "1 chunk": fused(1, "one_sweep"),
                "128 chunks": fused(128, "one_sweep"),
                "128 chunks, two sweeps": fused(128, "two_sweep"),
                '1 chunk, `logits_dtype="input"`': fused(1, "one_sweep", "input"),
                '128 chunks, `logits_dtype="input"`': fused(128, "one_sweep", "input"),
            }
            found = errors(kind, SHAPES[0], dtype, *(way for way in ways.values() if way is not None))
            for name, row in zip(ways, found, strict=True):
                print(f"| {kind} | {str(dtype)[6:]} | {name} |", " | ".join(f"{x:.1e}" for x in row), "|")


if __name__ == "__main__":
    main()
