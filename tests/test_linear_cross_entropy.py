"""``linear_cross_entropy`` is ``cross_entropy`` of the logits: every option, however it is swept."""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import functional

import linear_case
import lossmith
import reference
from linear_case import IGNORE, ROWS, STRATEGIES, B, D, Head, T, V, assert_same


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.25


OPTIONS: dict[str, dict] = {
    "plain": {},
    "sequence_mean": {"reduction": "sequence_mean"},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "denominator": {"denominator": 37},
    "denominator_tensor": {"denominator": torch.tensor(11), "reduction": "sequence_mean"},
    "mask": {"mask": random(B, T) < 0.8},
    "label_smoothing": {"label_smoothing": 0.1},
    "exclude_target": {"label_smoothing": 0.3, "smoothing_mode": "exclude_target"},
    "special_tokens": {"label_smoothing": 0.2, "special_tokens": (1, 4)},
    "class_weight": {"class_weight": random(V)},
    "token_weight": {"token_weight": random(B, T) - 0.5},
    "temperature": {"temperature": 0.6},
    "softcap": {"softcap": 4.0},
    "z_loss": {"z_loss": 0.03},
    "focal_gamma": {"focal_gamma": 2.0},
    "focal_root": {"focal_gamma": 0.5},
    "confidence_penalty": {"confidence_penalty": 0.2},
    "shift": {"shift": True},
    "ignore_index": {"ignore_index": 3},
    "empty_nan": {"empty": "nan"},
}
# Terms of the logits over the temperature and of those as they are have one gradient.
AT_TWO_TEMPERATURES: dict[str, dict] = {
    "both": {"temperature": 0.6, "z_loss": 0.3},
    "both and sums": {"temperature": 1.7, "z_loss": 0.3, "label_smoothing": 0.2, "confidence_penalty": 0.2},
}


def loss_of(head: Head, targets: Tensor, rows: int | None, strategy: str, **options) -> Tensor:
    return lossmith.linear_cross_entropy(
        head.hidden,
        head.weight,
        targets,
        bias=head.bias,
        strategy=strategy,
        memory_budget=head.budget(rows),
        **options,
    )


def targets_for(options: dict, seed: int = 0) -> Tensor:
    targets = linear_case.targets(seed=seed)
    return targets.masked_fill(targets == IGNORE, options.get("ignore_index", IGNORE))


def check(options: dict, rows: int | None, strategy: str, *, seed: int = 0, bias: bool = True) -> None:
    targets = targets_for(options, seed)
    assert_same(
        lambda head: loss_of(head, targets, rows, strategy, **options),
        lambda logits: lossmith.cross_entropy(logits, targets, **options),
        linear_case.head(seed=seed, bias=bias),
    )


# -- the logits path -------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_alone(name, strategy, rows):
    check(OPTIONS[name], rows, strategy)
    check(OPTIONS[name], rows, strategy, seed=1, bias=False)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("pair", list(itertools.combinations(OPTIONS, 2)), ids="+".join)
def test_every_pair_of_options(pair, strategy):
    check(OPTIONS[pair[0]] | OPTIONS[pair[1]], 2, strategy, seed=5)


