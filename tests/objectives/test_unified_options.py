"""Every option of UnifiedLoss against its formula, in value and gradients, where it makes a difference."""

import inspect

import pytest
import torch
from unified_case import DEFAULTS, IGNORE, B, D, E, T, V, inputs, naive_parts

from lossmith import UnifiedLoss

MTP = {"use_mtp": True, "hidden_size": D}
NGRAM = {"use_ngram_penalty": True, "ngram_size": 2}
IMMEDIATE = {"use_immediate_repetition_penalty": True}
EOS = {"eos_token_id": 2}
MOE = {"use_moe_balancing": True, "num_experts": E}
FOCAL = {"use_focal_loss": True}
CONTRASTIVE = {"use_contrastive_loss": True}
ADAPTIVE = {"primary_loss_type": "adaptive_mtp"}
OF_HEADS = {**MTP, "mtp_type": "adaptive"}

# option -> everything that is not at its default, the option among it
CASES = {
    "primary_loss_type": [ADAPTIVE],
    "label_smoothing": [{"label_smoothing": 0.2}],
    "ignore_index": [{"ignore_index": 3}],
    "initial_temperature": [{"initial_temperature": 1.3}],
    "use_mtp": [MTP],
    "num_future_tokens": [{**MTP, "num_future_tokens": 2}],
    "mtp_weight": [{**MTP, "mtp_weight": 0.3}],
    "mtp_type": [OF_HEADS],
    "shared_projection": [{**MTP, "shared_projection": True}],
    "adaptive_threshold": [{**ADAPTIVE, "adaptive_threshold": 0.3}, {**OF_HEADS, "adaptive_threshold": 0.3}],
    "adaptive_weight_range": [
        {**ADAPTIVE, "adaptive_weight_range": (0.2, 1.9)},
        {**OF_HEADS, "adaptive_weight_range": (0.2, 1.9)},
    ],
    "use_ngram_penalty": [NGRAM],
    "ngram_size": [{**NGRAM, "ngram_size": 3}],
    "ngram_penalty_weight": [{**NGRAM, "ngram_penalty_weight": 0.3}],
    "ngram_window_size": [{**NGRAM, "ngram_window_size": 5}],
    "use_immediate_repetition_penalty": [IMMEDIATE],
    "immediate_repetition_weight": [{**IMMEDIATE, "immediate_repetition_weight": 0.3}],
    "immediate_repetition_threshold": [{**IMMEDIATE, "immediate_repetition_threshold": 1}],
    "eos_token_id": [EOS, {**NGRAM, "pad_token_id": 0, "eos_token_id": 0}],
    "pad_token_id": [{**NGRAM, "pad_token_id": 0}],
    "min_sequence_length": [{**EOS, "min_sequence_length": 4}],
    "eos_penalty_weight": [{**EOS, "eos_penalty_weight": 0.3}],
    "use_moe_balancing": [MOE],
    "gradient_balance_weight": [{**MOE, "gradient_balance_weight": 0.3}],
    "target_expert_usage": [{**MOE, "target_expert_usage": [0.4, 0.3, 0.2, 0.1]}],
    "moe_top_k": [{**MOE, "moe_top_k": 2}],
    "moe_num_layers": [{**MOE, "moe_num_layers": 2}],
    "moe_balance_mode": [{**MOE, "moe_balance_mode": "bias"}],
    "router_z_loss_weight": [{"router_z_loss_weight": 0.3}],
    "use_focal_loss": [FOCAL],
    "focal_gamma": [{**FOCAL, "focal_gamma": 1.5}],
    "focal_alpha": [{**FOCAL, "focal_alpha": 0.5}],
    "focal_weight": [{**FOCAL, "focal_weight": 0.5}],
    "focal_mode": [{**FOCAL, "focal_mode": "replace"}],
    "use_diversity_loss": [{"use_diversity_loss": True}],
    "diversity_weight": [{"use_diversity_loss": True, "diversity_weight": 0.3}],
    "use_contrastive_loss": [CONTRASTIVE],
    "contrastive_weight": [{**CONTRASTIVE, "contrastive_weight": 0.3}],
    "contrastive_temperature": [{**CONTRASTIVE, "contrastive_temperature": 0.5}],
    "contrastive_margin": [{**CONTRASTIVE, "contrastive_margin": 1.1}],
    "use_auxiliary_loss": [{"use_auxiliary_loss": True}],
    "auxiliary_weight": [{"use_auxiliary_loss": True, "auxiliary_weight": 0.3}],
    "z_loss": [{"z_loss": 0.1}, {**ADAPTIVE, "z_loss": 0.1}],
    "reduction": [{**FOCAL, "reduction": "sum"}],
    "shift": [{"shift": True}],
}
# Sizes; what changes no loss of one batch; and what the tests below are of.
OTHERS = {
    *("hidden_size", "num_experts"),
    *("adaptive_temperature", "temperature_bounds", "track_statistics", "empty", "backend"),
}


