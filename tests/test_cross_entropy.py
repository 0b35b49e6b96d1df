"""The cross-entropy family: every option, every pair of options, and what must not depend on them."""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import functional

import lossmith
import reference
from cross_entropy_case import DTYPES, IGNORE, B, T, V, batch, weights

pytestmark = pytest.mark.usefixtures("arithmetic")

# name of an option -> what is passed to turn it on
OPTIONS = {
    "sequence_mean": {"reduction": "sequence_mean"},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "denominator": {"denominator": 37},
    "mask": {"mask": torch.rand(B, T, generator=torch.Generator().manual_seed(4)) < 0.7},
    "label_smoothing": {"label_smoothing": 0.1},
    "exclude_target": {"label_smoothing": 0.3, "smoothing_mode": "exclude_target"},
    "special_tokens": {"label_smoothing": 0.2, "special_tokens": (1, 4)},
    "class_weight": {"class_weight": weights(V)},
    "token_weight": {"token_weight": weights(B, T) - 0.5},
    "temperature": {"temperature": 0.6},
    "softcap": {"softcap": 4.0},
    "z_loss": {"z_loss": 0.03},
    "focal_gamma": {"focal_gamma": 2.0},
    "focal_root": {"focal_gamma": 0.5},
    "confidence_penalty": {"confidence_penalty": 0.2},
    "shift": {"shift": True},
}
# what turns an option off again
OFF = {
    "denominator": None,
    "mask": None,
    "label_smoothing": 0.0,
    "smoothing_mode": "uniform",
    "special_tokens": (),
    "class_weight": None,
    "token_weight": None,
    "temperature": 1.0,
    "softcap": None,
    "z_loss": 0.0,
    "focal_gamma": 0.0,
    "confidence_penalty": 0.0,
    "shift": False,
    "empty": "zero",
    "reduction": "mean",
    "ignore_index": IGNORE,
}


def check(options: dict, seed: int = 0, dtype: torch.dtype = torch.float32, masked: float = 0.0) -> None:
    logits, targets = batch(seed, dtype, masked)
    shape = (B, T) if options.get("reduction") == "none" else ()
    reference.Case(
        lambda z: lossmith.cross_entropy(z, targets, **options),
        lambda z: reference.cross_entropy(z, targets, **options),
        logits,
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)),
    ).check()


# -- against the formulas --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [None, *OPTIONS])
def test_each_option_alone(name, dtype):
    check(OPTIONS[name] if name else {}, seed=1, dtype=dtype)


@pytest.mark.parametrize("pair", list(itertools.combinations(OPTIONS, 2)), ids="+".join)
def test_every_pair_of_options(pair):
    check(OPTIONS[pair[0]] | OPTIONS[pair[1]], seed=5)


@settings(
    max_examples=settings().max_examples // 2
)  # each computes everything three times, with either arithmetic
@given(
    names=st.sets(st.sampled_from(sorted(OPTIONS)), min_size=3, max_size=8),
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(DTYPES),
    masked=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_any_set_of_options(names, seed, dtype, masked):
    options = {key: value for name in sorted(names) for key, value in OPTIONS[name].items()}
    check(options | {"shift": False}, seed, dtype, masked)  # shifting could make a masked class a target


@pytest.mark.parametrize(
    ("mode", "held"),
    [("uniform", [0.025, 0.925, 0.025, 0.025]), ("exclude_target", [0.1 / 3, 0.9, 0.1 / 3, 0.1 / 3])],
)
def test_smoothing_worked_numbers(mode, held):
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.7]], dtype=torch.float64)
    expected = -(torch.tensor(held, dtype=torch.float64) * logits.log_softmax(-1)).sum()
    ours = lossmith.cross_entropy(logits, torch.tensor([1]), label_smoothing=0.1, smoothing_mode=mode)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-14)


