"""UnifiedLoss: mistakes that were there once, and inputs that would have had no effect or a bad one."""

import pytest
import torch
from unified_case import IGNORE, B, D, E, T, V, inputs

from lossmith import (
    ComposedLoss,
    CrossEntropyLoss,
    ImmediateRepetition,
    LossModifierPipeline,
    NVAMPLoss,
    Objective,
    Term,
    UnifiedLoss,
    Weighted,
)


def test_a_mask_under_either_name_masks_the_targets():
    given = inputs()
    mask = torch.rand(B, T) > 0.4
    loss_fn = UnifiedLoss(V, use_moe_balancing=True, num_experts=E)
    logits, targets, gates = (given[name] for name in ("logits", "targets", "gate_logits"))
    called = loss_fn(logits, targets, mask, gate_logits=gates)
    for names in ({"mask": mask}, {"attention_mask": mask}, {"mask": mask, "attention_mask": mask}):
        torch.testing.assert_close(
            loss_fn.evaluate(logits, targets, gate_logits=gates, **names).total, called
        )
    every_token = loss_fn.evaluate(
        logits, targets, gate_logits=gates, mask=mask, attention_mask=torch.ones_like(mask)
    )
    torch.testing.assert_close(
        every_token.parts["cross_entropy"], CrossEntropyLoss()(logits, targets, mask=mask)
    )
    alone = loss_fn.evaluate(logits, targets, gate_logits=gates)
    torch.testing.assert_close(every_token.parts["moe_balance_loss"], alone.parts["moe_balance_loss"])


def test_parts_of_no_token_have_no_place_in_values_per_token():
    given = inputs()
    for flags in ({"use_moe_balancing": True, "num_experts": E}, {"use_mtp": True, "hidden_size": D}):
        loss_fn = UnifiedLoss(V, reduction="none", **flags).double()
        with pytest.raises(ValueError, match="belong to no token"):
            loss_fn(**given)


def test_a_composition_of_a_composition_checks_the_inner_one():
    given = inputs()
    inner = UnifiedLoss(V, use_moe_balancing=True, num_experts=E)
    outer = ComposedLoss(inner, {"again": ImmediateRepetition()})
    with pytest.raises(ValueError, match="needs gate_logits"):
        outer(given["logits"], given["targets"])
    assert outer(given["logits"], given["targets"], gate_logits=given["gate_logits"]).isfinite()


def test_confidence_scores_that_are_none():
    given = inputs()
    with pytest.raises(ValueError, match=r"confidence_scores must be in \[0, 1\]"):
        UnifiedLoss(V, primary_loss_type="adaptive_mtp")(
            given["logits"], given["targets"], confidence_scores=given["confidence_scores"] * 3
        )


