"""UnifiedLoss: a flag builds the component it names, the parts sum to the loss, each has a gradient."""

import argparse
import dataclasses
import inspect

import pytest
import torch
from unified_case import IGNORE, B, D, E, T, V, inputs, naive_parts

import lossmith
import reference_components as naive
from lossmith import (
    MTP,
    ComposedLoss,
    ConfidencePenalty,
    CrossEntropyLoss,
    EarlyEOS,
    ExpertDiversity,
    Focal,
    ImmediateRepetition,
    LossModifierPipeline,
    MaskRatioWeightModifier,
    MoEBalance,
    NgramRepetition,
    RouterZLoss,
    UnifiedLoss,
    Weighted,
    create_unified_loss,
)

# flags -> (part, what it weighs, the component, the inputs whose gradient it must have)
PARTS = {
    "mtp": ({"use_mtp": True, "hidden_size": D}, "mtp_loss", 0.1, ["hidden_states"]),
    "ngram": ({"use_ngram_penalty": True}, "ngram_penalty", 0.1, ["logits"]),
    "immediate": (
        {"use_immediate_repetition_penalty": True},
        "immediate_repetition_penalty",
        0.5,
        ["logits"],
    ),
    "eos": ({"eos_token_id": 2}, "eos_penalty", 0.05, ["logits"]),
    "moe": ({"use_moe_balancing": True, "num_experts": E}, "moe_balance_loss", 0.1, ["gate_logits"]),
    "router": ({"router_z_loss_weight": 0.01}, "router_z_loss", 0.01, ["gate_logits"]),
    "focal": ({"use_focal_loss": True}, "focal_loss", 0.2, ["logits"]),
    "diversity": ({"use_diversity_loss": True}, "diversity_loss", 0.05, ["expert_outputs"]),
    "contrastive": ({"use_contrastive_loss": True}, "contrastive_loss", 0.1, []),
    "auxiliary": ({"use_auxiliary_loss": True}, "auxiliary_loss", 0.1, ["logits"]),
    "confidence": ({"primary_loss_type": "adaptive_mtp"}, "confidence_loss", 0.01, ["confidence_scores"]),
}
WEIGHTS = {
    "mtp": "mtp_weight",
    "ngram": "ngram_penalty_weight",
    "immediate": "immediate_repetition_weight",
    "eos": "eos_penalty_weight",
    "moe": "gradient_balance_weight",
    "focal": "focal_weight",
    "diversity": "diversity_weight",
    "contrastive": "contrastive_weight",
    "auxiliary": "auxiliary_weight",
}


def everything() -> UnifiedLoss:
    flags = {key: value for flags, *_ in PARTS.values() for key, value in flags.items()}
    return UnifiedLoss(V, label_smoothing=0.1, z_loss=1e-3, **flags).double()


@pytest.mark.parametrize("name", PARTS)
def test_each_component_is_there_when_it_is_switched_on_and_has_a_gradient(name):
    flags, part, weight, wanted = PARTS[name]
    given = inputs()
    if name == "confidence":  # without heads these are not read, which it says
        del given["hidden_states"]
    loss_fn = UnifiedLoss(V, **flags).double()
    parts = loss_fn(**given, return_detailed=True)
    assert set(parts) == {"main_loss", part, "total_loss"}
    assert loss_fn.components[part].weight == weight
    torch.testing.assert_close(parts["main_loss"] + parts[part], parts["total_loss"])
    for other in wanted:
        assert torch.autograd.grad(parts[part], given[other], retain_graph=True)[0].any(), other
    parts["total_loss"].backward()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_of_zero_is_bit_identical_to_off(name):
    flags, part, *_ = PARTS[name]
    given = inputs()
    off = UnifiedLoss(V, **{**flags, WEIGHTS[name]: 0.0})
    plain = UnifiedLoss(V)
    assert part not in off.components
    losses = [loss_fn(**given) for loss_fn in (off, plain)]
    assert torch.equal(*losses)
    assert torch.equal(*[torch.autograd.grad(loss, given["logits"])[0] for loss in losses])


def test_by_default_it_is_cross_entropy():
    given = inputs()
    assert torch.equal(UnifiedLoss(V)(**given), CrossEntropyLoss()(given["logits"], given["targets"]))
    assert list(UnifiedLoss(V).components) == []