@settings(max_examples=settings().max_examples // 2)  # each makes many chunks, three times
@given(
    names=st.sets(st.sampled_from(sorted(OPTIONS)), min_size=3, max_size=8),
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 20),
    strategy=st.sampled_from(STRATEGIES),
    bias=st.booleans(),
)
def test_any_set_of_options(names, seed, rows, strategy, bias):
    options = {key: value for name in sorted(names) for key, value in OPTIONS[name].items()}
    check(options, rows, strategy, seed=seed, bias=bias)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("empty", ["zero", "nan"])
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean", "sum", "none"])
@pytest.mark.parametrize("denominator", [None, 5])
def test_a_batch_with_nothing_to_learn(reduction, empty, strategy, denominator):
    """The same zero or NaN, and gradients that are there, and 0."""
    targets = torch.full((B, T), IGNORE)
    options = {"reduction": reduction, "empty": empty, "denominator": denominator, "z_loss": 0.1}
    head = linear_case.head()
    loss = loss_of(head, targets, 2, strategy, **options)
    expected = lossmith.cross_entropy(head.logits(), targets, **options)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    for gradient in torch.autograd.grad(loss.sum(), head.leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", OPTIONS)
def test_evaluation_gives_the_same_numbers(name, strategy):
    head, targets = linear_case.head(), targets_for(OPTIONS[name])
    expected = loss_of(head, targets, 2, strategy, **OPTIONS[name]).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = loss_of(head, targets, 2, strategy, **OPTIONS[name])
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0, equal_nan=True)


# -- the formulas, in every dtype ---------------------------------------------------------------


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [*OPTIONS, *AT_TWO_TEMPERATURES])
def test_against_the_formulas(name, strategy, dtype):
    options = (OPTIONS | AT_TWO_TEMPERATURES)[name]
    targets, given = targets_for(options), linear_case.head(dtype=dtype)
    found = []
    for of, precision in ((given, dtype), (given, torch.float64), (given, torch.float32)):
        head = of.to(precision)
        if not found:
            value = loss_of(head, targets, 3, strategy, **options)
        else:
            value = reference.cross_entropy(head.logits(), targets, **options)
        found.append((value.detach(), *linear_case.gradients(value, head)))
    for ours, truth, naive in zip(*found, strict=True):
        reference.assert_accurate(ours, truth, naive, atol=64.0)


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", OPTIONS)
def test_half_precision(name, strategy, dtype):
    """Off by the rounding of the logits; the loss is fp32, and gradients have the dtypes of their inputs."""
    options, targets = OPTIONS[name], targets_for(OPTIONS[name])
    head = linear_case.head(dtype=dtype)
    truth = head.to(torch.float64)
    value = loss_of(head, targets, 3, strategy, **options)
    expected = reference.cross_entropy(truth.logits(), targets, **options)
    assert value.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(value.double(), expected, rtol=2 * eps, atol=4 * eps)
    for ours, exact in zip(
        linear_case.gradients(value, head), linear_case.gradients(expected, truth), strict=True
    ):
        assert ours.dtype == dtype
        largest = float(exact.abs().max())
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=4 * eps * max(largest, 1.0))


# -- PyTorch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [IGNORE, 2, -1])
def test_equals_pytorch_in_all_that_both_offer(ignore_index, weighted, smoothing, reduction, strategy):
    targets = linear_case.targets()
    targets[targets == IGNORE] = ignore_index
    weight = random(V).double() if weighted else None

    def pytorch(logits: Tensor) -> Tensor:
        loss = functional.cross_entropy(
            logits.reshape(-1, V),
            targets.reshape(-1),
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=smoothing,
            reduction=reduction,
        )
        return loss.reshape((B, T)) if reduction == "none" else loss

    options = {"ignore_index": ignore_index, "label_smoothing": smoothing, "reduction": reduction}
    assert_same(
        lambda head: loss_of(head, targets, 2, strategy, class_weight=weight, **options),
        pytorch,
        linear_case.head(),
    )


