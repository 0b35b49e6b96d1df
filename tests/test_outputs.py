"""What comes out of an objective: in the targets' shape, and plain numbers once copied or saved."""

import copy
import pickle

import pytest
import torch

import lossmith

COPIES = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "deepcopy": copy.deepcopy,
}


def case():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=rng, requires_grad=True)
    targets = torch.randint(11, (2, 5), generator=rng)
    targets[0, 1] = -100
    return logits, targets


@pytest.mark.parametrize(
    "criterion",
    [
        lossmith.CrossEntropyLoss(z_loss=0.1, temperature=1.3),
        lossmith.LossModifierPipeline([lossmith.EntropyModifier({})]),
        lossmith.UnifiedLoss(11, use_ngram_penalty=True),
    ],
)
def test_statistics_have_the_shape_of_the_targets(criterion):
    logits, targets = case()
    output = criterion.evaluate(logits, targets)
    assert output.stats.nll.shape == targets.shape
    assert torch.equal(output.stats.targets, targets)
    torch.testing.assert_close(output.stats.flat().nll, output.stats.nll.reshape(-1))
    direct = lossmith.token_stats(logits, targets).unscaled.nll
    torch.testing.assert_close(output.stats.unscaled.nll, direct)


@pytest.mark.parametrize("how", COPIES)
def test_an_output_is_copied_as_plain_numbers(how):
    logits, targets = case()
    output = lossmith.CrossEntropyLoss(z_loss=0.1).evaluate(logits, targets)
    nll = output.stats.nll
    found = COPIES[how](output)
    assert found.total == output.total
    assert not found.total.requires_grad
    assert found.parts.keys() == output.parts.keys()
    assert not any(part.requires_grad for part in found.parts.values())
    assert found.metrics.to_dict() == output.metrics.to_dict()
    assert torch.equal(found.stats.nll, nll)
    assert not found.stats.nll.requires_grad
    output.total.backward()  # the original still has its graph
    assert logits.grad.any()


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_statistics_has_those_that_were_there(how):
    logits, targets = case()
    stats = lossmith.token_stats(logits, targets).compute("nll", "entropy")
    found = COPIES[how](stats)
    assert torch.equal(found.entropy, stats.entropy)
    assert found.nll.shape == targets.shape
    with pytest.raises(RuntimeError, match=r"computed before.*stats\.compute"):
        _ = found.top_prob


@pytest.mark.parametrize("how", COPIES)
def test_metrics_are_copied_as_numbers(how):
    logits, targets = case()
    metrics = lossmith.CrossEntropyLoss().evaluate(logits, targets).metrics
    found = COPIES[how](metrics)
    assert isinstance(found, lossmith.Metrics)
    assert dict(found) == metrics.to_dict()


def test_metrics_are_read_together_to_every_digit():
    odd = 2**24 + 1  # no number of fp32
    sources = {
        "wide": torch.tensor(odd),
        "row": torch.tensor([0.5]),
        "plain": odd,
        "late": lambda: torch.ones(1),
    }
    metrics = lossmith.Metrics(sources)
    assert metrics.to_dict() == dict(metrics) == {"wide": odd, "row": 0.5, "plain": odd, "late": 1.0}


def test_statistics_show_what_they_have():
    logits, targets = case()
    stats = lossmith.token_stats(logits, targets, temperature=2.0)
    assert repr(stats) == "TokenStats([2, 5], computed: nothing yet)"
    stats.compute("nll", "unscaled.entropy")
    assert "nll" in repr(stats)
    assert "entropy" not in repr(stats).replace("wrong_entropy", "")
    assert "unscaled, computed" in repr(stats.unscaled)
    assert "entropy" in repr(stats.unscaled)
    assert dir(stats) == sorted(lossmith.engine.statistics.stats.STATISTIC_NAMES)
    output = lossmith.CrossEntropyLoss().evaluate(logits, targets)
    assert "total=tensor(" in repr(output)
    assert "TokenStats([2, 5]" in repr(output)


def test_a_perplexity_shows_itself():
    perplexity = lossmith.Perplexity()
    assert repr(perplexity) == "Perplexity(nan over 0 tokens)"
    perplexity.update(torch.zeros(3, 10), torch.zeros(3, dtype=torch.long))
    assert repr(perplexity) == "Perplexity(10 over 3 tokens)"
