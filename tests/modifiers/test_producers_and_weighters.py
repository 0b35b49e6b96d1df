"""Target smoothing, mask ratio and the metrics collector against their formulas."""

import math

import pytest
import torch

import lossmith
import reference_modifiers as ref
from lossmith import (
    CrossEntropyLoss,
    LossModifierPipeline,
    MaskRatioWeightModifier,
    MetricsCollectorModifier,
    TargetSmoothingModifier,
)

IGNORE = -100


# ── target smoothing ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("special", [(), (0, 3)])
def test_smoothing_is_its_formula(special, batch):
    logits, targets = batch
    modifier = TargetSmoothingModifier({"factor": 0.2, "special_tokens": special})
    loss = modifier.modify_loss(logits, targets)
    expected = ref.token_mean(ref.smoothed(logits, targets, 0.2, special), ref.valid_of(targets))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


def test_smoothing_is_that_of_pytorch(batch):
    logits, targets = batch
    ours = TargetSmoothingModifier({"factor": 0.3}).modify_loss(logits, targets)
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.3)
    torch.testing.assert_close(ours, theirs)


def test_the_mode_that_spares_the_target(batch):
    """eps on the target's others: 1 - eps stays, as with eps (V - 1) / V spread over all."""
    logits, targets = batch
    ours = TargetSmoothingModifier({"factor": 0.1, "mode": "exclude_target"}).modify_loss(logits, targets)
    uniform = TargetSmoothingModifier({"factor": 0.1 * 9 / 8}).modify_loss(logits, targets)
    torch.testing.assert_close(ours, uniform)


def test_smoothing_keeps_the_class_weights_of_its_objective(batch):
    logits, targets = batch
    weight = torch.rand(9, dtype=torch.float64) + 0.1
    for mode in ("uniform", "exclude_target"):
        pipeline = LossModifierPipeline(
            [TargetSmoothingModifier({"factor": 0.1, "mode": mode})],
            base=CrossEntropyLoss(class_weight=weight),
        )
        expected = CrossEntropyLoss(class_weight=weight, label_smoothing=0.1, smoothing_mode=mode)
        torch.testing.assert_close(pipeline(logits, targets), expected(logits, targets))


def test_smoothing_goes_under_the_focal_weighting(batch):
    logits, targets = batch
    pipeline = LossModifierPipeline(
        [TargetSmoothingModifier({"factor": 0.1})], base=CrossEntropyLoss(focal_gamma=2.0, z_loss=0.1)
    )
    expected = CrossEntropyLoss(focal_gamma=2.0, z_loss=0.1, label_smoothing=0.1)(logits, targets)
    torch.testing.assert_close(pipeline(logits, targets), expected)


def test_padding_among_the_targets_is_left_out(batch):
    logits, targets = batch
    padded = targets.masked_fill(targets == IGNORE, 7)
    kept = padded != 7
    assert (kept.sum(-1) < 6).any()
    options = {"factor": 0.1, "padding_token": 7}
    loss = TargetSmoothingModifier(options).modify_loss(logits, padded)
    torch.testing.assert_close(loss, ref.token_mean(ref.smoothed(logits, padded, 0.1), kept))
    everything = TargetSmoothingModifier(options | {"exclude_padding": False}).modify_loss(logits, padded)
    torch.testing.assert_close(everything, ref.smoothed(logits, padded, 0.1).mean())


def test_padding_that_is_no_class_need_not_be_the_ignored_id():
    logits = torch.randn(1, 3, 5)
    targets = torch.tensor([[1, -100, 2]])
    loss = TargetSmoothingModifier({}).modify_loss(logits, targets, ignore_index=-1)
    kept = targets != -100
    torch.testing.assert_close(loss, ref.token_mean(ref.smoothed(logits, targets, 0.1), kept))


def test_smoothing_mixes_the_loss_that_it_finds(batch):
    """Somebody else's token loss keeps its share."""
    logits, targets = batch
    given = torch.rand(4, 6, dtype=torch.float64)
    loss = TargetSmoothingModifier({"factor": 0.1}).modify_loss(logits, targets, per_position_loss=given)
    mean = ref.neg_log_p(logits).mean(-1)
    torch.testing.assert_close(loss, ref.token_mean(0.9 * given + 0.1 * mean, ref.valid_of(targets)))


def test_smoothing_metrics(batch):
    logits, targets = batch
    modifier = TargetSmoothingModifier({"factor": 0.1})
    loss = modifier.modify_loss(logits, targets)
    metrics = modifier.get_metrics()
    plain = ref.token_mean(ref.token_loss(logits, targets), ref.valid_of(targets)).item()
    assert metrics == pytest.approx(
        {
            "original_loss": plain,
            "smoothed_loss": loss.item(),
            "loss_ratio": loss.item() / plain,
            "smoothing_factor": 0.1,
            "valid_positions": 14,
        }
    )


# ── mask ratio ────────────────────────────────────────────────────────────────────────────────────


