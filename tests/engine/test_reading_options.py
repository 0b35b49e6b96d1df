"""Temperatures, caps and class weights that logits cannot be read with."""

import re

import pytest
import torch

import lossmith
from lossmith import CrossEntropyLoss

pytestmark = pytest.mark.usefixtures("arithmetic")

INF, NAN = float("inf"), float("nan")
LOGITS, TARGETS = torch.tensor([[5.0, -3.0, 0.5], [1.0, 2.0, 3.0]]), torch.tensor([1, 2])
ENTRANCES = {
    "token_stats": lambda **options: lossmith.token_stats(LOGITS, TARGETS, **options).nll,
    "linear_token_stats": lambda **options: (
        lossmith.linear_token_stats(LOGITS, torch.eye(3), TARGETS, **options).nll
    ),
    "module": lambda **options: CrossEntropyLoss(**options),
}
OF_A_LOSS = {
    "constructor": lambda **options: CrossEntropyLoss(**options),
    "functional": lambda **options: lossmith.cross_entropy(LOGITS, TARGETS, **options),
    "head": lambda **options: lossmith.linear_cross_entropy(LOGITS, torch.eye(3), TARGETS, **options),
}


@pytest.mark.parametrize("enter", ENTRANCES.values(), ids=ENTRANCES)
@pytest.mark.parametrize("name", ["temperature", "softcap"])
@pytest.mark.parametrize("value", [1e-38, 1e-21, 1e21, 1e39, INF])
def test_divisors_that_take_logits_out_of_fp32(name, value, enter):
    """1e-38 and an infinite cap gave NaN."""
    with pytest.raises(
        ValueError, match=rf"{name} must be .*>= 1e-20 and <= 1e\+20.*got {re.escape(str(value))}"
    ):
        enter(**{name: value})


@pytest.mark.parametrize("enter", ENTRANCES.values(), ids=ENTRANCES)
@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF, 1e-38])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)  # in the last of them the lowest that is allowed is 0
def test_temperatures_in_a_tensor_are_numbers_like_others(value, dtype, enter):
    with pytest.raises(ValueError, match="temperature must be"):
        enter(temperature=torch.tensor(value, dtype=dtype))


def test_a_temperature_that_becomes_wrong_later():
    temperature = torch.tensor(1.0)
    criterion = CrossEntropyLoss(temperature=temperature)
    assert criterion(LOGITS, TARGETS).isfinite()
    temperature.fill_(-1.0)
    with pytest.raises(ValueError, match=r"temperature must be .*>= 1e-20.*got a tensor .*-1"):
        criterion(LOGITS, TARGETS)


@pytest.mark.parametrize("value", [0.0, -1.0, INF, NAN])
def test_a_compiled_objective_asserts_its_temperature(value):
    temperature = torch.tensor(1.0)

    def loss(logits, temperature):
        return lossmith.token_stats(logits, TARGETS, temperature=temperature).nll.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert compiled(LOGITS, temperature).isfinite()
    with pytest.raises(RuntimeError, match="temperature must be"):
        compiled(LOGITS, torch.tensor(value))


@pytest.mark.parametrize("value", [1e-20, 1e-6, 1e6, 1e20])
@pytest.mark.parametrize("name", ["temperature", "softcap"])
def test_what_is_allowed_has_a_finite_value_and_gradient(name, value):
    logits = LOGITS.clone().requires_grad_()
    for enter in (
        lambda: lossmith.token_stats(logits, TARGETS, **{name: value}).nll,
        lambda: lossmith.linear_token_stats(logits, torch.eye(3), TARGETS, **{name: value}).nll,
    ):
        found = enter()
        assert found.isfinite().all()
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("enter", OF_A_LOSS.values(), ids=OF_A_LOSS)
@pytest.mark.parametrize("value", [INF, -INF, NAN, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_class_weights_that_weigh_nothing(value, dtype, enter):
    weight = torch.tensor([1.0, 2.0, value], dtype=dtype)
    with pytest.raises(ValueError, match=r"class_weight must be a floating-point tensor \[V\] >= 0.*; got"):
        enter(class_weight=weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_class_weights_of_zeros_and_whole_numbers(dtype):
    weight = torch.tensor([0, 2, 1], dtype=dtype)
    expected = torch.nn.functional.cross_entropy(LOGITS, TARGETS, weight=weight.float())
    torch.testing.assert_close(lossmith.cross_entropy(LOGITS, TARGETS, class_weight=weight), expected)


@pytest.mark.parametrize("value", [0.0, INF, -2.0])
def test_the_models_own_cap(value):
    head = {"hidden_states": LOGITS, "lm_head_weight": torch.eye(3), "lm_head_softcap": value}
    with pytest.raises(ValueError, match=r"lm_head_softcap must be"):
        CrossEntropyLoss()(targets=TARGETS, **head)
