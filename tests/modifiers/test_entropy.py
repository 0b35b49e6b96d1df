"""The entropy modifier against its formula."""

import logging
import math
import types

import pytest
import torch
from hypothesis import given, strategies as st

import reference_modifiers as ref
from lossmith import EntropyModifier, LossModifierPipeline
from lossmith.equation.batch import align
from lossmith.modifiers.tokens.entropy import EntropyReport, irregularities

IGNORE = -100


def test_the_entropy_of_the_worked_example():
    """logits [2, 1, 4, .5], target 2: H = .906, H_norm = .825."""
    modifier = EntropyModifier({})
    modifier.modify_loss(torch.tensor([[[2.0, 1.0, 4.0, 0.5]]]), torch.tensor([[2]]))
    assert modifier.get_metrics()["mean_entropy"] == pytest.approx(0.825, abs=5e-4)


def logits_of_entropy(entropies: list[float], num_classes: int = 5) -> torch.Tensor:
    """[B, 1, V] logits whose wrong answers to target 0 have these normalised entropies."""
    rows = []
    for wanted in entropies:
        low, high = 0.0, 15.0  # by bisection, over how far one wrong answer stands out
        for _ in range(200):
            gap = (low + high) / 2
            wrong = torch.zeros(num_classes - 1, dtype=torch.float64)
            wrong[0] = gap
            q = wrong.softmax(0)
            entropy = -(q * q.log()).sum().item() / math.log(num_classes - 1)
            low, high = (gap, high) if entropy > wanted else (low, gap)
        rows.append(torch.cat([torch.zeros(1, dtype=torch.float64), wrong]))
    return torch.stack(rows).unsqueeze(1)


def test_the_weights_of_the_worked_example():
    """H = [.2, .6, 1, .4], threshold .5 -> weights [1.2, 1.0, .6, 1.2]."""
    logits = logits_of_entropy([0.2, 0.6, 1.0, 0.4])
    losses = torch.tensor([[1.0], [0.0], [0.0], [0.0]], dtype=torch.float64)
    targets = torch.zeros(4, 1, dtype=torch.long)
    modifier = EntropyModifier({"threshold": 0.5})
    weights = [
        4 * modifier.modify_loss(logits, targets, per_position_loss=losses.roll(b, 0)).item()
        for b in range(4)
    ]
    assert weights == pytest.approx([1.2, 1.0, 0.6, 1.2], abs=1e-6)


OPTIONS = [
    {},
    {"weight": 0.4, "threshold": 0.3},
    {"weight": 3.0},  # some weights would be negative
    {"max_weight": 1.2},
    {"direction": "uniform", "weight": 1.5},
    {"eps": 0.5},
    {"eps": 0.5, "threshold": 0.6},  # on top of the threshold
    {"eps": 0.5, "threshold": 0.6, "direction": "uniform"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_and_gradient_are_those_of_the_formula(options, batch):
    logits, targets = batch
    mask = torch.rand(targets.shape) > 0.2
    loss = EntropyModifier(options).modify_loss(logits, targets, mask=mask)
    weights = ref.entropy_factor(logits, targets, mask, **options)
    expected = ref.sequence_mean(ref.token_loss(logits, targets), ref.valid_of(targets, mask), weights)
    torch.testing.assert_close(loss, expected)
    upstream = torch.tensor(1.7, dtype=torch.float64)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, logits, upstream)[0] for value in (loss, expected))
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 4), st.floats(0, 1))
def test_weights_average_one_and_are_never_negative(entropies, weight, threshold):
    modifier = EntropyModifier({"weight": weight, "threshold": threshold})
    entropy = torch.tensor(entropies, dtype=torch.float64)
    counts = torch.ones(len(entropies), dtype=torch.bool)
    weights, _ = modifier._weights(entropy, counts)
    assert (weights >= 0).all()
    assert weights.mean().item() == pytest.approx(1)
    expected = ref.entropy_weights(entropy, counts, weight=weight, threshold=threshold)
    torch.testing.assert_close(weights, expected)


