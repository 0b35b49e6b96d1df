"""A temperature under FSDP1 moves at the steps of an optimizer that holds views of what the loss trained."""

import pytest
import torch
from engines_case import Model, V, shares
from fsdp_on_cpu import let_fsdp1_use_the_cpu

import lossmith
from ranks import on_two_ranks

pytestmark = pytest.mark.slow


def moved(rank: int) -> torch.Tensor:
    from torch.distributed.fsdp import FullyShardedDataParallel

    let_fsdp1_use_the_cpu()
    objective = lossmith.UnifiedLoss(V, 8, adaptive_temperature=True)
    model = Model(objective)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for micro_batches in shares(objective, rank):
        for ids, labels, denominator in micro_batches:
            wrapped(ids, labels, denominator).backward()
        optimizer.step()
    return objective.base.temperature.num_steps


def test_each_step_moves_it_once(tmp_path):
    assert on_two_ranks(moved, tmp_path) == [2, 2]