def test_everything_on_is_the_composition_written_out(count_ops):
    given = inputs()
    loss_fn = everything()
    with count_ops as ops:
        parts = loss_fn(**given, return_detailed=True)
        parts["total_loss"].backward()
    assert ops.passes == (1, 1)  # the prediction's; the heads' logits are never there
    assert list(parts) == [
        "main_loss",
        "confidence_loss",
        "ngram_penalty",
        "immediate_repetition_penalty",
        "eos_penalty",
        "focal_loss",
        "auxiliary_loss",
        "mtp_loss",
        "moe_balance_loss",
        "router_z_loss",
        "diversity_loss",
        "contrastive_loss",
        "total_loss",
    ]
    torch.testing.assert_close(sum(v for k, v in parts.items() if k != "total_loss"), parts["total_loss"])
    primary = lossmith.AdaptiveCrossEntropyLoss(label_smoothing=0.1, z_loss=1e-3)
    heads = MTP(V, D, adaptive=True).double()
    heads.load_state_dict(loss_fn.components["mtp_loss"].component.state_dict())
    composed = ComposedLoss(
        primary,
        {
            "mtp": Weighted(heads, 0.1),
            "confidence": Weighted(lossmith.ConfidenceCalibration(), 0.01),
            "ngram": Weighted(NgramRepetition(4, 50), 0.1),
            "immediate": Weighted(ImmediateRepetition(2), 0.5),
            "eos": Weighted(EarlyEOS(2, 20), 0.05),
            "moe": Weighted(MoEBalance(E), 0.1),
            "router": Weighted(RouterZLoss(), 0.01),
            "focal": Weighted(Focal(2.0), 0.2),
            "diversity": Weighted(ExpertDiversity(), 0.05),
            "contrastive": Weighted(lossmith.Contrastive(0.07), 0.1),
            "auxiliary": Weighted(ConfidencePenalty(), 0.1),
        },
    )
    flags = {key: value for flags, *_ in PARTS.values() for key, value in flags.items()}
    expected = naive_parts(loss_fn, given, label_smoothing=0.1, z_loss=1e-3, **flags)
    torch.testing.assert_close({k: v for k, v in parts.items() if k != "total_loss"}, expected)
    given.pop("logits"), given.pop("targets")
    again = inputs()
    torch.testing.assert_close(composed(again["logits"], again["targets"], **given), parts["total_loss"])


def test_the_forward_in_the_documented_order():
    given = inputs()
    order = list(inspect.signature(UnifiedLoss.forward).parameters)[1:-1]
    assert order == [
        "logits",
        "targets",
        "attention_mask",
        "hidden_states",
        "lm_head_weight",
        "input_ids",
        "gate_logits",
        "expert_indices",
        "expert_outputs",
        "additional_logits",
        "confidence_scores",
        "contrastive_pairs",
        "denominator",
        "return_detailed",
    ]
    mask = torch.rand(B, T) > 0.3
    positional = UnifiedLoss(V)(given["logits"], given["targets"], mask)
    torch.testing.assert_close(positional, CrossEntropyLoss()(given["logits"], given["targets"], mask=mask))


def test_ignored_positions_have_no_gradient():
    given = inputs()
    loss = UnifiedLoss(V, use_ngram_penalty=True, use_immediate_repetition_penalty=True, eos_token_id=1)(
        **given
    )
    (gradient,) = torch.autograd.grad(loss, given["logits"])
    assert not gradient[given["targets"] == IGNORE].any()


def test_padding():
    given = inputs()
    padded = given["targets"].masked_fill(given["targets"] == IGNORE, 0)
    kept = padded != 0
    assert not kept.all()
    loss = UnifiedLoss(V, pad_token_id=0)(given["logits"], padded)
    torch.testing.assert_close(loss, CrossEntropyLoss()(given["logits"], padded, mask=kept))
    both = UnifiedLoss(V, pad_token_id=0, eos_token_id=0, eos_penalty_weight=0.0)
    torch.testing.assert_close(both(given["logits"], padded), CrossEntropyLoss()(given["logits"], padded))
    assert UnifiedLoss(V, pad_token_id=0).count(padded) == kept.sum()