def test_concentrated_wrong_answers_weigh_more_and_uniform_turns_it_round():
    logits = logits_of_entropy([0.2, 0.9])
    targets = torch.zeros(2, 1, dtype=torch.long)
    first = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    for direction, is_larger in (("concentrated", True), ("uniform", False)):
        modifier = EntropyModifier({"direction": direction})
        assert (modifier.modify_loss(logits, targets, per_position_loss=first).item() > 0.5) == is_larger


def test_a_confident_row_does_not_take_the_whole_batch():
    """At threshold 0 its raw weight would be 1e8."""
    logits = torch.zeros(3, 1, 5)
    logits[0, 0, 1] = (
        60.0  # one wrong answer holds all: entropy 0, and so few wrong answers that it is left out
    )
    logits[1, 0, 1] = 12.0
    modifier = EntropyModifier({})
    modifier.modify_loss(logits, torch.zeros(3, 1, dtype=torch.long))
    assert modifier.get_metrics()["weight_max"] <= 2 * 10 / 11 + 1e-6


@pytest.mark.filterwarnings("ignore:EntropyModifier has no effect")
@pytest.mark.parametrize("num_classes", [2, 3])
def test_without_wrong_answers_to_speak_of_the_weights_are_one(num_classes):
    logits = torch.zeros(2, 3, num_classes)
    logits[..., 1] = 40.0 if num_classes == 3 else 0.0
    targets = torch.zeros(2, 3, dtype=torch.long)
    modifier = EntropyModifier({})
    loss = modifier.modify_loss(logits, targets)
    metrics = modifier.get_metrics()
    assert metrics["loss_fallback"] == 1
    assert (metrics["weight_min"], metrics["weight_max"]) == (1, 1)
    torch.testing.assert_close(loss, ref.token_loss(logits, targets).mean())


def test_every_metric_is_what_its_name_says(batch):
    logits, targets = batch
    modifier = EntropyModifier({"threshold": 0.2})
    loss = modifier.modify_loss(logits, targets)
    entropy, is_defined = ref.wrong_entropy(logits, targets)
    positions = entropy[is_defined & ref.valid_of(targets)]
    valid = ref.valid_of(targets)
    samples = torch.stack([entropy[b][valid[b]].mean() for b in range(4)])
    weights = ref.entropy_factor(logits, targets, threshold=0.2)
    original = ref.sequence_mean(ref.token_loss(logits, targets), valid)
    expected = {
        "mean_entropy": positions.mean(),
        "per_position_mean_entropy": positions.mean(),
        "per_position_max_entropy": positions.max(),
        "per_position_min_entropy": positions.min(),
        "per_position_entropy_std": positions.std(unbiased=False),
        "sample_mean_entropy": samples.mean(),
        "sample_max_entropy": samples.max(),
        "sample_min_entropy": samples.min(),
        "sample_entropy_std": samples.std(unbiased=False),
        "weight_mean": 1.0,
        "weight_max": weights.max(),
        "weight_min": weights.min(),
        "weight_std": weights.std(unbiased=False),
        "weight_sum": 4.0,
        "batch_size": 4.0,
        "loss_fallback": 0.0,
        "original_loss": original.detach(),
        "final_loss": loss.detach(),
        "loss_ratio": (loss / original).detach(),
    }
    metrics = modifier.get_metrics()
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value)), name


def test_metrics_only_leaves_the_loss_as_it_is(batch):
    logits, targets = batch
    pipeline = LossModifierPipeline([EntropyModifier({"use_for_weighting": False})])
    loss = torch.tensor(3.0, requires_grad=True)
    assert pipeline.modify_loss(logits, targets, loss) is loss
    metrics = pipeline.get_all_metrics()
    assert metrics["EntropyModifier.weight_max"] > 1  # what it would do
    assert metrics["EntropyModifier.loss_ratio"] == 1
    assert pipeline.evaluate(logits, targets).total == LossModifierPipeline().evaluate(logits, targets).total


