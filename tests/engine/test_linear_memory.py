"""No tensor as large as the logits is made, in training, evaluation or sampling; a budget is a budget."""

import pytest
import torch

import linear_case
import lossmith
from linear_case import STRATEGIES, Head, LargestTensor
from lossmith.engine import sampling
from lossmith.engine.head import packing, products, sizes
from lossmith.engine.head.chunks import Chunks
from lossmith.engine.head.factors import Factors
from lossmith.engine.head.linear_head import LinearHead
from lossmith.engine.head.sizes import MEMORY_BUDGET, rows_of_a_chunk
from lossmith.engine.statistics.stats import STATISTIC_NAMES
from slow_but import slow_but

N, D, V = 512, 8, 600
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SMALL = 16  # rows

pytestmark = pytest.mark.usefixtures("arithmetic")


@pytest.fixture(autouse=True)
def small_blocks(set_block_rows, monkeypatch):
    """PyTorch's arithmetic has blocks of its own, and these tests are small."""
    set_block_rows(SMALL, V)
    monkeypatch.setattr(products, "PIECE_ELEMENTS", 16 * D)
    monkeypatch.setattr(sizes, "NARROWED_ELEMENTS", 16 * D)


def batch(dtype: torch.dtype) -> tuple[Head, torch.Tensor]:
    return linear_case.head(4, N // 4, dtype=dtype, size=D, num_classes=V), linear_case.targets(
        4, N // 4, num_classes=V
    )


CRITERIA = {
    "cross_entropy": lambda: lossmith.CrossEntropyLoss(
        label_smoothing=0.1, z_loss=0.1, temperature=0.7, focal_gamma=1.0
    ),
    "softcap": lambda: lossmith.CrossEntropyLoss(softcap=5.0),
    "nvamp": lambda: lossmith.NVAMPLoss(),
    "none": lambda: lossmith.CrossEntropyLoss(reduction="none"),
    "unified": lambda: lossmith.UnifiedLoss(
        V, hidden_size=D, use_mtp=True, use_ngram_penalty=True, ngram_window_size=8, use_focal_loss=True
    ),
    "pipeline": lambda: lossmith.LossModifierPipeline([lossmith.EntropyModifier({})]),
    "judge": lambda: lossmith.LossModifierPipeline(
        [lossmith.SequenceScoringJudgeWeightModifier({"judge": lambda ids: torch.full((len(ids),), 0.5)})]
    ),
}


