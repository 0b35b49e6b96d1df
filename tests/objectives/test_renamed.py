"""The classes from before UnifiedLoss take and return what they used to."""

import pytest
import torch
from unified_case import B, D, E, T, V, inputs

import lossmith
from lossmith import CrossEntropyLoss, UnifiedLoss

pytestmark = pytest.mark.filterwarnings("ignore:.* is UnifiedLoss:DeprecationWarning")


def test_deepseek_loss_takes_its_arguments_in_their_order_and_returns_a_dict():
    given = inputs()
    loss_fn = lossmith.DeepSeekLoss(V, D, E).double()
    mask = torch.rand(B, T) > 0.3
    losses = loss_fn(
        given["logits"],
        given["targets"],
        given["hidden_states"],
        mask,
        given["gate_logits"].reshape(-1, E),
        given["gate_logits"].reshape(-1, E).topk(2).indices,
    )
    assert {"main_loss", "mtp_mtp_loss", "moe_balancing_term", "total_loss"} <= set(losses)
    assert losses["moe_expert_counts"].sum() == 2 * mask.sum()
    assert losses["main_temperature"] == 1.0
    parts = losses["main_loss"] + losses["mtp_mtp_loss"] + losses["moe_balancing_term"]
    torch.testing.assert_close(losses["total_loss"], parts)
    main = CrossEntropyLoss()(given["logits"], given["targets"], mask=mask)
    torch.testing.assert_close(losses["main_loss"], main)
    losses["total_loss"].backward()
    assert all(parameter.grad.any() for parameter in loss_fn.parameters())


def test_deepseek_loss_reads_what_a_batch_comes_with():
    given = inputs()
    logits, targets = given["logits"], given["targets"]
    loss_fn = lossmith.DeepSeekLoss(V, D, E).double()
    assert loss_fn.use_mtp
    assert loss_fn.use_moe_balancing
    losses = loss_fn(logits, targets)
    assert set(losses) == {"main_loss", "main_temperature", "total_loss"}
    assert torch.equal(losses["total_loss"], UnifiedLoss(V, D)(logits, targets))
    assert "mtp_mtp_loss" in loss_fn(logits, targets, given["hidden_states"])
    losses = loss_fn(logits, targets, gate_logits=given["gate_logits"])
    assert "mtp_mtp_loss" not in losses
    assert losses["moe_balancing_term"] > 0
    assert loss_fn.get_loss_statistics()["moe_balance_loss/max_violation"] > 0
    plain = lossmith.DeepSeekLoss(V, D, use_mtp=False)
    assert not list(plain.parameters())


def test_deepseek_loss_refuses_a_mask_where_it_takes_hidden_states():
    given = inputs()
    with pytest.raises(TypeError, match=r"\(logits, targets, hidden_states, attention_mask\).*by name"):
        lossmith.DeepSeekLoss(V, D)(given["logits"], given["targets"], torch.ones(B, T))


def test_adaptive_mtp_loss_takes_primary_logits_and_as_many_heads_as_there_are():
    given = inputs()
    loss_fn = lossmith.AdaptiveMTPLoss(vocab_size=V, additional_loss_base_weight=0.3)
    heads = [given["logits"].detach() * k for k in (0.5, 2.0)]
    found = loss_fn(
        primary_logits=given["logits"],
        targets=given["targets"],
        additional_logits=heads,
        confidence_scores=given["confidence_scores"],
        attention_mask=torch.ones(B, T),
        mtp_active=True,
    )
    assert set(found) == {
        "loss",
        "primary_loss",
        "additional_loss",
        "confidence_reg",
        "avg_confidence",
        "effective_mtp_weight",
        "mtp_active",
    }
    new = UnifiedLoss(V, primary_loss_type="adaptive_mtp", use_mtp=True, num_future_tokens=2, mtp_weight=0.3)(
        given["logits"],
        given["targets"],
        additional_logits=heads,
        confidence_scores=given["confidence_scores"],
        return_detailed=True,
    )
    torch.testing.assert_close(found["loss"], new["total_loss"])
    torch.testing.assert_close(found["additional_loss"], new["mtp_loss"])
    torch.testing.assert_close(found["primary_loss"], new["main_loss"])
    torch.testing.assert_close(found["confidence_reg"], new["confidence_loss"])
    torch.testing.assert_close(found["avg_confidence"], given["confidence_scores"].mean())
    assert found["mtp_active"] is True
    assert loss_fn.get_loss_statistics()["mtp_loss"] == pytest.approx(new["mtp_loss"].item())


def test_adaptive_mtp_loss_without_its_heads():
    given = inputs()
    loss_fn = lossmith.AdaptiveMTPLoss(V)
    inactive = loss_fn(given["logits"], given["targets"], [given["logits"]] * 3)
    assert inactive["additional_loss"] == 0
    assert inactive["mtp_active"] is False
    new = UnifiedLoss(V, primary_loss_type="adaptive_mtp")(given["logits"], given["targets"])
    torch.testing.assert_close(inactive["loss"], new)
    evaluated = loss_fn.evaluate(given["logits"], given["targets"], additional_logits=[given["logits"]])
    assert "mtp_loss" in evaluated.parts


def test_adaptive_mtp_loss_options():
    quiet = lossmith.AdaptiveMTPLoss(V, confidence_reg_strength=0.0, use_confidence_weighting=False)
    given = inputs()
    found = quiet(
        given["logits"],
        given["targets"],
        [given["logits"]] * 2,
        confidence_scores=given["confidence_scores"],
        mtp_active=True,
    )
    assert found["confidence_reg"] == 0
    assert not quiet.components["mtp_loss"].component.component.adaptive
    with pytest.raises(ValueError, match=r"primary_loss_weight=2.*additional_loss_base_weight"):
        lossmith.AdaptiveMTPLoss(V, primary_loss_weight=2.0)


def test_anti_repetition_loss_returns_a_pair():
    given = inputs()
    loss_fn = lossmith.AntiRepetitionLoss(V, 2, 0, repetition_penalty_weight=0.3, ngram_size=2)
    loss, nothing = loss_fn(given["logits"], given["targets"], torch.ones(B, T).long())
    assert nothing is None
    again, components = loss_fn(logits=given["logits"], labels=given["targets"], return_components=True)
    assert torch.equal(loss, again)
    assert set(components) == {
        "base_loss",
        "repetition_penalty",
        "immediate_repetition_penalty",
        "eos_penalty",
        "diversity_bonus",
        "total_loss",
    }
    assert not any(value.requires_grad for value in components.values())
    torch.testing.assert_close(
        sum(value for name, value in components.items() if name != "total_loss"), components["total_loss"]
    )
    assert loss_fn.components["ngram_penalty"].weight == 0.3
    assert loss_fn.components["ngram_penalty"].component.ngram_size == 2
    with pytest.raises(ValueError, match=r"diversity_bonus_weight.*no gradient"):
        lossmith.AntiRepetitionLoss(V, 2, 0, diversity_bonus_weight=0.05)


def test_they_are_objectives_like_any_other():
    given = inputs()
    for loss_fn in (lossmith.DeepSeekLoss(V, use_mtp=False), lossmith.AntiRepetitionLoss(V, 2, 0)):
        pipeline = lossmith.LossModifierPipeline([lossmith.MaskRatioWeightModifier({})], base=loss_fn)
        assert pipeline(given["logits"], given["targets"]).isfinite()
