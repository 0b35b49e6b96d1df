"""Each number of the analysis room against a naive form."""

import math

import pytest
import torch

import lossmith
from lossmith.analysis import (
    CorpusLoss,
    expert_usage,
    hardest,
    initial_gap,
    joined,
    loss_by_frequency,
    loss_by_position,
    reliability,
    rep_l,
    seq_rep_n,
    token_table,
    usage_entropy,
)


def test_the_table_is_the_naive_one(rng):
    logits = torch.randn(3, 5, 11, generator=rng, dtype=torch.float64)
    targets = torch.randint(11, (3, 5), generator=rng)
    targets[0, :2] = targets[2, 4] = -100
    table = token_table(lossmith.token_stats(logits, targets), first_sequence=7)
    p = logits.softmax(-1)
    expected = [
        (7 + b, t, int(targets[b, t]), int(p[b, t].argmax()), bool(p[b, t].argmax() == targets[b, t]),
         -math.log(p[b, t, targets[b, t]]), -float((p[b, t] * p[b, t].log()).sum()), float(p[b, t].max()))
        for b in range(3)
        for t in range(5)
        if targets[b, t] != -100
    ]  # fmt: skip
    columns = ("sequence", "position", "target", "predicted", "correct", "nll", "entropy", "confidence")
    for name, column in zip(columns, zip(*expected, strict=True), strict=True):
        assert getattr(table, name).tolist() == pytest.approx(list(column)), name


def test_the_table_is_of_the_plain_model_and_of_one_sweep(rng, count_ops):
    logits, targets = torch.randn(2, 4, 9, generator=rng), torch.randint(9, (2, 4), generator=rng)
    with count_ops as ops:
        warm = token_table(lossmith.token_stats(logits, targets, temperature=3.0))
    assert ops.passes == (1, 0)
    torch.testing.assert_close(warm.nll, token_table(lossmith.token_stats(logits, targets)).nll)
    with pytest.raises(ValueError, match=r"targets \[B, T\]; got \[8\]"):
        token_table(lossmith.token_stats(logits.reshape(8, 9), targets.reshape(8)))


def test_tables_of_batches_join(rng):
    logits, targets = torch.randn(4, 3, 6, generator=rng), torch.randint(6, (4, 3), generator=rng)
    whole = token_table(lossmith.token_stats(logits, targets))
    parts = [token_table(lossmith.token_stats(logits[i : i + 2], targets[i : i + 2]), i) for i in (0, 2)]
    for name in ("sequence", "target", "nll"):
        torch.testing.assert_close(getattr(joined(parts), name), getattr(whole, name))
    assert len(whole) == 12
    with pytest.raises(ValueError, match="at least one batch"):
        joined([])


def test_the_hardest_tokens_come_first(rng):
    nll = torch.rand(30, generator=rng)
    assert hardest(nll, 4).tolist() == sorted(range(30), key=lambda i: -nll[i])[:4]
    assert len(hardest(nll, 99)) == 30


@pytest.mark.parametrize("max_bands", [1, 4, 7, 32])
def test_the_loss_by_position(rng, max_bands):
    nll = torch.rand(200, generator=rng, dtype=torch.float64)
    position = torch.randint(10, (200,), generator=rng)
    found = loss_by_position(nll, position, max_bands)
    width = math.ceil(10 / max_bands)
    expected = [
        [float(x) for x, t in zip(nll, position, strict=True) if first <= t < first + width]
        for first in range(0, 10, width)
    ]
    assert found.loss == pytest.approx([sum(values) / len(values) for values in expected])
    assert found.num_tokens == [len(values) for values in expected]
    assert len(found.labels) == len(expected) <= max_bands
    assert found.labels[-1].split("-")[-1] == "9"


def test_the_loss_by_frequency(rng):
    nll = torch.rand(300, generator=rng, dtype=torch.float64)
    counts = torch.tensor([0, 1, 9, 10, 99, 100, 5000, 0])
    target = torch.randint(7, (300,), generator=rng)
    found = loss_by_frequency(nll, target, counts)
    bands = {"0": [0], "1-9": [1, 2], "10-99": [3, 4], "100-999": [5], "1000-9999": [6]}
    assert found.labels == list(bands)
    for band, loss, num in zip(bands.values(), found.loss, found.num_tokens, strict=True):
        there = torch.isin(target, torch.tensor(band))
        assert (loss, num) == (pytest.approx(nll[there].mean().item()), there.sum())


