"""The scorer's modifiers against their formulas."""

import math

import pytest
import torch
from hypothesis import assume, given, strategies as st

import reference_modifiers as ref
from lossmith import (
    LossModifierPipeline,
    ModelMode,
    SequenceScorerCorrelationModifier,
    SequenceScorerVarianceModifier,
)
from ranks import on_two_ranks

SCORER = ModelMode.SEQUENCE_SCORER
numbers = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=8)


def factor_of(modifier, predictions, targets) -> float:
    return modifier.modify_loss(
        torch.as_tensor(predictions), torch.as_tensor(targets), torch.tensor(1.0, dtype=torch.float64)
    ).item()


# ── variance ──────────────────────────────────────────────────────────────────────────────────────


def test_the_factor_grows_from_one_and_saturates_at_the_scale():
    modifier = SequenceScorerVarianceModifier({"scale": 2.0, "alpha": 1.5})
    targets = torch.tensor([0.0, 1.0])
    spread_out = factor_of(modifier, [0.0, 1.0], targets)
    wider = factor_of(modifier, [-1.0, 2.0], targets)
    cramped = factor_of(modifier, [0.499, 0.501], targets)
    constant = factor_of(modifier, [0.5, 0.5], targets)
    ratio_two = factor_of(modifier, [0.5 - math.sqrt(1 / 8), 0.5 + math.sqrt(1 / 8)], targets)
    assert (spread_out, wider) == (1.0, 1.0)
    assert ratio_two == pytest.approx(1 + (1 - math.exp(-1.5)), rel=1e-6)
    assert cramped == pytest.approx(2.0)
    assert constant == pytest.approx(2.0)


@given(numbers, st.randoms(), st.floats(1, 5), st.floats(0, 4))
def test_variance_is_its_formula(values, random, scale, alpha):
    p = torch.tensor(values, dtype=torch.float64)
    t = torch.tensor([random.random() for _ in values], dtype=torch.float64)
    modifier = SequenceScorerVarianceModifier({"scale": scale, "alpha": alpha})
    assert factor_of(modifier, p, t) == pytest.approx(ref.variance_factor(p, t, scale, alpha))


def test_a_batch_of_one_stays_as_it_is():
    for modifier in (SequenceScorerVarianceModifier({}), SequenceScorerCorrelationModifier({})):
        assert factor_of(modifier, [0.3], [0.9]) == 1.0


def test_variance_metrics():
    modifier = SequenceScorerVarianceModifier({})
    p, t = torch.tensor([0.4, 0.6], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    loss = modifier.modify_loss(p, t, torch.tensor(0.16, dtype=torch.float64))
    factor = 1 + (1 - math.exp(-1.5 * 24))
    assert modifier.get_metrics() == pytest.approx(
        {
            "variance_pred": 0.01,
            "variance_target": 0.25,
            "ratio_y_over_x": 25.0,
            "factor_applied": factor,
            "alpha": 1.5,
            "scale_cap": 2.0,
            "original_loss": 0.16,
            "final_loss": loss.item(),
            "loss_ratio": factor,
        }
    )


# ── correlation ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mapping", ["quadratic", "geometric"])
@pytest.mark.parametrize("alpha", [1.0, 4.0, 9.0])
def test_the_anchors(alpha, mapping):
    """1, sqrt(alpha), alpha at c = 1, 0, -1."""
    modifier = SequenceScorerCorrelationModifier({"alpha": alpha, "mapping": mapping})
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert factor_of(modifier, t, t) == pytest.approx(1)
    assert factor_of(modifier, torch.tensor([0.2, 0.8, 0.2], dtype=torch.float64), t) == pytest.approx(
        math.sqrt(alpha)
    )
    assert factor_of(modifier, 1 - t, t) == pytest.approx(alpha)


@given(numbers, st.randoms(), st.floats(1, 9))
def test_correlation_is_its_formula(values, random, alpha):
    p = torch.tensor(values, dtype=torch.float64)
    t = torch.tensor([random.random() for _ in values], dtype=torch.float64)
    assume(min(p.std(), t.std()) > 1e-3)
    modifier = SequenceScorerCorrelationModifier({"alpha": alpha})
    assert factor_of(modifier, p, t) == pytest.approx(ref.correlation_factor(p, t, alpha), rel=1e-6)


@pytest.mark.parametrize("mapping", ["quadratic", "geometric"])
@given(c=st.floats(-1, 1), alpha=st.floats(1, 9))
def test_the_factor_is_between_one_and_alpha_and_falls_with_the_correlation(mapping, c, alpha):
    modifier = SequenceScorerCorrelationModifier({"alpha": alpha, "mapping": mapping})
    t = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    across = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)  # correlated with nothing of it

    def factor_at(c: float) -> float:
        return factor_of(modifier, c * t + math.sqrt(1 - c * c) * across, t)

    factor = factor_at(c)
    assert modifier.get_metrics()["correlation"] == pytest.approx(c, abs=1e-9)
    assert 1 - 1e-12 <= factor <= alpha + 1e-12
    assert factor_at(max(c - 0.1, -1)) >= factor - 1e-12


