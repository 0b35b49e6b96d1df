"""A loop that calls ``ddp.module`` trains each rank by itself, and the weights show it as the page says. For
a step's first micro-batches alone it does no harm: a loss could not tell by one call."""

import pytest
import torch
from engines_case import LOSSES, RANKS, Model, shares

from ranks import on_two_ranks

pytestmark = pytest.mark.slow
PAST_THE_WRAPPER = {"none": (), "the first": (0,), "all": (0, 1)}


def trained(rank: int) -> dict[str, dict]:
    found = {}
    for which, past in PAST_THE_WRAPPER.items():
        objective = LOSSES["UnifiedLoss"].make("global").double()
        model = Model(objective)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for micro_batches in shares(objective, rank):
            for number, inputs in enumerate(micro_batches):
                forward = model if number in past else wrapped
                (forward(*inputs) * RANKS).backward()
            optimizer.step()
            optimizer.zero_grad()
        weight = model.head.weight.detach()
        of_first = weight.clone()
        torch.distributed.broadcast(of_first, 0)
        found[which] = {"agrees": torch.equal(weight, of_first), "weight": weight}
    return found


def test_the_weights_show_which_loop_trains_each_rank_by_itself(tmp_path):
    first, second = on_two_ranks(trained, tmp_path)
    assert {which: found["agrees"] for which, found in second.items()} == {
        "none": True,
        "the first": True,
        "all": False,
    }
    torch.testing.assert_close(first["the first"]["weight"], first["none"]["weight"])