def given_for(name: str, flags: dict) -> dict:
    given = inputs()
    if "use_mtp" not in flags and "use_contrastive_loss" not in flags:
        del given["hidden_states"]  # a loss of confidence alone says that it does not read them
    if name == "contrastive_margin":  # which is of tokens
        del given["contrastive_pairs"]
    if name == "ignore_index":
        given["targets"][given["targets"] == IGNORE] = flags["ignore_index"]
    if name == "moe_num_layers":
        given["gate_logits"] = [given["gate_logits"], given["gate_logits"].flip(1) * 2]
    return given


def leaves_of(given: dict) -> list[torch.Tensor]:
    flat = [x for value in given.values() for x in (value if isinstance(value, tuple | list) else [value])]
    return [x for x in flat if x.requires_grad and x.is_leaf]


def assert_same_gradients(found, expected, leaves) -> None:
    ours, theirs = (
        torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True, retain_graph=True)
        for loss in (found, expected)
    )
    torch.testing.assert_close(ours, theirs)


def of_confidence(flags: dict) -> bool:
    return any("adaptive" in str(value) for value in flags.values())


WITH_SCORES = [(name, flags, True) for name, some in CASES.items() for flags in some]
WITHOUT = [(name, flags, False) for name, flags, _ in WITH_SCORES if of_confidence(flags)]


@pytest.mark.parametrize(("name", "flags", "with_scores"), WITH_SCORES + WITHOUT)
def test_an_option_is_what_its_formula_says(name, flags, with_scores):
    given = given_for(name, flags)
    if not with_scores:
        del given["confidence_scores"]
    loss_fn = UnifiedLoss(V, **flags).double()
    found, expected = loss_fn(**given, return_detailed=True), naive_parts(loss_fn, given, **flags)
    total = sum(expected.values())
    torch.testing.assert_close(found.pop("total_loss"), total)
    torch.testing.assert_close(found, expected)
    assert_same_gradients(sum(found.values()), total, [*leaves_of(given), *loss_fn.parameters()])


@pytest.mark.parametrize("name", CASES)
def test_and_it_makes_a_difference(name):
    """To the formula: a case at which it made none would show nothing."""
    for flags in CASES[name]:
        if name in ("moe_num_layers", "ignore_index", "shared_projection"):  # other inputs, other weights
            continue
        given = given_for(name, flags)
        heads = UnifiedLoss(V, **flags).double()
        with_it = sum(naive_parts(heads, given, **flags).values())
        without = {key: value for key, value in flags.items() if key != name}
        if name == "num_future_tokens":
            heads = UnifiedLoss(V, **without).double()
        assert (sum(naive_parts(heads, given, **without).values()) - with_it).abs() > 1e-6


def test_every_option_has_a_case():
    assert set(CASES) | OTHERS == set(DEFAULTS)
    assert not set(CASES) & OTHERS


def test_the_defaults_are_those_of_the_documentation():
    declared = inspect.signature(UnifiedLoss).parameters
    assert {name: p.default for name, p in declared.items() if name != "vocab_size"} == DEFAULTS


@pytest.mark.parametrize("primary", ["deepseek", "adaptive_mtp"])
def test_a_batch_without_a_target(primary):
    logits, targets = torch.randn(B, T, V), torch.full((B, T), IGNORE)
    assert UnifiedLoss(V, primary_loss_type=primary)(logits, targets) == 0
    assert UnifiedLoss(V, primary_loss_type=primary, empty="nan")(logits, targets).isnan()


def test_several_together_are_their_formulas():
    flags = {
        **OF_HEADS,
        **NGRAM,
        **IMMEDIATE,
        **EOS,
        **MOE,
        **FOCAL,
        **CONTRASTIVE,
        **ADAPTIVE,
        "use_diversity_loss": True,
        "use_auxiliary_loss": True,
        "router_z_loss_weight": 0.3,
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "pad_token_id": 0,
        "shift": True,
    }
    given = inputs()
    loss_fn = UnifiedLoss(V, **flags).double()
    found, expected = loss_fn(**given, return_detailed=True), naive_parts(loss_fn, given, **flags)
    assert_same_gradients(found.pop("total_loss"), sum(expected.values()), leaves_of(given))
    torch.testing.assert_close(found, expected)
