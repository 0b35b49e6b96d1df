"""Perplexity is a mean over tokens, whatever the batches; ranking is a mean over pairs."""

import math

import pytest
import torch

import lossmith
from lossmith.engine.rows import blocks

IGNORE = -100


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of very different sizes and difficulty."""
    rng = torch.Generator().manual_seed(0)
    made = []
    for rows, scale in ((1, 0.1), (5, 4.0), (2, 10.0)):
        targets = torch.randint(11, (rows, 7), generator=rng)
        targets[torch.rand(rows, 7, generator=rng) < 0.3] = IGNORE
        made.append((scale * torch.randn(rows, 7, 11, generator=rng), targets))
    return made


def corpus_perplexity() -> float:
    nll = count = 0.0
    for logits, targets in batches():
        valid = targets != IGNORE
        nll -= logits.double().log_softmax(-1)[valid].gather(-1, targets[valid].unsqueeze(-1)).sum().item()
        count += valid.sum().item()
    return math.exp(nll / count)


def test_over_a_corpus_it_is_weighted_by_tokens():
    accumulated = lossmith.Perplexity()
    of_batches = []
    for logits, targets in batches():
        accumulated.update(logits, targets)
        of_batches.append(lossmith.perplexity(logits, targets).item())
    assert accumulated.compute() == pytest.approx(corpus_perplexity(), rel=1e-6)
    assert accumulated.num_tokens == sum(int((t != IGNORE).sum()) for _, t in batches())
    assert abs(sum(of_batches) / 3 - accumulated.compute()) > 1  # a mean of batch means is not it


def test_ranks_can_be_added():
    whole, parts = lossmith.Perplexity(), lossmith.Perplexity()
    for logits, targets in batches():
        whole.update(logits, targets)
        rank = lossmith.Perplexity()
        rank.update(logits, targets)
        parts.add(rank.nll_sum, rank.num_tokens)
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_mask_shift_and_softcap_are_those_of_cross_entropy():
    logits, targets = batches()[1]
    mask = torch.arange(7).expand(5, 7) > 1
    accumulated = lossmith.Perplexity(softcap=3.0, shift=True)
    accumulated.update(logits, targets, mask=mask)
    capped = 3 * torch.tanh(logits[:, :-1].double() / 3)
    shifted = targets[:, 1:].masked_fill(~mask[:, 1:], IGNORE)
    expected = torch.nn.functional.cross_entropy(capped.reshape(-1, 11), shifted.reshape(-1)).exp().item()
    assert accumulated.compute() == pytest.approx(expected, rel=1e-6)
    one_call = lossmith.perplexity(logits, targets, softcap=3.0, shift=True, mask=mask)
    assert one_call.item() == pytest.approx(expected, rel=1e-5)


def test_the_arithmetic_is_the_one_that_was_asked_for(monkeypatch):
    logits, targets, used = torch.randn(3, 7), torch.tensor([0, 1, 2]), []
    fill_stats = blocks.fill_stats
    monkeypatch.setattr(blocks, "fill_stats", lambda *given: (used.append(1), fill_stats(*given)))
    corpus = lossmith.Perplexity(backend="torch")
    corpus.update(logits, targets)
    assert math.isclose(corpus.compute(), lossmith.perplexity(logits, targets, backend="torch"), rel_tol=1e-6)
    assert len(used) == 2
    with pytest.raises(ValueError, match="fortran"):
        lossmith.Perplexity(backend="fortran")


def test_another_ignore_index():
    logits, targets = batches()[1]
    moved = targets.masked_fill(targets == IGNORE, 0)
    a, b = lossmith.Perplexity(ignore_index=0), lossmith.Perplexity()
    a.update(logits, moved)
    b.update(logits, moved.masked_fill(moved == 0, IGNORE))
    assert a.compute() == b.compute()
    one_call = lossmith.perplexity(logits, moved, ignore_index=0).item()
    assert one_call == pytest.approx(b.compute(), rel=1e-5)


def test_it_does_not_keep_the_graph():
    accumulated = lossmith.Perplexity()
    accumulated.update(batches()[0][0].requires_grad_(), batches()[0][1])
    assert not accumulated._nll.requires_grad


def test_nothing_seen_is_nan_and_reset_forgets():
    accumulated = lossmith.Perplexity()
    assert math.isnan(accumulated.compute())
    accumulated.update(*batches()[0])
    accumulated.reset()
    assert accumulated.num_tokens == 0
    accumulated.update(torch.zeros(2, 3), torch.tensor([IGNORE, IGNORE]))
    assert math.isnan(accumulated.compute())
    assert lossmith.perplexity(torch.zeros(2, 3), torch.tensor([IGNORE, IGNORE])).item() == 1


def test_an_impossible_target_is_infinite():
    accumulated = lossmith.Perplexity()
    accumulated.update(torch.tensor([[0.0, -float("inf")]]), torch.tensor([1]))
    assert accumulated.compute() == math.inf
    accumulated.reset()
    accumulated.update(torch.tensor([[0.0, 1e4]]), torch.tensor([0]))
    assert accumulated.compute() == math.inf


def test_many_small_batches_lose_nothing_to_rounding():
    """In fp32 the sum of 1e5 batches of loss log 3 would be off in the third digit of its mean's tail."""
    accumulated = lossmith.Perplexity()
    accumulated.add(1e9 * math.log(3), 10**9)
    for _ in range(1000):
        accumulated.update(torch.zeros(1, 3), torch.tensor([0]))
    assert accumulated.compute() == pytest.approx(3.0, rel=1e-9)