def test_the_calibration_error(rng):
    confidence = torch.rand(500, generator=rng, dtype=torch.float64)
    confidence[:3] = torch.tensor([0.0, 0.1, 1.0])  # edges
    correct = torch.rand(500, generator=rng) < confidence**2
    found = reliability(confidence, correct, num_bins=10)
    error, kept = 0.0, 0
    for k in range(10):
        there = (confidence > k / 10) & (confidence <= (k + 1) / 10) | ((confidence == 0) & (k == 0))
        if there.any():
            mean, right = confidence[there].mean().item(), correct[there].double().mean().item()
            assert (found.confidence[kept], found.accuracy[kept]) == pytest.approx((mean, right))
            error += there.sum().item() / 500 * abs(right - mean)
            kept += 1
    assert found.ece == pytest.approx(error)
    assert sum(found.num_tokens) == 500
    assert reliability(torch.ones(4), torch.ones(4, dtype=torch.bool)).ece == 0
    with pytest.raises(ValueError, match="got 0 of them"):
        reliability(torch.tensor([]), torch.tensor([]))


def test_repetition(rng):
    tokens = torch.randint(6, (80,), generator=rng)
    ids = tokens.tolist()
    for n in (1, 2, 4):
        grams = [tuple(ids[i : i + n]) for i in range(80 - n + 1)]
        copies = sum(gram in grams[:i] for i, gram in enumerate(grams))
        assert seq_rep_n(tokens, n) == pytest.approx(copies / len(grams))
    for length in (1, 5, 128):
        before = [sum(x == ids[t] for x in ids[max(0, t - length) : t]) > 0 for t in range(1, 80)]
        assert rep_l(tokens, length) == pytest.approx(sum(before) / 79)
    never, always = torch.full((80,), 99), torch.cat([tokens[:1], tokens[:-1]])
    assert (rep_l(tokens, 5, predicted=never), rep_l(tokens, 5, predicted=always)) == (0.0, 1.0)
    assert seq_rep_n(tokens[:3], 4) == rep_l(tokens[:1]) == 0.0
    with pytest.raises(ValueError, match="n must be >= 1; got 0"):
        seq_rep_n(tokens, 0)
    with pytest.raises(ValueError, match="as many ids as tokens, 80; got 2"):
        rep_l(tokens, 5, predicted=tokens[:2])


def test_expert_usage(rng):
    chosen, kept = torch.randint(5, (40, 2), generator=rng), torch.rand(40, generator=rng) < 0.5
    ids = [e for row, is_kept in zip(chosen.tolist(), kept, strict=True) if is_kept for e in row]
    assert expert_usage(chosen, 5, kept).tolist() == pytest.approx(
        [ids.count(e) / len(ids) for e in range(5)]
    )
    assert expert_usage(torch.tensor([2, 2, 0]), 3).tolist() == pytest.approx([1 / 3, 0, 2 / 3])
    usage = torch.tensor([0.7, 0.2, 0.1])
    naive = -sum(f * math.log(f) for f in (0.7, 0.2, 0.1)) / math.log(3)
    assert usage_entropy(usage) == pytest.approx(naive, rel=1e-6)
    assert usage_entropy(torch.tensor([1.0])) == 1.0


def test_the_loss_of_a_corpus():
    logits, targets = torch.zeros(1, 6, 16), torch.ones(1, 6, dtype=torch.long)
    plain = lossmith.Perplexity()
    plain.update(logits, targets)
    found = CorpusLoss(plain.nll_sum, plain.num_tokens, num_bytes=12)
    assert found.perplexity == pytest.approx(plain.compute()) == pytest.approx(16)
    assert found.bits_per_byte == pytest.approx(6 * 4 / 12)
    assert initial_gap(found.loss, 16) == pytest.approx(0, abs=1e-6)
    assert math.isnan(CorpusLoss(0.0, 0, 0).loss)
    assert math.isnan(CorpusLoss(0.0, 0, 0).bits_per_byte)
    assert CorpusLoss(1e6, 1, 1).perplexity == math.inf
