"""A wrong input is answered with what was expected, what came, and what to do."""

import pytest
import torch
from torch import Tensor

import linear_case
import lossmith
from linear_case import IGNORE, B, D, T, V
from lossmith import CrossEntropyLoss, LossModifierPipeline, UnifiedLoss
from lossmith.engine.head.linear_head import LinearHead


class Sharded(Tensor):
    """As torch's DTensor: a rank's part that knows how to become whole."""

    def full_tensor(self) -> Tensor:
        return self


HEAD = linear_case.head(dtype=torch.float32)
GIVEN = {"hidden": HEAD.hidden, "weight": HEAD.weight, "targets": linear_case.targets(), "bias": HEAD.bias}
BAD_TARGETS = linear_case.targets()
BAD_TARGETS[1, 2] = V
META = torch.device("meta")

MISTAKES = {
    "another D": ({"weight": torch.zeros(V, D + 1)}, ValueError, r"D=4 but weight is \[7, 5\].*\[V, D\]"),
    "transposed": ({"weight": HEAD.weight.detach().t()}, ValueError, r"weight is \[4, 7\].*weight\.t\(\)"),
    "one-dimensional weight": ({"weight": torch.zeros(D)}, ValueError, r"weight must be \[V, D\].*\[4\]"),
    "no classes": ({"weight": torch.zeros(0, D)}, ValueError, r"V >= 1; got \[0, 4\]"),
    "no weight": (
        {"weight": None},
        TypeError,
        "weight must be a tensor; got NoneType|lm_head_weight is missing",
    ),
    "a layer as weight": (
        {"weight": torch.nn.Linear(D, V)},
        TypeError,
        "weight must be a tensor; got Linear",
    ),
    "no hidden states": ({"hidden": None}, TypeError, "hidden must be a tensor|hidden_states is missing"),
    "states of all layers": ({"hidden": (HEAD.hidden,)}, TypeError, "got tuple. Of the states of all layers"),
    "a number": ({"hidden": torch.tensor(1.0)}, ValueError, "D=None"),
    "integers": (
        {"hidden": torch.zeros(B, T, D).long()},
        TypeError,
        "hidden must be floating point; got .*int64",
    ),
    "another dtype": (
        {"weight": HEAD.weight.double()},
        TypeError,
        "float32 but weight is torch.float64.*autocast",
    ),
    "another dtype of the bias": ({"bias": HEAD.bias.half()}, TypeError, "but bias is torch.float16"),
    "another device": ({"weight": HEAD.weight.to(META)}, ValueError, "on cpu but weight on meta; move one"),
    "another device of the bias": ({"bias": HEAD.bias.to(META)}, ValueError, "on cpu but bias on meta; move"),
    "another device of the targets": (
        {"targets": linear_case.targets().to(META)},
        ValueError,
        "hidden is on cpu but targets on meta; move one of them",
    ),
    "a bias of another size": (
        {"bias": torch.zeros(V + 1)},
        ValueError,
        r"bias must be \[V\] = \[7\]; got \[8\]",
    ),
    "a part of the weight": (
        {"weight": torch.zeros(V, D).as_subclass(Sharded)},
        ValueError,
        "DTensor.*forward",
    ),
    "no targets": ({"targets": None}, TypeError, "targets are missing|targets must be a tensor"),
    "other shape": ({"targets": torch.zeros(B, T + 1).long()}, ValueError, r"shape \[3, 5\].*got \[3, 6\]"),
    "flat targets": ({"targets": torch.zeros(B * T).long()}, ValueError, r"shape \[3, 5\].*got \[15\]"),
    "probabilities": ({"targets": torch.zeros(B, T)}, TypeError, "integer class ids.*label_smoothing"),
    "out of range": ({"targets": BAD_TARGETS}, ValueError, r"\[0, 7\).*got 7 at position \(1, 2\)"),
    "no tokens": (
        {"hidden": torch.zeros(0, D), "targets": torch.zeros(0).long()},
        ValueError,
        "empty batch: hidden",
    ),
    "no budget": (
        {"memory_budget": 0},
        ValueError,
        "memory_budget must be a whole number > 0 or None; got 0",
    ),
    "less than no budget": (
        {"memory_budget": -1},
        ValueError,
        "memory_budget must be a whole number > 0 or None; got -1",
    ),
    "a budget of parts": (
        {"memory_budget": 1e6},
        TypeError,
        r"whole number > 0 or None; got 1000000\.0 \(float\)",
    ),
    "a budget of truth": ({"memory_budget": True}, TypeError, r"got True \(bool\)"),
    "a budget in words": ({"memory_budget": "1GB"}, TypeError, "got '1GB'"),
}
STRATEGY = {"strategy": "once"}, ValueError, "must be one of 'auto', 'one_sweep', 'two_sweep'; got 'once'"


def as_function(**given):
    hidden, weight, targets = (given.pop(name) for name in ("hidden", "weight", "targets"))
    return lossmith.linear_cross_entropy(hidden, weight, targets, **given)


def as_plan(**given):
    hidden, weight, targets = (given.pop(name) for name in ("hidden", "weight", "targets"))
    return lossmith.linear_cross_entropy.explain(hidden, weight, targets, **given)


def as_statistics(**given):
    hidden, weight, targets = (given.pop(name) for name in ("hidden", "weight", "targets"))
    return lossmith.linear_token_stats(hidden, weight, targets, **given).nll


def as_objective(make):
    def call(*, hidden, weight, bias, **given):
        return make()(hidden_states=hidden, lm_head_weight=weight, lm_head_bias=bias, **given)

    return call