# -- ranking ----------------------------------------------------------------------------------------


def test_ranking_is_the_hinge_of_the_margin():
    positive = torch.tensor([2.0, 0.5, -1.0], requires_grad=True)
    negative = torch.tensor([0.0, 0.0, 3.0])
    values = lossmith.ranking_loss(positive, negative, margin=0.8, reduction="none")
    torch.testing.assert_close(values, torch.tensor([0.0, 0.3, 4.8]))
    assert lossmith.ranking_loss(positive, negative, margin=0.8, reduction="sum").item() == pytest.approx(5.1)
    loss = lossmith.ranking_loss(positive, negative, margin=0.8)
    assert loss.item() == pytest.approx(1.7)
    loss.backward()
    torch.testing.assert_close(positive.grad, torch.tensor([0.0, -1 / 3, -1 / 3]))


def test_ranking_many_negatives_against_one_positive_with_a_mask():
    positive, negative = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5, 3.0], [0.0, 1.5]])
    mask = torch.tensor([[True, True], [False, True]])
    expected = (0.5 + 3.0 + 0.5) / 3
    assert lossmith.ranking_loss(positive, negative, mask=mask).item() == pytest.approx(expected)
    assert lossmith.ranking_loss(positive, negative, mask=mask, denominator=6).item() == pytest.approx(
        expected / 2
    )
    nan = torch.where(mask, negative, torch.nan).requires_grad_()
    loss = lossmith.ranking_loss(positive, nan, mask=mask)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert nan.grad[1, 0] == 0


def test_ranking_without_a_pair_is_zero():
    scores = torch.randn(3, requires_grad=True)
    loss = lossmith.ranking_loss(scores, scores.flip(0), mask=torch.zeros(3, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(scores.grad, torch.zeros(3))


def test_ranking_refuses_what_it_cannot_mean():
    scores = torch.zeros(3)
    with pytest.raises(ValueError, match=r"margin must be a number >= 0; got -1"):
        lossmith.ranking_loss(scores, scores, margin=-1)
    with pytest.raises(TypeError, match="Did you mean 'margin'"):
        lossmith.ranking_loss(scores, scores, margins=1.0)
    with pytest.raises(ValueError, match=r"reduction"):
        lossmith.ranking_loss(scores, scores, reduction="average")
    with pytest.raises(ValueError, match=r"\[3\].*\[2\]|shape|broadcast"):
        lossmith.ranking_loss(scores, torch.zeros(2))


def test_a_mask_of_a_row_of_pairs_counts_every_one():
    positive, negative = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor(2.5)
    masked = lossmith.ranking_loss(positive, negative, margin=1.0, mask=torch.tensor([[1], [0]]))
    torch.testing.assert_close(masked, lossmith.ranking_loss(positive[0], negative, margin=1.0))