@pytest.mark.parametrize("dtype", slow_but([torch.bfloat16], DTYPES), ids=str)
@pytest.mark.parametrize("is_trained", slow_but([True], [True, False]))
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CRITERIA)
def test_nothing_is_as_large_as_the_logits(name, strategy, is_trained, dtype):
    head, targets = batch(dtype)
    criterion = CRITERIA[name]().to(dtype)
    with LargestTensor() as largest, torch.set_grad_enabled(is_trained):
        output = criterion.evaluate(targets=targets, **head.inputs(SMALL, strategy))
        if is_trained:
            (output.total.sum() + sum(part.sum() for part in output.parts.values())).backward()
        output.metrics.to_dict()
        _ = output.stats.entropy
    wide = 4 if dtype == torch.bfloat16 else dtype.itemsize
    assert largest.nbytes <= max(SMALL * V * wide, 2 * V * D * 8)
    assert largest.nbytes < N * V * dtype.itemsize / 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(dtype):
    head, targets = batch(dtype)
    with LargestTensor() as largest:
        stats = lossmith.linear_token_stats(
            head.hidden, head.weight, targets, bias=head.bias, memory_budget=head.budget(SMALL)
        )
        names = sorted(STATISTIC_NAMES - {"candidate_logits", "candidate_log1m_prob"})
        values = [getattr(stats, name) for name in names]
        sum(value.sum() for value in values if value.requires_grad).backward()
    assert largest.nbytes < N * V * dtype.itemsize / 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampling(dtype, monkeypatch):
    """From the same distribution and the same random numbers as from the logits."""
    monkeypatch.setattr(sampling, "BLOCK_ELEMENTS", SMALL * V)
    head, _ = batch(dtype)
    torch.manual_seed(0)
    with LargestTensor() as largest:
        drawn = LinearHead(head.hidden, head.weight, head.bias, memory_budget=head.budget(SMALL)).sample(3.0)
    assert largest.nbytes <= SMALL * V * 8
    torch.manual_seed(0)
    expected = sampling.sample_ids(head.logits(), softcap=3.0)
    assert drawn.shape == expected.shape == (4, N // 4)
    assert (drawn != expected).float().mean() <= (0.02 if dtype == torch.bfloat16 else 0.0)


@pytest.mark.parametrize("packed", [True, False])
def test_sampling_a_large_chunk_takes_little_more(packed, monkeypatch):
    """What is drawn from takes a few times the memory of the logits that it is drawn from."""
    monkeypatch.setattr(sampling, "BLOCK_ELEMENTS", SMALL * V)
    monkeypatch.setattr(packing, "packs", lambda targets: packed)
    head, _ = batch(torch.bfloat16)
    with LargestTensor() as largest:
        LinearHead(head.hidden, head.weight, head.bias).sample(None)
    assert largest.nbytes <= N * V * 4  # all the logits at once, in fp32


# -- the budget ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", [1, V * 2 - 1, V * 8, 10 * V * 8 + 5, 10**9, None])
def test_the_chunks_are_within_the_budget(budget, dtype):
    head, targets = batch(dtype)
    flat = head.hidden.detach().flatten(0, 1)
    factors = Factors(flat, head.weight.detach(), None, dtype, budget)
    of = Chunks(factors, targets.flatten(), ignore_index=-100)
    sizes = [len(of.inputs(rows)) for rows in of.all()]
    assert sum(sizes) == (targets != -100).sum()
    assert max(sizes) == of.size == len(of.buffer())
    assert max(sizes) - min(sizes) < len(sizes)  # evenly
    assert of.buffer().nbytes <= max(budget or MEMORY_BUDGET["cpu"], V * max(4, dtype.itemsize))
    plan = lossmith.linear_cross_entropy.explain(head.hidden, head.weight, targets, memory_budget=budget)
    assert (plan.chunk_rows, plan.num_chunks) == (of.size, len(sizes))
    assert plan.logits_bytes == of.buffer().nbytes
    assert plan.num_tokens == sum(sizes)


def test_a_budget_of_less_than_a_row_is_a_row():
    assert rows_of_a_chunk(10, 1000, 4, torch.device("cpu"), 1) == 1
    assert rows_of_a_chunk(0, 1000, 4, torch.device("cpu"), None) == 1
    assert rows_of_a_chunk(10, 1000, 4, torch.device("cpu"), 4000 * 4) == 4  # 4 + 3 + 3, not 4 + 4 + 2
    assert rows_of_a_chunk(9, 1000, 4, torch.device("cpu"), 4000 * 4) == 3


def test_what_a_plan_says():
    hidden, weight = torch.zeros(100, D, requires_grad=True), torch.zeros(V, D, requires_grad=True)
    targets = torch.zeros(100, dtype=torch.long)
    targets[:20] = -100
    budget = 30 * V * 4
    plans = {
        strategy: lossmith.linear_cross_entropy.explain(
            hidden, weight, targets, strategy=strategy, memory_budget=budget
        )
        for strategy in STRATEGIES
    }
    once, twice = plans["auto"], plans["two_sweep"]
    assert (once.strategy, twice.strategy) == ("one_sweep", "two_sweep")
    assert (once.num_tokens, once.num_chunks, once.chunk_rows) == (80, 3, 27)
    assert once.num_products == 3
    assert twice.num_products == pytest.approx(4 - 26 / 80)  # the last chunk's logits are still there
    assert once.num_flops == 2 * 3 * 80 * V * D
    assert once.accumulator_bytes == 0
    assert "one_sweep" in str(once)
    assert "two_sweep: it was asked for" in str(twice)
    half = lossmith.linear_cross_entropy.explain(
        hidden.bfloat16(), weight.bfloat16(), targets, memory_budget=budget
    )
    assert (half.num_chunks, half.accumulator_bytes) == (3, V * D * 4)
    with torch.no_grad():
        assert lossmith.linear_cross_entropy.explain(hidden, weight, targets).num_products == 1


def test_the_forward_of_two_sweeps_keeps_one_chunk():
    """Statistics, and the last chunk's logits; not the logits."""
    head, targets = batch(torch.float32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        lossmith.linear_cross_entropy(
            head.hidden, head.weight, targets, strategy="two_sweep", memory_budget=head.budget(SMALL)
        )
    assert max(x.numel() for x in kept) <= max(N * D, V * D)
