"""Known gradients times an upstream gradient."""

import pytest
import torch

from linear_case import Ledger
from lossmith.engine.head.upstream import times

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (0, 4)], ids=str)
def test_each_element_is_rounded_once(dtype, shape, rng):
    gradient, factor = torch.randn(shape, generator=rng).to(dtype), torch.tensor(1 / 3)
    found = times(gradient, factor, into=torch.empty_like(gradient))
    assert torch.equal(found, (gradient.double() * factor.double()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_in_place", [True, False])
def test_one_launch_on_an_accelerator(dtype, is_in_place):
    gradient, factor = torch.empty(4, 6, dtype=dtype, device="meta"), torch.empty((), device="meta")
    into = gradient if is_in_place else torch.empty_like(gradient)
    with Ledger(gradient, factor, into) as ledger:
        times(gradient, factor, into=into)
    assert ledger.counts == {"mul": 1}
    assert ledger.peak == 0


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_factor_with_a_dimension_is_not_rounded_to_the_gradients_dtype(dtype, rng):
    """What a GPU relies on."""
    gradient, factor = torch.randn(1000, generator=rng).to(dtype), torch.tensor(1 / 3)
    expected = (gradient.double() * factor.double()).to(dtype)
    assert torch.equal(torch.mul(gradient, factor.reshape(1), out=gradient), expected)
