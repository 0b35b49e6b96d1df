"""A vocabulary that is split across ranks: every statistic, and so every loss, is that of the whole."""

import itertools

import pytest
import torch
import torch.distributed
from torch.testing import assert_close

import lossmith
from lossmith.engine.predictions import Logits
from lossmith.engine.shards.layout import VocabShards
from lossmith.engine.shards.sharded import ShardedHead, ShardedLogits
from lossmith.engine.statistics.stats import STATISTIC_NAMES
from lossmith.engine.sweep_options import SweepOptions
from ranks import on_ranks

INF = float("inf")
V, D, B, T = 13, 6, 3, 5
SIZES = {2: (9, 4), 3: (5, 1, 7)}
FOUR = {"label_smoothing": 0.1, "z_loss": 0.1, "focal_gamma": 1.5, "confidence_penalty": 0.1}
WEIGHT = torch.arange(V) / V
CRITERIA = {
    "plain": lossmith.CrossEntropyLoss,
    "all four": lambda: lossmith.CrossEntropyLoss(**FOUR),
    "temperature, class weights": lambda: lossmith.CrossEntropyLoss(
        **FOUR, temperature=0.6, class_weight=WEIGHT
    ),
    "softcap": lambda: lossmith.CrossEntropyLoss(**FOUR, softcap=2.0, smoothing_mode="exclude_target"),
    "none": lambda: lossmith.CrossEntropyLoss(reduction="none"),
    "nvamp": lossmith.NVAMPLoss,
    "pipeline": lambda: lossmith.LossModifierPipeline(
        [lossmith.EntropyModifier({}), lossmith.TargetSmoothingModifier({})]
    ),
    "unified": lambda: lossmith.UnifiedLoss(
        V,
        use_ngram_penalty=True,
        use_immediate_repetition_penalty=True,
        use_focal_loss=True,
        eos_token_id=3,
        adaptive_temperature=True,
    ),
}


def inputs(dtype):
    rng = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(B, T, V, generator=rng, dtype=torch.float64)
    targets = torch.randint(V, (B, T), generator=rng)
    targets[0, 0], logits[0, 0] = -100, torch.nan
    logits[0, 1, :9] = -INF  # all of a shard
    targets[0, 1] = 11
    logits[0, 2] = -INF  # nothing but the target
    logits[0, 2, targets[0, 2]] = 1.0
    logits[0, 3, targets[0, 3]] = 60.0
    logits[1, 0] = 0.5  # all equal
    logits[1, 1, 12] = 70.0  # a wrong answer dominates
    targets[1, 1] = 2
    hidden = torch.randn(B, T, D, generator=rng, dtype=torch.float64)
    weight = torch.randn(V, D, generator=rng, dtype=torch.float64)
    bias = torch.randn(V, generator=rng, dtype=torch.float64)
    return (t.to(dtype) if t.is_floating_point() else t for t in (logits, targets, hidden, weight, bias))


def losses_of(rank, dtype):
    """By case: the loss and its gradients, of the whole and of the shards put together."""
    shards = VocabShards(SIZES[torch.distributed.get_world_size()])
    own = slice(shards.starts[rank], shards.starts[rank] + shards.size)
    logits, targets, hidden, weight, bias = inputs(dtype)
    found = {}
    for name, make in CRITERIA.items():
        whole, part = logits.clone().requires_grad_(), logits[..., own].clone().requires_grad_()
        values = []
        for criterion, predictions in ((make(), whole), (make(), ShardedLogits(part, shards))):
            values += [criterion(predictions, targets) for _ in range(2)]  # state moves alike
        upstream = torch.rand(values[0].shape, dtype=values[0].dtype, generator=torch.manual_seed(1)) + 0.5
        (expected,) = torch.autograd.grad(values[0], whole, upstream)
        (gradient,) = torch.autograd.grad(values[2], part, upstream)
        found[name] = (values[0].detach(), values[2].detach(), expected[..., own], gradient)
        found[name + ", again"] = (values[1].detach(), values[3].detach())

        leaves = [given.clone().requires_grad_() for given in (hidden, weight, bias)]
        parts = [leaves[0].detach().clone().requires_grad_()]
        parts += [given[own].clone().requires_grad_() for given in (weight, bias)]
        dense = make()(None, targets, **dict(zip(HEAD, leaves, strict=True)))
        ours = make()(ShardedHead(parts[0], parts[1], shards, parts[2], memory_budget=4 * V * 8), targets)
        expected = torch.autograd.grad(dense, leaves, upstream)
        gradients = torch.autograd.grad(ours, parts, upstream)
        found[name + ", head"] = (
            *(dense.detach(), ours.detach(), expected[0], gradients[0]),
            *(expected[1][own], gradients[1], expected[2][own], gradients[2]),
        )
    return found