def test_the_worked_example_of_mask_ratios():
    """ratios [.5, 1, .25] -> [1.41, 1, 2]; losses [1.5, 1.2, 2] -> 2.44."""
    targets = torch.tensor([[5, 10, -100, -100], [3, 4, 1, 2], [7, -100, -100, -100]])
    losses = torch.tensor([[1.5], [1.2], [2.0]], dtype=torch.float64).expand(3, 4)
    modifier = MaskRatioWeightModifier({})
    loss = modifier.modify_loss(torch.zeros(3, 4, 11, dtype=torch.float64), targets, per_position_loss=losses)
    exact = (math.sqrt(2) * 1.5 + 1.2 + 2 * 2.0) / 3
    assert loss.item() == pytest.approx(exact)
    assert round(loss.item(), 2) == 2.44
    assert modifier.get_metrics() == pytest.approx(
        {
            "mean_mask_ratio": 1.75 / 3,
            "min_mask_ratio": 0.25,
            "max_mask_ratio": 1.0,
            "mean_weight": (math.sqrt(2) + 3) / 3,
            "min_weight": 1.0,
            "max_weight": 2.0,
            "weight_std": torch.tensor([math.sqrt(2), 1, 2]).std(unbiased=False).item(),
        }
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"power": 1.0}, {"power": 2.0, "max_weight": 3.0}, {"power": 0.25, "min_weight": 1.1}, {"eps": 0.1}],
    ids=str,
)
def test_mask_ratio_is_its_formula(options, batch):
    logits, targets = batch
    mask = torch.rand(targets.shape) > 0.3
    mask[2] = False  # nothing of this row is left
    loss = MaskRatioWeightModifier(options).modify_loss(logits, targets, mask=mask)
    valid = ref.valid_of(targets, mask)
    names = {"power": "power", "min_weight": "low", "max_weight": "high", "eps": "eps"}
    weights = ref.mask_ratio_factor(valid, **{names[k]: v for k, v in options.items()})
    expected = ref.sequence_mean(ref.token_loss(logits, targets), valid, weights)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


@pytest.mark.filterwarnings("ignore:MaskRatioWeightModifier weighs all samples alike")
def test_the_last_position_of_unshifted_labels_is_no_masked_one(batch):
    """Shifting by hand and shift=True are the same."""
    logits, labels = batch
    labels = labels.clamp(min=0)
    shifted = LossModifierPipeline([MaskRatioWeightModifier({})], base=CrossEntropyLoss(shift=True))
    by_hand = MaskRatioWeightModifier({}).modify_loss(logits[:, :-1], labels[:, 1:])
    torch.testing.assert_close(shifted(logits, labels), by_hand)
    shifted.modify_loss(logits, labels)
    assert shifted.get_all_metrics()["MaskRatioWeightModifier.mean_mask_ratio"] == 1


def test_the_short_names_of_the_limits():
    settings = MaskRatioWeightModifier({"min": 0.5, "max": 5.0}).settings
    assert (settings.min_weight, settings.max_weight) == (0.5, 5.0)


# ── metrics collector ─────────────────────────────────────────────────────────────────────────────


def test_the_collector_watches_the_unmodified_model(batch):
    logits, targets = batch
    pipeline = LossModifierPipeline(
        [TargetSmoothingModifier({"factor": 0.5}), MetricsCollectorModifier({}), MaskRatioWeightModifier({})],
        base=CrossEntropyLoss(temperature=2.0),
    )
    pipeline.modify_loss(logits, targets)
    valid = ref.valid_of(targets)
    nll = ref.token_mean(ref.token_loss(logits, targets), valid).item()
    p = logits.detach().softmax(-1)
    prefix = "MetricsCollectorModifier."
    found = {k: v for k, v in pipeline.get_all_metrics().items() if k.startswith(prefix)}
    assert found == pytest.approx(
        {
            prefix + "nll": nll,
            prefix + "perplexity": math.exp(nll),
            prefix + "accuracy": ref.token_mean((logits.argmax(-1) == targets).double(), valid).item(),
            prefix + "entropy": ref.token_mean(-(p * p.log()).sum(-1), valid).item(),
            prefix + "num_tokens": 14,
        }
    )


def test_the_collector_alone_returns_the_loss_itself(batch):
    logits, targets = batch
    loss = torch.tensor(1.0)
    assert MetricsCollectorModifier({}).modify_loss(logits, targets, loss) is loss
    scores = torch.rand(4)
    assert MetricsCollectorModifier({}).modify_loss(scores, scores, loss) is loss


def test_the_collector_of_a_scorer_averages_over_batches():
    collector = MetricsCollectorModifier({"ema_decay": 0.5})
    pipeline = LossModifierPipeline([collector])
    targets = torch.tensor([0.5, 0.25])
    errors = (0.2, 0.4)
    for error in errors:
        pipeline.modify_loss(targets * (1 + error), targets, torch.tensor(0.0))
    metrics = pipeline.get_all_metrics()
    name = "MetricsCollectorModifier.mean_absolute_relative_error"
    assert metrics[name] == pytest.approx(0.4)
    assert metrics[f"{name}_ema"] == pytest.approx((0.2 * 0.25 + 0.4 * 0.5) / 0.75)
    assert metrics["MetricsCollectorModifier.mean_absolute_error"] == pytest.approx(0.4 * 0.375)
    saved = pipeline.state_dict()
    fresh = LossModifierPipeline([MetricsCollectorModifier({"ema_decay": 0.5})])
    fresh.load_state_dict(saved)
    fresh.modify_loss(targets, targets, torch.tensor(0.0))
    assert fresh.get_all_metrics()[f"{name}_ema"] == pytest.approx((0.2 * 0.125 + 0.4 * 0.25) / 0.875)
    pipeline.reset_all_metrics()
    assert pipeline.get_all_metrics() == {}
    pipeline.modify_loss(targets * 1.1, targets, torch.tensor(0.0))
    assert pipeline.get_all_metrics()[f"{name}_ema"] == pytest.approx(0.1, rel=1e-4)


def test_they_are_public():
    assert lossmith.ModelMode("token_classifier") is lossmith.ModelMode.TOKEN_CLASSIFIER