def test_a_temperature_of_the_loss_is_none_of_the_weights(batch):
    from lossmith import CrossEntropyLoss

    logits, targets = batch
    hot = LossModifierPipeline([EntropyModifier({})], base=CrossEntropyLoss(temperature=3.0))
    loss = hot.modify_loss(logits, targets)
    weights = ref.entropy_factor(logits, targets)
    expected = ref.sequence_mean(ref.token_loss(logits / 3, targets), ref.valid_of(targets), weights)
    torch.testing.assert_close(loss, expected)


def test_broken_logits_show_in_the_loss_and_leave_the_weights_finite():
    logits = torch.randn(2, 2, 5)
    logits[0, 0] = torch.nan
    modifier = EntropyModifier({})
    assert modifier.modify_loss(logits, torch.ones(2, 2, dtype=torch.long)).isnan()
    assert math.isfinite(modifier.get_metrics()["weight_max"])


# ── verbose ───────────────────────────────────────────────────────────────────────────────────────


def verbose_text(caplog: pytest.LogCaptureFixture, logits: torch.Tensor, targets: torch.Tensor) -> str:
    with caplog.at_level(logging.INFO, logger="lossmith.modifiers.entropy"):
        EntropyModifier({"verbose": True}).modify_loss(logits, targets)
    return caplog.text


def test_verbose_reports_every_irregularity(caplog):
    logits = torch.zeros(3, 2, 6)
    logits[0, 0, 0] = 200.0  # certain
    logits[0, 1, 1] = 100.0  # one wrong answer only
    logits[1, 0, 1:] = torch.tensor([14.0, 0, 0, 0, 0])  # entropy near 0: an extreme weight
    logits[1, 1, 1:] = torch.tensor([14.0, 0, 0, 0, 0])
    logits[2, 1] = torch.nan
    text = verbose_text(caplog, logits, torch.zeros(3, 2, dtype=torch.long))
    assert "positions with no wrong answer probability: 1" in text
    assert "positions with at most 1 wrong token, left out: 1" in text
    assert "entropies not finite, left out: 1" in text
    assert "extreme weights, limited to max_weight: 1" in text
    assert "sample weights" in text
    assert "ratio" in text
    assert "metrics not finite" in text


def test_verbose_says_nothing_of_what_did_not_happen(caplog):
    text = verbose_text(caplog, torch.randn(2, 3, 6), torch.zeros(2, 3, dtype=torch.long))
    assert "sample weights" in text
    for absent in ("no wrong answer", "at most 1", "not finite", "extreme", "outside"):
        assert absent not in text


def test_verbose_reports_entropies_that_had_to_be_clamped():
    """Beyond what rounding explains, below 0 and above the largest."""
    targets = torch.zeros(1, 5, dtype=torch.long)
    entropy = math.log(5) * torch.tensor([0.5, -0.01, 1.01, 1 + 1e-8, 1.01], dtype=torch.float64)
    stats = types.SimpleNamespace(
        wrong_entropy=entropy,
        num_wrong=torch.tensor([5, 5, 5, 5, 1]),  # of one wrong answer there is no entropy
        target_prob=torch.full((5,), 0.5, dtype=torch.float64),
    )
    metrics = {"original_loss": 1.0, "final_loss": 2.0, "loss_ratio": 2.0}
    metrics |= {"weight_min": 0.5, "weight_max": 1.5}
    text = str(EntropyReport(irregularities(stats, align(targets)), metrics))  # pyright: ignore
    assert "entropies outside [0, 1], clamped: 2" in text
    assert "positions with at most 1 wrong token, left out: 1" in text
    assert "sample weights from 0.5 to 1.5; loss 1 -> 2 (ratio 2)" in text


def test_the_old_name_of_verbose():
    assert EntropyModifier({"debug": True}).settings.verbose
    assert EntropyModifier({"debug": True, "verbose": True}).settings.verbose  # they agree