# -- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lead", [(), (1,), (6,), (2, 3), (2, 1, 3), (1, 1)], ids=str)
@pytest.mark.parametrize(("size", "num_classes"), [(1, 7), (4, 1), (4, 2), (1, 1), (5, 5)])
def test_any_shape(lead, size, num_classes, strategy):
    rng = torch.Generator().manual_seed(0)
    targets = torch.randint(num_classes, lead, generator=rng)
    head = linear_case.Head(
        *(
            torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()
            for shape in ((*lead, size), (num_classes, size), (num_classes,))
        )
    )
    for options in ({}, {"reduction": "none", "label_smoothing": 0.1}):
        assert_same(
            lambda head, options=options: loss_of(head, targets, 1, strategy, **options),
            lambda logits, options=options: lossmith.cross_entropy(logits, targets, **options),
            head,
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_any_stride(strategy, dtype):
    """Hidden states, weight and targets as views; gradients in the shapes and strides of the leaves."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(D, 2 * T, B, generator=rng).to(dtype).requires_grad_()
    weight = torch.randn(D, V, generator=rng).to(dtype).requires_grad_()
    bias = torch.randn(2 * V, generator=rng).to(dtype).requires_grad_()
    targets = linear_case.targets(T, B).t()

    def views() -> Head:
        return Head(hidden.permute(2, 1, 0)[:, ::2], weight.t(), bias[::2])

    found = []
    for view in (views(), Head(*(x.contiguous() for x in views().leaves))):
        assert targets.shape == view.hidden.shape[:-1]
        loss = loss_of(view, targets, 2, strategy, label_smoothing=0.1)
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))))
    for ours, same in zip(*found, strict=True):
        torch.testing.assert_close(ours, same)


def test_hidden_states_of_one_number_broadcast():
    """Strides of 0."""
    head = linear_case.head()
    one = head.hidden.detach()[:1, :1].requires_grad_()
    expanded = Head(one.expand(B, T, D), head.weight)
    targets = linear_case.targets()
    loss = loss_of(expanded, targets, 2, "auto")
    expected = lossmith.cross_entropy(expanded.logits(), targets)
    torch.testing.assert_close(torch.autograd.grad(loss, one), torch.autograd.grad(expected, one))


# -- what must not matter -----------------------------------------------------------------------


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_any_size_give_the_same(strategy, dtype):
    head, targets = linear_case.head(4, 12, dtype=dtype), linear_case.targets(4, 12)
    found = []
    for rows in (None, 1, 2, 5, 17, 1000):
        loss = loss_of(head, targets, rows, strategy, label_smoothing=0.1, z_loss=0.01)
        found.append((loss.detach(), *torch.autograd.grad(loss, head.leaves)))
    for other in found[1:]:
        torch.testing.assert_close(other[0], found[0][0], rtol=4 * torch.finfo(found[0][0].dtype).eps, atol=0)
        for gradient, expected in zip(other[1:], found[0][1:], strict=True):
            atol = 2 * torch.finfo(dtype).eps * float(expected.abs().max())
            torch.testing.assert_close(gradient, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_appending_ignored_rows_changes_no_bit(strategy, reduction):
    head, targets = linear_case.head(8, dtype=torch.float32), linear_case.targets(8)
    more = torch.cat([head.hidden, torch.full((5, D), float("nan"))]).detach().requires_grad_()
    found = []
    for hidden, ids in ((head.hidden, targets), (more, torch.cat([targets, torch.full((5,), IGNORE)]))):
        of = Head(hidden, head.weight, head.bias)
        loss = loss_of(of, ids, 3, strategy, z_loss=0.1, reduction=reduction)
        gradients = torch.autograd.grad(loss, of.leaves)
        found.append((loss.detach(), gradients[0][:8], *gradients[1:]))
        assert not gradients[0][8:].any()
    for ours, same in zip(*found, strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_options_that_are_off_change_no_bit(strategy):
    head, targets = linear_case.head(dtype=torch.float32), linear_case.targets()
    off = {
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "focal_gamma": 0.0,
        "confidence_penalty": 0.0,
        "temperature": 1.0,
        "softcap": None,
        "token_weight": torch.ones(B, T),
        "mask": torch.ones(B, T, dtype=torch.bool),
    }
    found = []
    for options in ({}, off):
        loss = loss_of(head, targets, 2, strategy, **options)
        found.append((loss.detach(), *torch.autograd.grad(loss, head.leaves)))
    for ours, same in zip(*found, strict=True):
        assert torch.equal(ours, same)