def test_constant_targets_have_nothing_to_rank():
    modifier = SequenceScorerCorrelationModifier({})
    assert factor_of(modifier, [0.1, 0.9], [0.5, 0.5]) == 1.0


def test_constant_predictions_are_uncorrelated():
    assert factor_of(SequenceScorerCorrelationModifier({}), [0.5, 0.5], [0.1, 0.9]) == 2.0


def test_above_nine_the_parabola_is_refused():
    with pytest.raises(ValueError, match=r"alpha=10 is above 9.*mapping='geometric'"):
        SequenceScorerCorrelationModifier({"alpha": 10.0})
    geometric = SequenceScorerCorrelationModifier({"alpha": 16.0, "mapping": "geometric"})
    assert factor_of(geometric, [0.9, 0.1], [0.1, 0.9]) == pytest.approx(16)


def test_correlation_metrics():
    modifier = SequenceScorerCorrelationModifier({"alpha": 4.0})
    p, t = torch.tensor([0.9, 0.1], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    modifier.modify_loss(p, t, torch.tensor(0.5, dtype=torch.float64))
    assert modifier.get_metrics() == pytest.approx(
        {
            "correlation": -1.0,
            "multiplier": 4.0,
            "alpha": 4.0,
            "A": 0.5,
            "B": -1.5,
            "C": 2.0,
            "original_loss": 0.5,
            "final_loss": 2.0,
            "loss_ratio": 4.0,
        }
    )


# ── together ──────────────────────────────────────────────────────────────────────────────────────


def test_without_a_loss_it_is_the_squared_error_with_its_gradient():
    p = torch.rand(5, dtype=torch.float64, requires_grad=True)
    t = torch.rand(5, dtype=torch.float64)
    pipeline = LossModifierPipeline(
        [SequenceScorerVarianceModifier({}), SequenceScorerCorrelationModifier({})]
    )
    loss = pipeline(p, t)
    factor = ref.variance_factor(p, t, 2.0, 1.5) * ref.correlation_factor(p.detach(), t, 4.0)
    torch.testing.assert_close(loss, factor * (p - t).square().mean())
    (gradient,) = torch.autograd.grad(loss, p)
    torch.testing.assert_close(gradient, factor * 2 * (p - t).detach() / 5)  # the factors are constants
    output = pipeline.evaluate(p.unsqueeze(-1), t)  # [B, 1], as classifiers of one label give it
    torch.testing.assert_close(output.total, loss)
    torch.testing.assert_close(sum(output.parts.values()), output.total)
    assert output.num_tokens == 5


def test_masked_sequences_do_not_count():
    p, t = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 0, 1])
    modifiers = [SequenceScorerVarianceModifier({}), SequenceScorerCorrelationModifier({})]
    pipeline = LossModifierPipeline(modifiers)
    kept = mask.bool()
    torch.testing.assert_close(pipeline(p, t, mask=mask), pipeline(p[kept], t[kept]))
    assert pipeline.count(t, mask=mask) == 4
    torch.testing.assert_close(
        pipeline(p, t, mask=mask, denominator=8), pipeline(p, t, mask=mask, reduction="sum") / 8
    )


