"""The page on scale is what its script writes, and the script's small end is what two ranks do."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lossmith
from linear_case import Ledger
from ranks import on_two_ranks

PLACE = Path(__file__).parents[1] / "benchmarks" / "scale.py"
SPEC = importlib.util.spec_from_file_location("scale", PLACE)
assert SPEC is not None
assert SPEC.loader is not None
scale = sys.modules["scale"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(scale)

SIZES = {"num_tokens": 4096, "num_classes": 12000, "size": 64}
HERE = {**SIZES, "dtype": torch.float32, "device": "cpu"}
# What a rank passes in is an operator's first or second argument.
SENT = {
    "c10d::allreduce_": 0,
    "c10d::allgather_": 1,
    "c10d::_allgather_base_": 1,
    "c10d::_reduce_scatter_base_": 1,
}


class Sent(TorchDispatchMode):
    """The bytes that are passed to collectives."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        place = SENT.get(func.name())
        if place is not None:
            given = args[place]
            self.nbytes += sum(t.nbytes for t in (given if isinstance(given, list) else [given]))
        return func(*args, **(kwargs or {}))


class Head(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(SIZES["num_classes"], SIZES["size"]))

    def forward(self, hidden, targets):
        return lossmith.linear_cross_entropy(hidden, self.weight, targets)


class SequenceHead(Head):
    """Of a rank that has some positions of each of two sequences, in a piece of its own."""

    def forward(self, hidden, targets):
        shards = lossmith.SequenceShards.even(SIZES["num_tokens"] // 2)
        given = {"hidden_states": hidden.view(2, -1, SIZES["size"]), "targets": targets.view(2, -1)}
        return lossmith.CrossEntropyLoss()(**given, lm_head_weight=self.weight, sequence=shards)


def batch(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.randn(num_tokens, SIZES["size"], requires_grad=True)
    return hidden, torch.zeros(num_tokens, dtype=torch.long)


def runs_of(rank: int) -> dict[str, dict[str, int]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = {}
    hidden, targets = batch(SIZES["num_tokens"] // 2)
    for split, made, wrap in (
        ("replicated", Head, torch.nn.parallel.DistributedDataParallel),
        ("sequence", SequenceHead, torch.nn.parallel.DistributedDataParallel),
        ("gathered", Head, lambda head: fully_shard(head, mesh=init_device_mesh("cpu", (2,)))),
    ):
        wrapped = wrap(made())
        with FlopCounterMode(display=False) as computed, Sent() as sent:
            wrapped(hidden, targets).backward()
        head, hidden.grad = made(), None
        with Ledger(hidden, head.weight, targets) as ledger:
            head(hidden, targets).backward()
        memory = ledger.peak + hidden.nbytes + head.weight.nbytes
        found[split] = {"sent": sent.nbytes, "memory": memory, "flops": computed.get_total_flops()}

    shards = lossmith.VocabShards.even(SIZES["num_classes"])
    hidden, targets = batch(SIZES["num_tokens"])
    weight = torch.randn(shards.size, SIZES["size"], requires_grad=True)
    torch.distributed.broadcast(hidden.data, 0)
    with (
        FlopCounterMode(display=False) as computed,
        Sent() as sent,
        Ledger(hidden, weight, targets) as ledger,
    ):
        lossmith.CrossEntropyLoss()(lossmith.ShardedHead(hidden, weight, shards), targets).backward()
    memory = ledger.peak + hidden.nbytes + weight.nbytes
    found["vocabulary"] = {"sent": sent.nbytes, "memory": memory, "flops": computed.get_total_flops()}
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return on_two_ranks(runs_of, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("split", scale.SPLITS)
def test_two_ranks_send_what_is_said(split, ranks):
    expected = scale.cost(split, 2, **HERE)
    for rank in ranks:
        assert rank[split]["sent"] == pytest.approx(expected.sent_bytes, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["replicated", "sequence", "vocabulary"])
def test_two_ranks_hold_what_is_said(split, ranks):
    expected = scale.cost(split, 2, **HERE)
    for rank in ranks:
        assert rank[split]["memory"] == pytest.approx(expected.memory_bytes, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("split", scale.SPLITS)
def test_two_ranks_compute_what_is_said(split, ranks):
    expected = scale.cost(split, 2, **HERE)
    assert [rank[split]["flops"] for rank in ranks] == [expected.plan.num_flops] * 2


def test_the_page_is_what_the_script_writes():
    """If not: python benchmarks/scale.py"""
    assert scale.PAGE.read_text() == scale.page_with_tables(scale.PAGE.read_text())