def test_hidden_states_of_padding_go_nowhere():
    given = inputs()
    targets = given["targets"].clone()
    targets[1, 10:] = IGNORE
    hidden = given["hidden_states"].detach().clone()
    hidden[1, 10:] = torch.nan
    hidden.requires_grad_()
    loss_fn = UnifiedLoss(V, D, use_mtp=True).double()
    loss_fn(given["logits"], targets, hidden_states=hidden).backward()
    assert hidden.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in loss_fn.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos_token_id": [1, 2]}, r"eos_token_id must be a whole number .* got \[1, 2\]"),
        ({"use_focal_loss": True, "focal_mode": "replace", "focal_alpha": 0.5}, "Leave it out"),
        (
            {"use_ngram_penalty": True, "ngram_penalty_weight": float("nan")},
            "ngram_penalty_weight must be a finite number",
        ),
    ],
)
def test_options_that_would_have_no_effect_or_a_bad_one(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        UnifiedLoss(V, **options)


def test_the_states_of_all_layers_are_not_one_tensor():
    given = inputs()
    hidden = given["hidden_states"]
    with pytest.raises(ValueError, match=r"hidden_states\[-1\]"):
        UnifiedLoss(V, D, use_mtp=True).double()(given["logits"], given["targets"], hidden_states=(hidden,))


def test_several_routers_with_a_bias_each():
    given = inputs()
    flags = {"use_moe_balancing": True, "num_experts": E, "moe_balance_mode": "bias", "moe_num_layers": 2}
    loss_fn = UnifiedLoss(V, **flags)
    loss_fn(given["logits"], given["targets"], gate_logits=[given["gate_logits"]] * 2).backward()
    loss_fn.on_optimizer_step()
    assert loss_fn.components["moe_balance_loss"].component.expert_bias.any()


def test_a_pipeline_hands_the_mask_to_the_components_whichever_way_it_is_called():
    given = inputs()
    mask = torch.rand(B, T) > 0.4
    logits, targets, gates = (given[name] for name in ("logits", "targets", "gate_logits"))
    loss_fn = UnifiedLoss(V, use_moe_balancing=True, num_experts=E)
    pipeline = LossModifierPipeline(base=loss_fn)
    expected = loss_fn(logits, targets, mask, gate_logits=gates)
    for name in ("mask", "attention_mask"):
        modified = pipeline.modify_loss(logits, targets, gate_logits=gates, **{name: mask})
        torch.testing.assert_close(modified, expected)
        torch.testing.assert_close(pipeline(logits, targets, gate_logits=gates, **{name: mask}), expected)


@pytest.mark.parametrize(
    ("flags", "leave_out", "message"),
    [
        ({"use_mtp": True, "hidden_size": D}, "hidden_states", "needs hidden_states"),
        ({"use_mtp": True}, None, "hidden_size=D when the loss is made"),
        (
            {"use_moe_balancing": True, "num_experts": E},
            "gate_logits",
            "'moe_balance_loss'.*needs gate_logits",
        ),
        ({"use_diversity_loss": True}, "expert_outputs", "'diversity_loss'.*needs expert_outputs"),
        ({"use_contrastive_loss": True}, "contrastive", "contrastive_pairs"),
    ],
)
def test_a_component_without_its_input_says_so(flags, leave_out, message):
    given = inputs()
    for name in ("contrastive_pairs", "hidden_states") if leave_out == "contrastive" else (leave_out,):
        given.pop(name, None)
    with pytest.raises(ValueError, match=message):
        UnifiedLoss(V, **flags).double()(**given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"primary_loss_type": "deepsek"}, "primary_loss_type must be one of 'standard', 'deepseek'"),
        ({"mtp_type": "other"}, "mtp_type"),
        ({"use_ngram_penality": True}, "Did you mean 'use_ngram_penalty'"),
        ({"primary_loss_type": "standard", "adaptive_temperature": True}, "belongs to primary_loss_type"),
        ({"use_moe_balancing": True}, "needs num_experts"),
        ({"use_ngram_penalty": True, "ngram_window_size": 2}, "ngram_size"),
        ({"adaptive_temperature": True, "temperature_bounds": (2, 3)}, "bounds"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        UnifiedLoss(V, **options)


def test_an_unknown_input():
    given = inputs()
    with pytest.raises(TypeError, match="Did you mean 'hidden_states'"):
        UnifiedLoss(V)(given["logits"], given["targets"], hidden_state=given["hidden_states"])


@pytest.mark.parametrize(
    "criterion",
    [UnifiedLoss(V), CrossEntropyLoss(), NVAMPLoss(), LossModifierPipeline()],
    ids=lambda criterion: type(criterion).__name__,
)
@pytest.mark.parametrize(
    ("theirs", "ours"), [("labels", "targets"), ("target", "targets"), ("input", "logits")]
)
def test_the_names_that_others_have_are_understood(criterion, theirs, ours):
    given = inputs()
    call = {"logits": given["logits"], "targets": given["targets"]}
    call[theirs] = call.pop(ours)
    with pytest.raises(TypeError, match=rf"\b{theirs}\b.*\b{ours}\b|\b{ours}\b.*\b{theirs}\b"):
        criterion(**call)


def test_a_bare_term_has_its_place_named():
    term = Term("margin", lambda stats, batch: stats.nll)
    message = r"component must be a Component; got Term.*Objective\(\[\.\.\.\]\).*whose term\(\) returns it"
    with pytest.raises(TypeError, match=message):
        ComposedLoss(CrossEntropyLoss(), {"margin": term})
    with pytest.raises(TypeError, match=message):
        Weighted(term, 0.5)
    with pytest.raises(TypeError, match=r"primary must be an Objective; got Term.*Objective\(\[\.\.\.\]\)"):
        ComposedLoss(term)


def test_components_have_names():
    with pytest.raises(TypeError, match="components must be a mapping or None; got "):
        ComposedLoss(CrossEntropyLoss(), [ImmediateRepetition()])
    with pytest.raises(TypeError, match=r"primary must be an Objective; got ImmediateRepetition"):
        ComposedLoss(ImmediateRepetition())
    assert ComposedLoss(Objective([]), {}).components is not None
