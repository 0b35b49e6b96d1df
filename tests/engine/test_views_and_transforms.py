"""Tensors whose sign is not in their memory, and the transforms of torch.func."""

import ctypes

import pytest
import torch
from torch import Tensor

import lossmith
from lossmith.engine.head import native_products

pytestmark = pytest.mark.usefixtures("arithmetic")

N, D, V = 30, 40, 50


def inputs() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"hidden": (N, D), "weight": (V, D), "bias": (V,)}
    made = {name: torch.randn(*shape, generator=rng) for name, shape in shapes.items()}
    return made | {"class_weight": torch.rand(V, generator=rng), "upstream": torch.randn(N, generator=rng)}


def negated(x: Tensor) -> Tensor:
    """The same numbers, their negatives in memory: what a part of a conjugated complex tensor is."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def run(given: dict[str, Tensor], strategy: str | None) -> list[Tensor]:
    leaves = [given[name].detach().requires_grad_() for name in ("hidden", "weight", "bias")]
    options = {"reduction": "none", "class_weight": given["class_weight"], "label_smoothing": 0.1}
    targets = torch.arange(N) % V
    if strategy is None:
        logits = torch.nn.functional.linear(*leaves)
        loss = lossmith.cross_entropy(negated(logits), targets, **options)
    else:
        if strategy == "one_sweep":
            options["reduction"] = "sum"
        loss = lossmith.linear_cross_entropy(
            *leaves[:2], targets, bias=leaves[2], strategy=strategy, memory_budget=9 * V * 4, **options
        )
    upstream = given["upstream"] if loss.dim() else given["upstream"][0]
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


@pytest.mark.parametrize("strategy", [None, "one_sweep", "two_sweep"])
@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "class_weight", "upstream"])
def test_views_whose_sign_is_not_in_memory(name, strategy, monkeypatch):
    monkeypatch.setattr(native_products, "WORTH_IT", 0)
    given = inputs()
    assert negated(given[name]).is_neg()
    expected = run(given, strategy)
    for ours, theirs in zip(run(given | {name: negated(given[name])}, strategy), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_compiled_product_is_handed_the_numbers_themselves(monkeypatch):
    seen = []

    class Library:
        def lossmith_product(self, given):
            places = (given._obj.a.data, given._obj.b.data)
            seen.extend(ctypes.cast(place, ctypes.POINTER(ctypes.c_float))[0] for place in places)
            return 1

    monkeypatch.setattr(native_products, "library", Library)
    a, b = torch.full((3, 4), 2.0), torch.full((4, 5), 7.0)
    native_products.product(negated(a), negated(b), into=torch.empty(3, 5), is_sum=False)
    assert seen == [2.0, 7.0]


# -- transforms --------------------------------------------------------------------------------------

TARGETS = torch.arange(6) % 5


def losses():
    weight, hidden = torch.randn(5, 5), torch.randn(6, 5)
    return {
        "logits": lambda z: lossmith.cross_entropy(z, TARGETS),
        "stats": lambda z: lossmith.token_stats(z, TARGETS).nll.sum(),
        "head": lambda z: lossmith.linear_cross_entropy(z, weight, TARGETS),
        "two sweeps": lambda z: lossmith.linear_cross_entropy(z, weight, TARGETS, strategy="two_sweep"),
        "weight": lambda w: lossmith.linear_cross_entropy(hidden, w[:5], TARGETS),
    }


TRANSFORMS = {
    "grad": lambda f, z: torch.func.grad(f)(z),
    "vjp": lambda f, z: torch.func.vjp(f, z),
    "vmap": lambda f, z: torch.func.vmap(f)(torch.stack([z, z])),
    "jacrev": lambda f, z: torch.func.jacrev(f)(z),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("way", ["logits", "stats", "head", "two sweeps", "weight"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own
def test_transforms_of_torch_func_are_refused_in_words(way, transform):
    with pytest.raises(RuntimeError, match=r"cannot be transformed by torch\.func.*use backward\(\)"):
        transform(losses()[way], torch.ones(6, 5))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_targets_inside_a_transform():
    logits = torch.randn(6, 5)
    for loss in (
        lambda y: lossmith.cross_entropy(logits, y),
        lambda y: lossmith.linear_cross_entropy(logits, torch.eye(5), y),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.func.*which targets come from"):
            torch.func.vmap(loss)(torch.stack([TARGETS, TARGETS]))


@pytest.mark.parametrize("way", ["logits", "stats", "head", "two sweeps"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_batched_gradients_are_refused_in_words(way):
    z = torch.randn(6, 5, requires_grad=True)
    loss = losses()[way](z)
    with pytest.raises(RuntimeError, match=r"one upstream gradient at a time.*once for each"):
        torch.autograd.grad(loss, z, torch.ones(3), is_grads_batched=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_batched_gradients_of_a_part_and_of_a_compiled_head():
    z = torch.randn(6, 5, requires_grad=True)
    head = {"hidden_states": z, "lm_head_weight": torch.eye(5)}
    part = lossmith.CrossEntropyLoss(z_loss=0.1).evaluate(targets=TARGETS, **head).parts["z_loss"]
    raw = torch.ops.lossmith.head_stats(
        z, torch.eye(5), None, TARGETS, None, None, None, None, -100, 0, -1, torch.float32, None
    )
    for value in (part, raw[2].sum()):
        with pytest.raises(RuntimeError, match="one upstream gradient at a time"):
            torch.autograd.grad(value, z, torch.ones(3), is_grads_batched=True)