def test_the_primaries():
    given = inputs()
    logits, targets = given["logits"], given["targets"]
    plain = CrossEntropyLoss(label_smoothing=0.1)(logits, targets)
    standard = UnifiedLoss(V, primary_loss_type="standard", label_smoothing=0.1)
    torch.testing.assert_close(standard(logits, targets), plain)
    tempered = UnifiedLoss(V, primary_loss_type="deepseek", initial_temperature=1.3)(logits, targets)
    torch.testing.assert_close(tempered, CrossEntropyLoss(temperature=1.3)(logits, targets))
    adaptive = UnifiedLoss(V, primary_loss_type="adaptive_mtp", adaptive_threshold=0.3)
    c = logits.softmax(-1).amax(-1).detach()
    weight = torch.where(c <= 0.3, 0.5 + 0.5 * c / 0.3, 1 + 0.5 * (c - 0.3) / 0.7)
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE
    )
    expected = (weight.flatten() * nll).sum() / (targets != IGNORE).sum()
    torch.testing.assert_close(adaptive(logits, targets), expected)


def test_focal_beside_the_main_loss_or_in_its_place():
    given = inputs()
    logits, targets = given["logits"], given["targets"]
    focal = CrossEntropyLoss(focal_gamma=1.5)(logits, targets)
    added = UnifiedLoss(V, use_focal_loss=True, focal_gamma=1.5, focal_weight=0.4, focal_alpha=0.5)
    torch.testing.assert_close(
        added(logits, targets), CrossEntropyLoss()(logits, targets) + 0.4 * 0.5 * focal
    )
    replaced = UnifiedLoss(V, use_focal_loss=True, focal_gamma=1.5, focal_mode="replace")
    torch.testing.assert_close(replaced(logits, targets), focal)


def test_an_adaptive_temperature_has_the_given_bounds_and_moves_with_the_optimizer():
    loss_fn = UnifiedLoss(
        V, adaptive_temperature=True, initial_temperature=1.2, temperature_bounds=(1.1, 1.5)
    )
    temperature = loss_fn.base.temperature
    assert (temperature.value, temperature.bounds) == (pytest.approx(1.2), (1.1, 1.5))
    given = inputs()
    loss_fn(given["logits"], given["targets"]).backward()
    torch.optim.SGD([given["logits"]], lr=0.0).step()
    assert temperature.num_steps == 1
    assert "base.temperature.value" in loss_fn.state_dict()
    assert loss_fn.get_loss_statistics()["temperature"] == pytest.approx(1.2)


def test_statistics():
    given = inputs()
    loss_fn = UnifiedLoss(V, use_ngram_penalty=True)
    found = [loss_fn(given["logits"] * k, given["targets"], return_detailed=True) for k in (1, 2)]
    statistics = loss_fn.get_loss_statistics()
    for name in ("main_loss", "ngram_penalty", "total_loss"):
        assert statistics[name] == pytest.approx(sum(parts[name].item() for parts in found) / 2)
    assert statistics["num_batches"] == 2
    loss_fn.reset_statistics()
    assert loss_fn.get_loss_statistics() == {"num_batches": 0, "temperature": 1.0}
    loss_fn.track_statistics = False
    loss_fn(given["logits"], given["targets"])
    assert loss_fn.get_loss_statistics()["num_batches"] == 0


def test_from_a_configuration():
    options = {"vocab_size": V, "use_ngram_penalty": True, "label_smoothing": 0.1}
    made = dataclasses.make_dataclass("Config", [(k, type(v), v) for k, v in {**options, "lr": 0.1}.items()])
    for config in (options, made(), argparse.Namespace(**options, dataset="text")):
        loss_fn = create_unified_loss(config)
        assert list(loss_fn.components) == ["ngram_penalty"]
        assert loss_fn.base.label_smoothing == 0.1
    with pytest.raises(TypeError, match="Did you mean 'use_ngram_penalty'"):
        create_unified_loss({"vocab_size": V, "use_ngram_penlty": True})
    with pytest.raises(TypeError, match="vocab_size"):
        create_unified_loss({})


def test_the_old_names():
    with pytest.warns(DeprecationWarning, match="DeepSeekLoss is UnifiedLoss"):
        loss_fn = lossmith.DeepSeekLoss(vocab_size=V, hidden_size=D)
    assert loss_fn.primary_loss_type == "deepseek"
    with pytest.warns(DeprecationWarning, match="is UnifiedLoss"):
        assert lossmith.AdaptiveMTPLoss(vocab_size=V).primary_loss_type == "adaptive_mtp"
    with pytest.warns(DeprecationWarning, match="is UnifiedLoss"):
        penalties = lossmith.AntiRepetitionLoss(V, 2, 0)
    assert list(penalties.components) == ["ngram_penalty", "immediate_repetition_penalty", "eos_penalty"]
    assert penalties.pad_token_id == 0