def test_half_precision_predictions_are_judged_in_full():
    p = torch.tensor([0.5, 0.50390625], dtype=torch.bfloat16)
    loss = LossModifierPipeline([SequenceScorerVarianceModifier({})])(p, torch.tensor([0.0, 1.0]))
    assert loss.dtype == torch.float32
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        (torch.zeros(3), torch.zeros(2), "one prediction and one target a sequence"),
        (torch.zeros(0), torch.zeros(0), "at least one"),
        (torch.zeros(3, dtype=torch.long), torch.zeros(3), "must be floating point"),
    ],
)
def test_bad_scores(predictions, targets, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LossModifierPipeline([SequenceScorerVarianceModifier({})])(predictions, targets)


# ── over ranks ────────────────────────────────────────────────────────────────────────────────────


def losses_of(rank: int) -> dict[str, tuple]:
    p, t, logits, targets = global_case()
    half = slice(0, 2) if rank == 0 else slice(2, 6)
    losses = {}
    for scope in ("local", "global"):
        pipeline = scorers(scope)
        loss = pipeline.modify_loss(p[half], t[half], torch.tensor(1.0, dtype=torch.float64))
        entropy = entropy_of(scope).modify_loss(logits[half], targets[half], denominator=6)
        losses[scope] = (loss, entropy)
    return losses


def global_case():
    generator = torch.Generator().manual_seed(5)
    p, t = (torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(2))
    logits = 3 * torch.randn(6, 4, 7, generator=generator, dtype=torch.float64)
    return p, t, logits, torch.randint(7, (6, 4), generator=generator)


def scorers(scope: str) -> LossModifierPipeline:
    return LossModifierPipeline(
        [
            SequenceScorerVarianceModifier({"stats_scope": scope}),
            SequenceScorerCorrelationModifier({"stats_scope": scope}),
        ]
    )


def entropy_of(scope: str) -> LossModifierPipeline:
    from lossmith import EntropyModifier

    return LossModifierPipeline([EntropyModifier({"stats_scope": scope})])


def test_global_statistics_are_those_of_the_whole_batch(tmp_path):
    """Two ranks with 2 and 4 samples against one process with 6."""
    found = on_two_ranks(losses_of, tmp_path)
    p, t, logits, targets = global_case()
    factor = scorers("local").modify_loss(p, t, torch.tensor(1.0, dtype=torch.float64))
    for rank in range(2):
        torch.testing.assert_close(found[rank]["global"][0], factor)
    assert abs(found[0]["local"][0] - factor) > 1e-3
    whole = entropy_of("local").modify_loss(logits, targets)
    torch.testing.assert_close(found[0]["global"][1] + found[1]["global"][1], whole)
    assert abs(found[0]["local"][1] + found[1]["local"][1] - whole) > 1e-4


def factors_of_one_sample(rank: int) -> torch.Tensor:
    p, t, _, _ = global_case()
    half = slice(0, 1) if rank == 0 else slice(1, 6)
    return scorers("global").modify_loss(p[half], t[half], torch.tensor(1.0, dtype=torch.float64))


def test_a_rank_of_one_sample_has_the_statistics_of_all(tmp_path):
    """Alone it would have nothing to rank."""
    p, t, _, _ = global_case()
    factor = scorers("local").modify_loss(p, t, torch.tensor(1.0, dtype=torch.float64))
    for found in on_two_ranks(factors_of_one_sample, tmp_path):
        torch.testing.assert_close(found, factor)


def test_other_losses_of_sequences_and_scalars():
    p, t = torch.rand(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    pipeline = LossModifierPipeline([SequenceScorerVarianceModifier({})])
    factor = ref.variance_factor(p, t, 2.0, 1.5)
    errors = (p - t).abs()
    torch.testing.assert_close(pipeline.modify_loss(p, t, per_position_loss=errors), factor * errors.mean())
    extra = {"aux": torch.tensor(0.5, dtype=torch.float64)}
    output = pipeline.evaluate(p, t, scalars=extra, denominator=8)
    torch.testing.assert_close(output.total, factor * (p - t).square().sum() / 8 + 0.25)
    with pytest.raises(TypeError, match="token_weight"):
        pipeline.modify_loss(p, t, token_weight=p)
    whole_numbers = pipeline.modify_loss(p, torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(
        whole_numbers, pipeline.modify_loss(p, torch.tensor([0.0, 1.0, 1.0, 0.0])).double()
    )