CALLS = {
    "function": as_function,
    "explain": as_plan,
    "token_stats": as_statistics,
    "module": as_objective(CrossEntropyLoss),
    "unified": as_objective(lambda: UnifiedLoss(V)),
    "pipeline": as_objective(LossModifierPipeline),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_told(mistake, call):
    changes, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=message):
        CALLS[call](**GIVEN | changes)


@pytest.mark.parametrize("call", [name for name in CALLS if name != "token_stats"])
def test_an_unknown_strategy(call):
    changes, kind, message = STRATEGY
    with pytest.raises(kind, match=message):
        CALLS[call](**GIVEN | changes)


def test_logits_and_a_head():
    logits, targets = HEAD.logits(), linear_case.targets()
    for name, value in HEAD.inputs(rows=1).items():
        with pytest.raises(TypeError, match=f"{name} is for the loss without logits.*either"):
            CrossEntropyLoss()(logits, targets, **{name: value})
    with pytest.raises(TypeError, match="lm_head_bias is for the loss without logits"):
        UnifiedLoss(V, D, use_mtp=True)(
            logits, targets, hidden_states=HEAD.hidden, lm_head_weight=HEAD.weight, lm_head_bias=HEAD.bias
        )


@pytest.mark.parametrize(
    "missing", [["hidden_states"], ["lm_head_weight"], ["hidden_states", "lm_head_weight"]]
)
def test_neither_logits_nor_a_head(missing):
    given = {name: value for name, value in HEAD.inputs().items() if name not in missing}
    with pytest.raises(
        TypeError, match=f"expected logits.*in their place; {' and '.join(missing)} (is|are) miss"
    ):
        CrossEntropyLoss()(targets=linear_case.targets(), **given)


@pytest.mark.parametrize(
    "function",
    [lossmith.linear_cross_entropy, lossmith.linear_cross_entropy.explain],
    ids=["call", "explain"],
)
def test_unknown_options_name_the_nearest(function):
    for wrong, meant in (
        ("label_smoothin", "label_smoothing"),
        ("lm_head_bias", "bias"),
        ("buget", "memory_budget"),
    ):
        with pytest.raises(TypeError, match=rf"linear_cross_entropy has no option '{wrong}'.*{meant}"):
            function(HEAD.hidden, HEAD.weight, linear_case.targets(), **{wrong: 1})
    with pytest.raises(TypeError, match=r"linear_token_stats has no option 'strategy'"):
        lossmith.linear_token_stats(HEAD.hidden, HEAD.weight, linear_case.targets(), strategy="auto")
    with pytest.raises(TypeError, match=r"has no option 'lm_head_wieght'\. Did you mean 'lm_head_weight'"):
        CrossEntropyLoss()(
            targets=linear_case.targets(), hidden_states=HEAD.hidden, lm_head_wieght=HEAD.weight
        )


def test_wrong_candidates():
    targets = linear_case.targets()
    for candidates, kind, message in (
        (torch.zeros(B, T).long(), ValueError, r"\[\.\.\., K\]"),
        (torch.zeros(B, T, 2), TypeError, "integer"),
        (torch.full((B, T, 2), V), ValueError, r"candidates must be class ids in \[0, 7\) or -1; got 7"),
    ):
        with pytest.raises(kind, match=message):
            _ = lossmith.linear_token_stats(HEAD.hidden, HEAD.weight, targets, candidates=candidates).nll


def test_statistics_of_a_head_that_has_changed_are_refused():
    head, targets = linear_case.head(), linear_case.targets()
    stats = lossmith.linear_token_stats(head.hidden, head.weight, targets).compute("nll")
    with torch.no_grad():
        head.weight.add_(1.0)
    _ = stats.nll
    with pytest.raises(RuntimeError, match=r"modified in place.*announce"):
        _ = stats.entropy


def test_masked_positions_may_hold_anything_that_ignore_index_says():
    """Ids out of range under a mask are mistakes; under ignore_index they are not looked at."""
    targets = BAD_TARGETS.clone()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 2] = False
    ours = lossmith.linear_cross_entropy(HEAD.hidden, HEAD.weight, targets, mask=mask)
    targets[1, 2] = IGNORE
    assert torch.equal(ours, lossmith.linear_cross_entropy(HEAD.hidden, HEAD.weight, targets))


@pytest.mark.parametrize("softcap", [0.0, -1.0])
def test_a_cap_of_the_models_own_that_cannot_be(softcap):
    with pytest.raises(ValueError, match=r"softcap must be a number >= 1e-20.* or None; got"):
        LinearHead(HEAD.hidden, HEAD.weight, softcap=softcap)


def test_two_caps():
    with pytest.raises(ValueError, match="the model caps its logits"):
        CrossEntropyLoss(softcap=3.0)(targets=linear_case.targets(), **HEAD.inputs(), lm_head_softcap=5.0)


def test_a_sequence_scorers_predictions_have_no_head():
    pipeline = LossModifierPipeline(model_mode="sequence_scorer")
    with pytest.raises(TypeError, match="predictions"):
        pipeline.modify_loss(targets=torch.rand(B), **HEAD.inputs())


def test_targets_that_are_written_over_before_the_way_back():
    """The products leave tokens out that have none, and would have no room for more of them."""
    hidden, weight = torch.randn(12, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets = torch.arange(12) % 9
    targets[3:] = -100
    loss = lossmith.linear_token_stats(hidden, weight, targets).nll.sum()
    targets.fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