@pytest.mark.parametrize("mode", ["uniform", "exclude_target"])
@pytest.mark.parametrize("class_weight", [None, weights(3)], ids=["plain", "weighted"])
def test_smoothing_of_a_masked_target_is_infinite_and_not_nan(mode, class_weight):
    logits = torch.tensor([[-torch.inf, 1.0, 0.5]], dtype=torch.float64)
    loss = lossmith.cross_entropy(
        logits, torch.tensor([0]), label_smoothing=0.1, smoothing_mode=mode, class_weight=class_weight
    )
    assert loss == torch.inf
    only = torch.tensor([[0.3, -torch.inf, -torch.inf]], dtype=torch.float64)  # nobody to share with
    assert lossmith.cross_entropy(only, torch.tensor([0]), label_smoothing=0.1, smoothing_mode=mode) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_class_of_weight_zero_costs_nothing_where_it_is_masked(smoothing):
    logits = torch.tensor([[-torch.inf, 1.0, 0.5], [0.0, 1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    options = {"class_weight": weight, "label_smoothing": smoothing, "reduction": "none"}
    loss = lossmith.cross_entropy(logits, torch.tensor([0, 1]), **options)
    log_p = logits.detach().log_softmax(-1)
    shared = (
        -smoothing / torch.tensor([2, 3]) * (log_p[:, 1:] * weight[1:]).sum(-1)
    )  # of the classes there are
    expected = shared + torch.tensor([0.0, -(1 - smoothing) * log_p[1, 1]])
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()


def test_the_smoothing_conventions_agree_at_the_converted_eps():
    logits, targets = batch(dtype=torch.float64)
    logits[0, 1, V - 1] = 0.0
    uniform = lossmith.cross_entropy(logits, targets, label_smoothing=0.21)
    excluded = lossmith.cross_entropy(
        logits, targets, label_smoothing=0.21 * (V - 1) / V, smoothing_mode="exclude_target"
    )
    torch.testing.assert_close(uniform, excluded)


def test_gradient_worked_numbers():
    p = torch.tensor([[0.1, 0.6, 0.2, 0.1]], dtype=torch.float64)
    logits = p.log().requires_grad_()
    lossmith.cross_entropy(logits, torch.tensor([1])).backward()
    assert logits.grad[0].tolist() == pytest.approx([0.1, -0.4, 0.2, 0.1], rel=1e-14)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_gradient_is_finite_and_tends_to_zero_as_p_tends_to_one(gamma):
    gaps = [5.0, 15.0, 30.0, 100.0, 1000.0]
    logits = torch.tensor([[g, 0.0] for g in gaps], requires_grad=True)
    loss = lossmith.cross_entropy(
        logits, torch.zeros(5, dtype=torch.long), focal_gamma=gamma, reduction="none"
    )
    loss.sum().backward()
    truth = logits.detach().double().requires_grad_()
    reference.cross_entropy(
        truth, torch.zeros(5, dtype=torch.long), focal_gamma=gamma, reduction="none"
    ).sum().backward()
    torch.testing.assert_close(logits.grad[:3].double(), truth.grad[:3], rtol=3e-5, atol=1e-37)
    assert logits.grad.isfinite().all()
    assert torch.equal(logits.grad[-1], torch.zeros(2))


# -- against PyTorch --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [IGNORE, 2, -1])
def test_equals_pytorch_in_all_that_both_offer(ignore_index, weighted, smoothing, reduction, dtype):
    logits, targets = batch(dtype=dtype)
    logits[0, 1, V - 1] = 0.0
    targets[targets == IGNORE] = ignore_index
    weight = weights(V) if weighted else None
    if weighted:
        weight[3] = 0.0
    upstream = torch.randn((B, T) if reduction == "none" else (), generator=torch.Generator().manual_seed(9))

    def pytorch(z: Tensor) -> Tensor:
        loss = functional.cross_entropy(
            z.reshape(-1, V),
            targets.reshape(-1),
            weight=None if weight is None else weight.to(z.dtype),
            ignore_index=ignore_index,
            label_smoothing=smoothing,
            reduction=reduction,
        )
        return loss.reshape(upstream.shape)

    def ours(z: Tensor) -> Tensor:
        return lossmith.cross_entropy(
            z,
            targets,
            class_weight=weight,
            ignore_index=ignore_index,
            label_smoothing=smoothing,
            reduction=reduction,
        )

    reference.Case(ours, pytorch, logits, upstream).check()


# -- off is absent -----------------------------------------------------------------------------

ALL_ON = {
    "label_smoothing": 0.1,
    "special_tokens": (1,),
    "class_weight": weights(V),
    "temperature": 0.8,
    "z_loss": 0.01,
    "focal_gamma": 1.5,
    "confidence_penalty": 0.1,
    "mask": torch.ones(B, T, dtype=torch.bool),
}


def loss_and_gradient(dtype: torch.dtype = torch.float32, **options: object) -> tuple[Tensor, Tensor]:
    logits, targets = batch(dtype=dtype)
    logits.requires_grad_()
    loss = lossmith.cross_entropy(logits, targets, **options)
    loss.sum().backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("others", [{}, ALL_ON], ids=["alone", "among others"])
@pytest.mark.parametrize("name", OFF)
def test_an_option_that_is_off_is_bit_identical_to_absent(name, others):
    others = {key: value for key, value in others.items() if key != name}
    absent, off = loss_and_gradient(**others), loss_and_gradient(**others, **{name: OFF[name]})
    assert torch.equal(absent[0], off[0])
    assert torch.equal(absent[1], off[1])


@pytest.mark.parametrize(
    "neutral",
    [
        {"mask": torch.ones(B, T, dtype=torch.long)},
        {"token_weight": torch.ones(B, T)},
        {"smoothing_mode": "exclude_target"},
        {"special_tokens": (1, 2)},
        {"reduction": "token_mean"},
        {"denominator": torch.tensor(7)},
        {"return_stats": False},
    ],
    ids=str,
)
def test_an_option_without_effect_is_bit_identical_to_absent(neutral):
    assert (batch()[1] != IGNORE).sum() == 7
    absent, with_it = loss_and_gradient(), loss_and_gradient(**neutral)
    assert torch.equal(absent[0], with_it[0])
    assert torch.equal(absent[1], with_it[1])


def test_asking_for_the_statistics_changes_no_bit():
    logits, targets = batch()
    for options in ({}, ALL_ON):
        loss, stats = lossmith.cross_entropy(logits, targets, return_stats=True, **options)
        assert torch.equal(loss, lossmith.cross_entropy(logits, targets, **options))
        assert stats.nll.shape == targets.shape
        assert torch.equal(stats.is_valid, targets != IGNORE)


def test_scaling_all_class_weights_changes_nothing():
    options = ALL_ON | {"class_weight": weights(V)}
    loss, gradient = loss_and_gradient(torch.float64, **options)
    scaled_loss, scaled = loss_and_gradient(torch.float64, **options | {"class_weight": 5 * weights(V)})
    torch.testing.assert_close(scaled_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled, gradient, rtol=1e-6, atol=1e-9)


# -- autograd ----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, -3.0, 0.0, 1e-3, 65536.0])
def test_scaling_the_loss_scales_the_gradient(factor):
    logits, targets = batch()
    (plain,) = torch.autograd.grad(
        lossmith.cross_entropy(logits.requires_grad_(), targets, z_loss=0.1), logits
    )
    (scaled,) = torch.autograd.grad(lossmith.cross_entropy(logits, targets, z_loss=0.1) * factor, logits)
    torch.testing.assert_close(scaled, plain * factor)


def test_backward_twice_accumulates():
    logits, targets = batch()
    loss = lossmith.cross_entropy(logits.requires_grad_(), targets, label_smoothing=0.1, focal_gamma=1.0)
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward(retain_graph=True)
    assert torch.equal(logits.grad, 2 * once)


def test_one_loss_used_twice():
    logits, targets = batch(dtype=torch.float64)
    (once,) = torch.autograd.grad(lossmith.cross_entropy(logits.requires_grad_(), targets), logits)
    loss = lossmith.cross_entropy(logits, targets)
    (used,) = torch.autograd.grad(loss + 2 * loss.exp(), logits)
    torch.testing.assert_close(used, once * (1 + 2 * loss.exp().detach()))


def test_gradient_flows_through_what_made_the_logits():
    hidden = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weight = torch.randn(6, 3, generator=torch.Generator().manual_seed(2), requires_grad=True)
    targets = torch.tensor([0, 5, IGNORE, 2])
    ours = torch.autograd.grad(lossmith.cross_entropy(hidden @ weight.T, targets), (hidden, weight))
    theirs = torch.autograd.grad(functional.cross_entropy(hidden @ weight.T, targets), (hidden, weight))
    torch.testing.assert_close(ours, theirs)


def test_logits_overwritten_before_backward_are_an_error_not_a_wrong_gradient():
    leaf, targets = batch()
    logits = leaf.requires_grad_() * 1.0
    loss = lossmith.cross_entropy(logits, targets)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_are_refused_not_wrong():
    logits, targets = batch()
    with pytest.raises(RuntimeError):
        torch.autograd.functional.hessian(lambda z: lossmith.cross_entropy(z, targets), logits.detach())


def test_under_no_grad_and_inference_mode():
    logits, targets = batch()
    expected = lossmith.cross_entropy(logits.requires_grad_(), targets, z_loss=0.1).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = lossmith.cross_entropy(logits, targets, z_loss=0.1)
        assert torch.equal(loss, expected)
        assert not loss.requires_grad


def test_autocast_leaves_the_loss_in_fp32():
    weight = torch.randn(V, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    hidden, targets = torch.randn(B, T, 4, generator=torch.Generator().manual_seed(3)), batch()[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = hidden @ weight.T
        loss = lossmith.cross_entropy(logits, targets, label_smoothing=0.1, z_loss=0.01)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    truth = reference.cross_entropy(logits.detach().double(), targets, label_smoothing=0.1, z_loss=0.01)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    loss.backward()
    assert weight.grad.dtype == torch.float32


# -- the module ---------------------------------------------------------------------------


def test_the_module_and_the_function_are_one():
    logits, targets = batch()
    options = {key: value for key, value in ALL_ON.items() if key != "mask"} | {"softcap": 9.0}
    module = lossmith.CrossEntropyLoss(**options, reduction="sequence_mean")
    function = lossmith.cross_entropy(logits, targets, **options, reduction="sequence_mean")
    assert torch.equal(module(logits, targets), function)


def test_class_weights_move_and_are_saved_with_the_module():
    module = lossmith.CrossEntropyLoss(class_weight=weights(V)).double()
    assert module.class_weight.dtype == torch.float64
    assert list(module.state_dict()) == ["class_weight"]  # as torch.nn.CrossEntropyLoss has it
    assert not lossmith.CrossEntropyLoss().state_dict()
    logits, targets = batch(dtype=torch.float64)
    torch.testing.assert_close(
        module(logits, targets), reference.cross_entropy(logits, targets, class_weight=weights(V))
    )
