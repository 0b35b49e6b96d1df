"""Sums, means and lists over ranks, and the order in which modules ask for them."""

import torch
from torch import Tensor

from lossmith.core.distributed import gather_over_ranks, masked_mean, num_ranks, sum_over_ranks
from lossmith.core.stepping import Stepped
from ranks import on_two_ranks

VALUES = [torch.tensor([3.0, 1.0]), torch.tensor([-2.0, 5.0, 4.0, -7.0, 0.5])]
WHERE = [torch.tensor([True, False]), torch.tensor([True, True, False, False, True])]


def found_by(rank: int) -> dict[str, Tensor]:
    values, where = VALUES[rank].clone().requires_grad_(), WHERE[rank]
    own = values.detach()
    found = {
        "gathered": gather_over_ranks(values, 6),
        "sum": sum_over_ranks(own.sum(), "global"),
        "own sum": sum_over_ranks(own.sum(), "local"),
        "mean": masked_mean(own, where, "global"),
        "own mean": masked_mean(own, where),
        "mean of nothing": masked_mean(own, torch.zeros_like(where), "global"),
        "ranks": torch.tensor(num_ranks()),
    }
    three = torch.ones(3)
    found["of three"] = sum_over_ranks(three, "global")
    found["three"] = three
    assert not found["gathered"].requires_grad
    return found


def test_ranks_with_different_numbers_of_values(tmp_path):
    for rank, found in enumerate(on_two_ranks(found_by, tmp_path)):
        gathered = found["gathered"]
        assert gathered[gathered.isfinite()].tolist() == [*VALUES[0].tolist(), *VALUES[1].tolist()]
        assert (gathered[~gathered.isfinite()] == -torch.inf).all()  # never among the largest
        assert found["ranks"] == 2
        assert found["sum"] == 4.5
        assert found["own sum"] == VALUES[rank].sum()
        assert found["mean"] == (3.0 - 2.0 + 5.0 + 0.5) / 4
        torch.testing.assert_close(found["own mean"], VALUES[rank][WHERE[rank]].mean())
        assert found["mean of nothing"] == 0
        assert found["of three"].tolist() == [2, 2, 2]
        assert found["three"].tolist() == [1, 1, 1]  # the caller's own stay as they are


def test_without_ranks_everything_is_the_callers_own():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    assert num_ranks() == 1
    assert torch.equal(gather_over_ranks(values, 6), values)
    assert not gather_over_ranks(values, 6).requires_grad
    assert torch.equal(sum_over_ranks(values, "global"), values)
    assert masked_mean(values.detach(), torch.tensor([False, False]), "global") == 0


def test_modules_advance_in_the_order_in_which_they_were_made():
    """Over ranks their sums have to meet, and a set has an order of its own in every process."""
    advanced: list[int] = []

    class Numbered(Stepped):
        def advance(self) -> None:
            advanced.append(self.number)

    modules = [Numbered() for _ in range(40)]
    for number, module in enumerate(modules):
        module.number = number
    for module in modules[::-1]:
        module.take_note()
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.SGD([parameter], lr=0.0).step()
    assert advanced == list(range(40))
