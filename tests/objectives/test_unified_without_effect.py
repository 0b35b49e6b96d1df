"""UnifiedLoss says once which options and inputs have no effect, and what would give them one."""

import inspect
import warnings

import pytest
import torch
from unified_case import D, E, V, inputs

from lossmith import (
    CrossEntropyLoss,
    LossModifierPipeline,
    Objective,
    UnifiedLoss,
    create_unified_loss,
    cross_entropy,
)
from lossmith.objectives.unified_parts import SWITCHES

DEFAULTS = {name: p.default for name, p in inspect.signature(UnifiedLoss).parameters.items()}


def said(make) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make()
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ngram_penalty_weight": 0.2, "immediate_repetition_weight": 1.0},
            "ngram_penalty_weight has no effect without use_ngram_penalty; "
            "immediate_repetition_weight has no effect without use_immediate_repetition_penalty",
        ),
        (
            {"eos_penalty_weight": 0.1, "min_sequence_length": 50},
            "min_sequence_length and eos_penalty_weight have no effect without eos_token_id",
        ),
        ({"temperature_bounds": (0.7, 1.5)}, "temperature_bounds has no effect without adaptive_temperature"),
        ({"mtp_type": "adaptive"}, "mtp_type has no effect without use_mtp"),
        (
            {"adaptive_threshold": 0.5},
            "adaptive_threshold has no effect without primary_loss_type='adaptive_mtp' or "
            "mtp_type='adaptive'",
        ),
        (
            {"use_mtp": True, "adaptive_weight_range": [0.1, 2.0]},
            "adaptive_weight_range has no effect without primary_loss_type='adaptive_mtp' or "
            "mtp_type='adaptive'",
        ),
        (
            {"target_expert_usage": [0.5, 0.5]},
            "target_expert_usage has no effect without use_moe_balancing",
        ),
        (
            {
                "use_moe_balancing": True,
                "num_experts": 2,
                "moe_balance_mode": "bias",
                "gradient_balance_weight": 0.5,
            },
            "gradient_balance_weight has no effect without moe_balance_mode='loss'",
        ),
        ({"focal_gamma": 3.0}, "focal_gamma has no effect without use_focal_loss"),
        (
            {"use_focal_loss": True, "focal_mode": "replace", "focal_weight": 0.5},
            "focal_weight has no effect without focal_mode='add'",
        ),
        ({"contrastive_margin": 0.1}, "contrastive_margin has no effect without use_contrastive_loss"),
        ({"auxiliary_weight": 0.2}, "auxiliary_weight has no effect without use_auxiliary_loss"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_options_of_what_is_off_are_said_in_one_sentence(options, message):
    assert said(lambda: UnifiedLoss(V, **options)) == [message]
    assert said(lambda: create_unified_loss({"vocab_size": V, **options})) == [message]


def test_the_warning_points_at_the_callers_line():
    with pytest.warns(UserWarning, match="no effect") as found:
        UnifiedLoss(V, diversity_weight=1.0)
    assert found[0].filename == __file__


def test_what_is_at_its_default_or_on_is_not_said():
    every = {name: value for name, value in DEFAULTS.items() if name != "vocab_size"}
    assert said(lambda: UnifiedLoss(V, **every)) == []
    assert said(lambda: UnifiedLoss(V, adaptive_weight_range=[0.5, 1.5])) == []
    # what the model has is no wish
    assert said(lambda: UnifiedLoss(V, D, num_experts=E, moe_top_k=2, moe_num_layers=3, pad_token_id=0)) == []
    for switch, options in (
        ({"use_ngram_penalty": True}, {"ngram_size": 3, "ngram_penalty_weight": 0.2, "ngram_window_size": 9}),
        ({"eos_token_id": 0}, {"min_sequence_length": 9, "eos_penalty_weight": 0.1}),
        ({"use_mtp": True, "mtp_type": "adaptive"}, {"adaptive_threshold": 0.5, "mtp_weight": 0.2}),
        ({"primary_loss_type": "adaptive_mtp"}, {"adaptive_threshold": 0.5}),
        ({"use_focal_loss": True, "focal_mode": "replace"}, {"focal_gamma": 1.0}),
        ({"adaptive_temperature": True}, {"temperature_bounds": (0.9, 1.1)}),
    ):
        assert said(lambda options={**switch, **options}: UnifiedLoss(V, **options)) == []


def test_every_option_of_a_switch_is_an_option():
    for switch in SWITCHES:
        assert set(switch.options) <= set(DEFAULTS), switch


# ── inputs ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["hidden_states", "additional_logits"])
def test_confidence_weights_alone_do_not_read_the_heads(name):
    given = inputs()
    heads = {"hidden_states": given["hidden_states"], "additional_logits": [given["logits"]] * 3}
    loss_fn = UnifiedLoss(V, D, primary_loss_type="adaptive_mtp")
    with pytest.warns(UserWarning, match=rf"does not read {name}; .* use_mtp=True") as found:
        loss_fn(given["logits"], given["targets"], **{name: heads[name]})
    assert len(found) == 1
    loss_fn(given["logits"], given["targets"], **{name: heads[name]})  # an error here if it warned again
    pipeline = LossModifierPipeline(base=UnifiedLoss(V, D, primary_loss_type="adaptive_mtp"))
    with pytest.warns(UserWarning, match="use_mtp=True"):
        pipeline(given["logits"], given["targets"], **{name: heads[name]})


def test_hidden_states_that_are_read_are_not_said():
    given = inputs()
    logits, targets, hidden = (given[name] for name in ("logits", "targets", "hidden_states"))
    adaptive = {"primary_loss_type": "adaptive_mtp"}
    head = torch.randn(V, D, dtype=torch.float64)
    UnifiedLoss(V, **adaptive)(None, targets, hidden_states=hidden, lm_head_weight=head)
    UnifiedLoss(V, D, use_mtp=True, **adaptive).double()(logits, targets, hidden_states=hidden)
    UnifiedLoss(V, use_contrastive_loss=True, **adaptive)(logits, targets, hidden_states=hidden)
    UnifiedLoss(V)(logits, targets, hidden_states=hidden)  # nothing was promised


# ── attributes ────────────────────────────────────────────────────────────────────────────────────


def test_the_switches_can_be_read_and_not_set():
    switches = [name for name in DEFAULTS if name.startswith("use_")]
    assert len(switches) == 8
    loss_fn = UnifiedLoss(V, D, use_mtp=True, use_ngram_penalty=True)
    for name in switches:
        assert getattr(loss_fn, name) is (name in ("use_mtp", "use_ngram_penalty")), name
        with pytest.raises(AttributeError):
            setattr(loss_fn, name, True)
    assert (loss_fn.vocab_size, loss_fn.primary_loss_type) == (V, "deepseek")


# ── another vocabulary ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("vocab_size", [V - 1, V + 3])
def test_predictions_over_another_vocabulary_are_refused(vocab_size):
    given = inputs()
    loss_fn = UnifiedLoss(vocab_size)
    message = rf"expected logits of V = vocab_size = {vocab_size} classes; got {V}. .*vocab_size={V}"
    with pytest.raises(ValueError, match=message):
        loss_fn(given["logits"], given["targets"])
    with pytest.raises(ValueError, match=message):
        LossModifierPipeline(base=loss_fn)(given["logits"], given["targets"])
    head = {"hidden_states": given["hidden_states"], "lm_head_weight": torch.randn(V, D, dtype=torch.float64)}
    with pytest.raises(ValueError, match=message):
        loss_fn(targets=given["targets"], **head)
    with pytest.raises(ValueError, match=message):
        loss_fn.plan(targets=given["targets"], **head)


# ── an objective of nothing ───────────────────────────────────────────────────────────────────────


def test_an_objective_without_terms_says_so_where_it_is_shown():
    assert repr(Objective([])) == "Objective(no terms: the loss is 0)"
    off = Objective([*CrossEntropyLoss().terms()[1:]])
    assert repr(off) == "Objective(no terms: the loss is 0)"  # their coefficients are 0
    assert "no terms" not in repr(Objective(CrossEntropyLoss().terms()))
    assert "no terms" not in repr(UnifiedLoss(V))


@pytest.mark.parametrize("thing", [UnifiedLoss, CrossEntropyLoss, cross_entropy])
def test_the_first_lines_say_what_predicts_what(thing):
    """Targets that equal the inputs train a model to copy them, and without input_ids nothing shows that."""
    first = " ".join(inspect.getdoc(thing).split("\n\n")[1].split())
    assert "``logits[t]`` predict ``targets[t]``" in first
    assert "Pass ``shift=True``" in first
