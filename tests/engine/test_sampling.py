"""Drawing ids from logits."""

import pytest
import torch

from lossmith.engine import sampling
from lossmith.engine.sampling import sample_ids


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ids_come_as_often_as_they_should(dtype, rng):
    logits = (2 * torch.randn(7, generator=rng)).to(dtype)
    logits[3] = -torch.inf
    num = 40_000
    torch.manual_seed(0)
    counts = sample_ids(logits.expand(num, 7)).bincount(minlength=7).double()
    expected = num * logits.double().softmax(-1)
    assert counts[3] == 0
    kept = expected > 0
    chi_square = ((counts - expected)[kept].square() / expected[kept]).sum()
    assert chi_square < 25  # 5 degrees of freedom: exceeded once in 7,000 times


def test_the_ends_of_the_unit_interval_draw_possible_ids(monkeypatch):
    logits = torch.tensor([[-torch.inf, 0.0, -200.0, 1.0, -torch.inf]])
    largest = torch.nextafter(torch.ones(1, 1), torch.zeros(1, 1))
    for uniform, expected in ((torch.zeros(1, 1), 1), (largest, 3)):
        monkeypatch.setattr(torch, "rand", lambda *_, u=uniform, **__: u)
        assert sample_ids(logits).tolist() == [expected]


def test_any_shape_in_any_blocks_from_one_seed(monkeypatch, rng):
    logits = torch.randn(3, 5, 11, generator=rng, requires_grad=True)
    drawn = []
    for elements in (11, 40, 10**6):
        monkeypatch.setattr(sampling, "BLOCK_ELEMENTS", elements)
        torch.manual_seed(1)
        drawn.append(sample_ids(logits))
    assert drawn[0].shape == (3, 5)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert sample_ids(logits.transpose(0, 1)).shape == (5, 3)


def test_the_softcap_is_honoured():
    logits = torch.tensor([0.0, 50.0]).expand(2000, 2)
    torch.manual_seed(0)
    share = sample_ids(logits, softcap=1.0).double().mean().item()
    assert share == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.04)


def test_broken_rows_give_some_id():
    assert 0 <= sample_ids(torch.full((1, 4), torch.nan)).item() < 4
    assert 0 <= sample_ids(torch.full((1, 4), -torch.inf)).item() < 4