HEAD = ("hidden_states", "lm_head_weight", "lm_head_bias")


def pairs(values):
    return zip(values[::2], values[1::2], strict=True)


@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_every_loss_is_that_of_the_whole(num_ranks, dtype, tmp_path):
    tolerance = {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 3e-5, "atol": 3e-6}
    for found in on_ranks(num_ranks, losses_of, tmp_path, dtype):
        assert len(found) == 3 * len(CRITERIA)
        for name, values in found.items():
            for whole, sharded in pairs(values):
                assert_close(sharded, whole, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def statistics_of(rank):
    shards = VocabShards(SIZES[torch.distributed.get_world_size()])
    own = slice(shards.starts[rank], shards.starts[rank] + shards.size)
    logits, targets, *_ = inputs(torch.float64)
    candidates = torch.stack(
        [targets.clamp(min=0), *(torch.full_like(targets, i) for i in (0, 5, 12, -1))], -1
    )
    found = {}
    for reading in ({}, {"temperature": 0.6}, {"softcap": 4.0}, {"class_weight": WEIGHT.double()}):
        whole, part = logits.clone().requires_grad_(), logits[..., own].clone().requires_grad_()
        options = SweepOptions(**reading)
        of = {"ignore_index": -100, "candidates": candidates}
        dense = options.stats(Logits(whole), targets, **of)
        ours = options.stats(ShardedLogits(part, shards), targets, **of)
        for name, unscaled in itertools.product(sorted(STATISTIC_NAMES), (False, True)):
            one, other = (getattr(s.unscaled if unscaled else s, name) for s in (dense, ours))
            values = [one.detach(), other.detach()]
            if one.requires_grad:
                upstream = torch.randn(one.shape, dtype=one.dtype, generator=torch.manual_seed(1))
                upstream = upstream.masked_fill(one.isinf(), 0.0)
                (expected,) = torch.autograd.grad(one, whole, upstream, retain_graph=True)
                (gradient,) = torch.autograd.grad(other, part, upstream, retain_graph=True)
                values += [expected[..., own], gradient]
            found[f"{name} {unscaled} {list(reading)}"] = values
    return found


@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_every_statistic_is_that_of_the_whole(num_ranks, tmp_path):
    for found in on_ranks(num_ranks, statistics_of, tmp_path):
        assert len(found) == 4 * 2 * len(STATISTIC_NAMES)
        for name, values in found.items():
            for whole, sharded in pairs(values):
                assert_close(sharded, whole, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def collectives_of(rank):
    shards = VocabShards.even(V)
    own = slice(shards.starts[rank], shards.starts[rank] + shards.size)
    logits, targets, hidden, weight, _ = inputs(torch.float32)
    counts = {}
    names = ("all_gather", "all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter")
    originals = {name: getattr(torch.distributed, name) for name in names if hasattr(torch.distributed, name)}
    calls = []
    for name, original in originals.items():
        setattr(torch.distributed, name, lambda *a, o=original, n=name, **k: (calls.append(n), o(*a, **k))[1])
    for name, make in CRITERIA.items():
        for kind in ("logits", "head"):
            part = logits[..., own].clone().requires_grad_()
            parts = hidden.clone().requires_grad_(), weight[own].clone().requires_grad_()
            predictions = ShardedLogits(part, shards) if kind == "logits" else ShardedHead(*parts, shards)
            calls.clear()
            make()(predictions, targets).sum().backward()
            counts[name, kind] = list(calls)
    return counts


def test_a_step_has_two_small_collectives_at_most(tmp_path):
    for counts in on_ranks(2, collectives_of, tmp_path):
        for (name, kind), calls in counts.items():
            small = 2 if name == "pipeline" else 1  # what counts wrong answers gathers again
            of_hidden = ["all_reduce"] if kind == "head" else []
            assert calls == ["all_gather"] * small + of_hidden, (name, kind)


def drawn_by(rank):
    shards = VocabShards(SIZES[3])
    own = slice(shards.starts[rank], shards.starts[rank] + shards.size)
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[[0, 6]] = -INF
    torch.manual_seed(rank)
    return logits, ShardedLogits(logits[own].expand(20000, 1, -1), shards).sample(None)


def test_ids_are_drawn_as_often_as_they_should_and_alike_everywhere(tmp_path):
    (logits, ids), *others = on_ranks(3, drawn_by, tmp_path)
    assert ids.shape == (20000, 1)
    for _, same in others:
        assert torch.equal(same, ids)
    counts, expected = ids.reshape(-1).bincount(minlength=V).double(), 20000 * logits.softmax(-1)
    kept = expected > 0
    assert not counts[~kept].any()
    assert ((counts - expected)[kept].square() / expected[kept]).sum() < 35  # 10 degrees of freedom


def with_dtensors(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    logits, targets, hidden, weight, bias = inputs(torch.float32)
    criterion = lossmith.CrossEntropyLoss(**FOUR)
    whole = logits.clone().requires_grad_()
    sharded = distribute_tensor(logits.clone(), mesh, [Shard(2)]).requires_grad_()
    dense, ours = criterion(whole, targets), criterion(sharded, targets)
    dense.backward()
    ours.backward()
    found = {"logits": (dense.detach(), ours.detach(), whole.grad, sharded.grad.full_tensor())}

    for placement in (Replicate(), Shard(1)):
        head = torch.nn.Linear(D, V)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        leaf, other = hidden.clone().requires_grad_(), hidden.clone()
        given = {"lm_head_weight": head.weight, "lm_head_bias": head.bias}
        dense = criterion(None, targets, hidden_states=leaf, **given)
        dense.backward()
        expected = (dense.detach(), leaf.grad, head.weight.grad.clone(), head.bias.grad.clone())
        head.zero_grad()
        parallelize_module(head, mesh, ColwiseParallel(use_local_output=False))
        states = distribute_tensor(other, mesh, [placement]).requires_grad_()
        given = {"lm_head_weight": head.weight, "lm_head_bias": head.bias}
        loss = criterion(None, targets, hidden_states=states, **given)
        loss.backward()
        ours = (
            loss.detach(),
            states.grad.full_tensor(),
            head.weight.grad.full_tensor(),
            head.bias.grad.full_tensor(),
        )
        found[str(placement)] = [value for pair in zip(expected, ours, strict=True) for value in pair]

        # as the model itself leaves its logits
        scored = head(distribute_tensor(hidden, mesh, [Replicate()]))
        found[f"{placement}, logits"] = (dense.detach(), criterion(scored, targets).detach())

    replicated = distribute_tensor(logits.clone(), mesh, [Replicate()])
    found["replicated"] = (criterion(logits, targets), criterion(replicated, targets))
    with pytest.raises(ValueError, match="pass hidden states that are a DTensor of its mesh, too"):
        criterion(None, targets, hidden_states=hidden, lm_head_weight=head.weight)
    with pytest.raises(ValueError, match=r"logits must be sharded by class, Shard\(2\)"):
        criterion(distribute_tensor(logits, mesh, [Shard(1)]), targets)
    return found


def test_dtensors_are_taken_as_tensor_parallelism_leaves_them(tmp_path):
    for found in on_ranks(2, with_dtensors, tmp_path):
        for name, values in found.items():
            for whole, sharded in pairs(values):
                assert_close(sharded, whole, rtol=3e-5, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}")


def refused(rank):
    messages = []
    for make in (
        lambda: VocabShards((5,)),
        lambda: VocabShards((5, 0)),
        lambda: ShardedLogits(torch.zeros(2, 4), VocabShards((3, 3))),
        lambda: ShardedHead(torch.zeros(2, 4), torch.zeros(3, 4), VocabShards((3, 3)), strategy="one_sweep"),
        lambda: lossmith.cross_entropy(
            ShardedLogits(torch.zeros(2, 3), VocabShards((3, 3))), torch.tensor([1, 6])
        ),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        messages.append(str(caught.value))
    shards = VocabShards((3, 3))
    for make in (
        lambda: VocabShards("33"),
        lambda: VocabShards((3.0, 3)),
        lambda: ShardedLogits([0.0], shards),
        lambda: ShardedLogits(torch.zeros(2, 3), (3, 3)),
        lambda: ShardedHead(torch.zeros(2, 4), None, shards),
        lambda: ShardedHead(torch.zeros(2, 4), torch.zeros(3, 4), shards, bias=[0.0]),
    ):
        with pytest.raises(TypeError) as caught:
            make()
        messages.append(str(caught.value))
    return messages


def test_what_does_not_fit_is_refused(tmp_path):
    for messages in on_ranks(2, refused, tmp_path):
        assert "how many classes each of 2 ranks has" in messages[0]
        assert "got sizes=(5, 0)" in messages[1]
        assert "has 3 of the 6 classes; got logits of 4" in messages[2]
        assert "needs the statistics of all ranks" in messages[3]
        assert "class ids in [0, 6)" in messages[4]
        assert "sizes must be how many classes each rank has, as in (600, 400); got '33'" in messages[5]
        assert "got (3.0, 3)" in messages[6]
        assert "logits must be a tensor, this rank's part; got list" in messages[7]
        assert "lossmith.VocabShards.even(V, group); got tuple" in messages[8]
        assert "weight must be a tensor" in messages[9]
        assert "bias must be a tensor" in messages[10]