def test_split_batches_and_modifiers():
    given = inputs()
    loss_fn = UnifiedLoss(
        V, D, use_mtp=True, use_moe_balancing=True, num_experts=E, use_focal_loss=True
    ).double()
    count = loss_fn.count(given["targets"])
    whole = loss_fn(**given, denominator=count)
    per_row = ("logits", "targets", "hidden_states", "gate_logits")
    rows = [loss_fn(**{k: given[k][b : b + 1] for k in per_row}, denominator=count) for b in range(B)]
    parts = loss_fn(**given, return_detailed=True)
    torch.testing.assert_close(parts["total_loss"], whole)
    # all but the balance, which is a statistic of the batch, adds up
    off = UnifiedLoss(V, D, use_mtp=True, use_focal_loss=True).double()
    off.load_state_dict(loss_fn.state_dict(), strict=False)
    sums = sum(off(**{k: given[k][b : b + 1] for k in per_row}, denominator=count) for b in range(B))
    torch.testing.assert_close(sums, parts["total_loss"] - parts["moe_balance_loss"])
    # but for each row's share of its own
    counts = (given["targets"] != IGNORE).sum(-1)
    balances = [naive.balance(z, naive.top_experts(z, 1), [1 / E] * E) for z in given["gate_logits"]]
    expected = sums + 0.1 * sum(c / count * one for c, one in zip(counts, balances, strict=True))
    torch.testing.assert_close(sum(rows), expected)
    pipeline = LossModifierPipeline([MaskRatioWeightModifier({})], base=loss_fn)
    logits, targets = given.pop("logits"), given.pop("targets")
    output = pipeline.evaluate(logits, targets, **given)
    assert set(output.parts) == {"cross_entropy", "mtp_loss", "moe_balance_loss", "focal_loss"}


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("is_empty", [False, True])
def test_the_smallest_batches(shape, is_empty):
    logits = torch.randn(*shape, 4, requires_grad=True)
    hidden = torch.randn(*shape, D, requires_grad=True)
    targets = torch.full(shape, IGNORE) if is_empty else torch.zeros(shape, dtype=torch.long)
    loss_fn = UnifiedLoss(
        4,
        D,
        use_mtp=True,
        use_ngram_penalty=True,
        use_immediate_repetition_penalty=True,
        eos_token_id=3,
        use_focal_loss=True,
        use_contrastive_loss=True,
        use_auxiliary_loss=True,
        z_loss=0.1,
    )
    loss = loss_fn(logits, targets, hidden_states=hidden)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert hidden.grad is None or hidden.grad.isfinite().all()


def test_half_precision():
    given = inputs()
    half = {
        k: v.detach().bfloat16() for k, v in given.items() if k in ("logits", "hidden_states", "gate_logits")
    }
    flags = {"use_mtp": True, "use_moe_balancing": True, "num_experts": E, "use_ngram_penalty": True}
    loss_fn = UnifiedLoss(V, D, **flags)
    loss = loss_fn(targets=given["targets"], **half)
    assert loss.dtype == torch.float32
    exact = {k: v.double() for k, v in half.items()}
    truth = loss_fn.double()(
        exact["logits"], given["targets"], **{k: v for k, v in exact.items() if k != "logits"}
    )
    torch.testing.assert_close(loss.double(), truth, rtol=2e-3, atol=0)


def test_gradcheck():
    given = inputs()
    loss_fn = everything()
    names = ["logits", "hidden_states", "gate_logits", "expert_outputs"]
    cut = {k: given[k][:1, :5].detach().requires_grad_() for k in names}
    targets, ids = given["targets"][:1, :5], given["input_ids"][:1, :5]
    scores = given["confidence_scores"][:1, :5].detach()

    def loss(*tensors):
        named = dict(zip(names, tensors, strict=True))
        # weights of the main prediction's confidence are constants; given scores make them so
        return loss_fn(
            named.pop("logits"),
            targets,
            input_ids=ids,
            confidence_scores=scores,
            contrastive_pairs=given["contrastive_pairs"],
            **named,
        )

    assert torch.autograd.gradcheck(loss, tuple(cut.values()))
