"""``check_term``: every term of the library keeps its promises, and a term that breaks one is told which."""

import importlib
import inspect
import pkgutil
from dataclasses import replace

import pytest
import torch
from torch import nn

import lossmith
from lossmith import Term, terms
from lossmith.terms import confidence_weight, cross_entropy as terms_cross_entropy
from lossmith.testing import check_objective, check_term

PARAMETER = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
OURS = {
    "ngram": [lossmith.NgramRepetition(2, 9).term()],
    "unigram": [lossmith.NgramRepetition(1, 5).term()],
    "immediate": [lossmith.ImmediateRepetition().term()],
    "early_eos": [lossmith.EarlyEOS(3).term()],
    "focal": [lossmith.Focal().term()],
    "z_loss": [lossmith.ZLoss().term()],
    "confidence_penalty": [lossmith.ConfidencePenalty().term()],
    "no_terms_of_its_own": lossmith.Objective([]).terms(),
    "cross_entropy": lossmith.CrossEntropyLoss(
        label_smoothing=0.1, z_loss=0.1, confidence_penalty=0.2, focal_gamma=1.5
    ).terms(),
    "exclude_target": lossmith.CrossEntropyLoss(label_smoothing=0.1, smoothing_mode="exclude_target").terms(),
    "adaptive": lossmith.AdaptiveCrossEntropyLoss(z_loss=0.1).terms(),
    "nvamp": lossmith.NVAMPLoss(gamma=0.5, top_k=2).terms(),
    "nvamp_legacy": lossmith.NVAMPLoss(legacy=True).terms(),
}


@pytest.mark.parametrize("name", OURS)
def test_our_terms_keep_their_promises(name):
    for term in OURS[name]:
        check_term(term)


def test_of_confidence_scores_too():
    scores = torch.rand(3, 7, dtype=torch.float64)
    for term in (*lossmith.AdaptiveCrossEntropyLoss().terms(), lossmith.ConfidenceCalibration().term()):
        check_term(term, features={"confidence_scores": scores})


BROKEN = {
    "reads what it does not declare": (
        Term("t", lambda s, b: s.entropy, reads=("nll",)),
        r"'t' reads the statistic 'entropy'",
    ),
    "reads it at another temperature": (
        Term("t", lambda s, b: s.unscaled.nll, reads=("nll",)),
        r"'unscaled\.nll'",
    ),
    "looks around in its loss": (
        Term("t", lambda s, b: s.nll - s.nll.mean(), scope="token"),
        "'t' has scope='token' and looks at other tokens",
    ),
    "looks around in its weight": (
        Term("t", lambda s, b: s.nll, token_weight=lambda s, b: s.nll / s.nll.max(), scope="token"),
        "'t' has scope='token' and looks at other tokens",
    ),
    "looks around in its gradient alone": (
        Term("t", lambda s, b: s.nll + s.nll.sum() - s.nll.sum().detach(), scope="token"),
        "'t' has scope='token' and looks at other tokens",
    ),
    "has a parameter": (
        Term("t", lambda s, b: s.nll * PARAMETER, scope="token"),
        "gradient in something else",
    ),
    "reduces": (Term("t", lambda s, b: s.nll.mean()), "a value per token"),
    "has no gradient": (
        Term("t", lambda s, b: s.nll.detach()),
        "not that of finite differences",
    ),
    "has half a gradient": (
        Term("t", lambda s, b: s.nll * s.nll.detach()),
        "not that of finite differences",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_named(name):
    term, message = BROKEN[name]
    with pytest.raises(AssertionError, match=message):
        check_term(term)


def modified(*modifiers):
    return lossmith.LossModifierPipeline(modifiers, base=lossmith.CrossEntropyLoss(z_loss=0.1))


OBJECTIVES = {
    "cross_entropy": lossmith.CrossEntropyLoss(label_smoothing=0.1, z_loss=0.1, focal_gamma=1.0),
    "shifted": lossmith.CrossEntropyLoss(shift=True),
    "of rows": lossmith.CrossEntropyLoss(reduction="sequence_mean", temperature=0.7),
    "summed": lossmith.CrossEntropyLoss(reduction="sum"),
    "of each token": lossmith.CrossEntropyLoss(reduction="none"),
    "capped": lossmith.CrossEntropyLoss(softcap=5.0, confidence_penalty=0.1),
    "adaptive": lossmith.UnifiedLoss(11, primary_loss_type="adaptive_mtp"),
    "unified": lossmith.UnifiedLoss(
        11, use_ngram_penalty=True, ngram_size=2, use_focal_loss=True, use_auxiliary_loss=True, eos_token_id=2
    ),
    "smoothed": modified(lossmith.TargetSmoothingModifier({})),
    "of no terms": lossmith.Objective([]),
}
OF_THE_WHOLE_BATCH = {
    "nvamp": lossmith.NVAMPLoss(gamma=0.3, top_k=2),
    "weighed": modified(lossmith.EntropyModifier({}), lossmith.MaskRatioWeightModifier({})),
}


@pytest.mark.parametrize("name", [*OBJECTIVES, *OF_THE_WHOLE_BATCH])
def test_our_objectives_keep_their_promises(name):
    adds_up = name in OBJECTIVES
    check_objective((OBJECTIVES | OF_THE_WHOLE_BATCH)[name], shape=(3, 5), adds_up=adds_up)


def test_where_a_batch_matters_micro_batches_do_not_add_up():
    with pytest.raises(AssertionError, match="NVAMPLoss: micro-batches do not add up"):
        check_objective(OF_THE_WHOLE_BATCH["nvamp"])


class Altered(lossmith.Objective):
    """An objective whose outcome is altered."""

    def __init__(self, alter):
        super().__init__([Term("nll", lambda s, b: s.nll, reads=("nll",), scope="token")])
        self.alter = alter

    def complete(self, output, inputs):
        return self.alter(output)


class Around(lossmith.Objective):
    """An objective that does something else besides: ``around`` (logits, output) -> output."""

    def __init__(self, around):
        super().__init__([Term("nll", lambda s, b: s.nll, reads=("nll",), scope="token")])
        self.around = around

    def evaluate(self, logits=None, *args, **inputs):
        return self.around(logits, super().evaluate(logits, *args, **inputs))


class Deaf(torch.autograd.Function):
    """Does not listen to what comes from above."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        return torch.ones_like(upstream)


def scaled(output, factor):
    parts = {name: part * factor for name, part in output.parts.items()}
    return replace(output, total=output.total * factor, parts=parts)


ALTERED = {
    "a part that is not counted": (
        lambda output: replace(output, total=output.total + 1.0),
        "the parts do not sum",
    ),
    "a gradient that does not scale": (
        lambda output: replace(output, total=Deaf.apply(output.total)),
        "does not scale with the loss",
    ),
    "divided twice": (
        lambda output: scaled(output, 1 / output.num_tokens.clamp(min=1)),
        "micro-batches do not add up",
    ),
    "0 / 0": (lambda output: scaled(output, 1 / output.num_tokens), "a batch without a target"),
    "everything counts": (
        lambda output: scaled(output, output.batch.valid.numel() / output.all_stats.is_valid.sum()),
        "a batch without a target",
    ),
}


@pytest.mark.parametrize("name", ALTERED)
def test_a_broken_objective_is_told_how(name):
    alter, message = ALTERED[name]
    with pytest.raises(AssertionError, match=f"Altered: .*{message}"):
        check_objective(Altered(alter))


def with_logits(output, logits, where=True):
    """The output with all the logits in it."""
    more = 0.1 * logits.mean() if where and logits is not None else torch.zeros_like(output.total)
    return replace(output, total=output.total + more, parts={**output.parts, "more": more})


def shifted(logits, output):
    if logits is not None:
        logits.data += 1.0  # softmax does not mind
    return output


AROUND = {
    "looks where there is no target": (
        lambda logits, output: with_logits(output, logits),
        "tokens without a target matter",
    ),
    "learns where there is no target": (
        lambda logits, output: with_logits(output, logits, where=not output.num_tokens),
        "a batch without a target has a gradient",
    ),
    "another loss over a head": (
        lambda logits, output: scaled(output, 2.0 if logits is None else 1.0),
        "over a linear head it is another loss",
    ),
    "changes the logits": (shifted, "the logits were changed"),
}


@pytest.mark.parametrize("name", AROUND)
def test_an_objective_that_does_something_else_besides_is_told_what(name):
    around, message = AROUND[name]
    with pytest.raises(AssertionError, match=f"Around: {message}"):
        check_objective(Around(around), num_classes=5, shape=(3, 4))


def test_an_objective_is_held_to_the_promises_of_its_terms():
    half = Term("half", lambda s, b: s.nll * s.nll.detach(), reads=("nll",))
    with pytest.raises(AssertionError, match="'half' is not that of finite differences"):
        check_objective(lossmith.Objective([half]), num_classes=5, shape=(3, 4))


# ── nothing is forgotten ──────────────────────────────────────────────────────────────────────────────

B, T, V, E, D = 2, 4, 5, 4, 3


class Stacked(lossmith.ComposedLoss):
    """Takes as one tensor [B, K, ...] what a component wants as K, so that a batch can be split."""

    def evaluate(self, *args, **inputs):
        for name in ("contrastive_pairs", "additional_logits"):
            if name in inputs:
                inputs[name] = inputs[name].unbind(1)
        return super().evaluate(*args, **inputs)


def beside(component, kind=lossmith.ComposedLoss, primary=None):
    """The component alone, unless it is beside something."""
    return kind(primary or lossmith.Objective([]), {"part": lossmith.Weighted(component, 0.7)})


# every public objective and component -> how it is made, and what of it does not add up
PROMISES = {
    # components
    "ConfidenceCalibration": lambda: beside(
        lossmith.ConfidenceCalibration(), primary=lossmith.CrossEntropyLoss()
    ),
    "ConfidencePenalty": lambda: beside(lossmith.ConfidencePenalty()),
    "Contrastive": lambda: beside(lossmith.Contrastive(), Stacked),
    "EarlyEOS": lambda: beside(lossmith.EarlyEOS(2, 3)),
    "ExpertDiversity": lambda: beside(lossmith.ExpertDiversity()),
    "Focal": lambda: beside(lossmith.Focal(1.5, 0.5)),
    "ImmediateRepetition": lambda: beside(lossmith.ImmediateRepetition()),
    "MTP": lambda: beside(lossmith.MTP(V, num_future_tokens=2), Stacked),
    "MoEBalance": lambda: beside(lossmith.MoEBalance(E, top_k=2)),
    "NgramRepetition": lambda: beside(lossmith.NgramRepetition(2, 4)),
    "RouterZLoss": lambda: beside(lossmith.RouterZLoss()),
    "ZLoss": lambda: beside(lossmith.ZLoss()),
    # objectives
    "AdaptiveCrossEntropyLoss": lambda: lossmith.AdaptiveCrossEntropyLoss(z_loss=0.1, threshold=0.4),
    "AdaptiveMTPLoss": lambda: lossmith.AdaptiveMTPLoss(V),
    "AntiRepetitionLoss": lambda: lossmith.AntiRepetitionLoss(V, 2, ngram_size=2),
    "ComposedLoss": lambda: lossmith.ComposedLoss(lossmith.CrossEntropyLoss(), {"z": lossmith.ZLoss()}),
    "CrossEntropyLoss": lambda: lossmith.CrossEntropyLoss(class_weight=torch.linspace(0.5, 2, V).double()),
    "DeepSeekLoss": lambda: lossmith.DeepSeekLoss(V, num_experts=E),
    "LossModifierPipeline": lambda: modified(lossmith.TargetSmoothingModifier({})),
    "NVAMPLoss": lambda: lossmith.NVAMPLoss(gamma=0.3, top_k=2),
    "Objective": lambda: lossmith.Objective([Term("nll", lambda s, b: s.nll, reads=("nll",), scope="token")]),
    "UnifiedLoss": lambda: lossmith.UnifiedLoss(V, use_focal_loss=True, pad_token_id=1),
    "WrappedObjective": lambda: lossmith.WrappedObjective(lossmith.CrossEntropyLoss()),
}
# means over tokens that are not those of the targets, and statistics of the batch
OF_THE_BATCH = {"Contrastive", "ExpertDiversity", "MoEBalance", "RouterZLoss", "DeepSeekLoss", "NVAMPLoss"}


def given_to(criterion) -> dict:
    rng = torch.Generator().manual_seed(3)
    every = {
        "gate_logits": torch.randn(B, T, E, generator=rng).double(),
        "expert_outputs": torch.randn(B, T, E, D, generator=rng).double(),
        "contrastive_pairs": torch.randn(B, 2, D, generator=rng).double(),
        "additional_logits": torch.randn(B, 2, T, V, generator=rng).double(),
        "confidence_scores": torch.rand(B, T, generator=rng).double(),
    }
    return {name: value for name, value in every.items() if name in criterion.wanted_inputs}


@pytest.mark.filterwarnings("ignore:.* is UnifiedLoss:DeprecationWarning")
@pytest.mark.parametrize("name", PROMISES)
def test_every_public_objective_and_component_keeps_its_promises(name):
    criterion = PROMISES[name]()
    assert any(type(module) is getattr(lossmith, name) for module in criterion.modules())
    inputs = given_to(criterion)
    if name == "AdaptiveMTPLoss":
        del inputs["additional_logits"]  # read where they are given
    options = {"num_classes": V, "shape": (B, T), "inputs": inputs}
    check_objective(criterion, adds_up=name not in OF_THE_BATCH, **options)
    if name in OF_THE_BATCH:
        with pytest.raises(AssertionError, match="micro-batches do not add up"):
            check_objective(criterion, **options)


def public(*kinds: type) -> set[str]:
    found = {name: getattr(lossmith, name) for name in lossmith.__all__}
    return {name for name, value in found.items() if isinstance(value, type) and issubclass(value, kinds)}


def test_no_public_objective_nor_component_is_forgotten():
    assert set(PROMISES) == public(lossmith.Objective, lossmith.Component) - {"Component"}


# every loss in lossmith/terms that is made of statistics
TERMS = {
    "calibration": Term("t", confidence_weight.calibration, reads=("unscaled.correct",), scope="token"),
    "confidence": Term(
        "t",
        lambda s, b: s.nll,
        token_weight=lambda s, b: confidence_weight.confidence_weight(confidence_weight.confidence(s, b)),
        reads=("nll", "unscaled.top_prob"),
        scope="token",
    ),
    "confidence_penalty": lossmith.ConfidencePenalty().term(),
    "cross_entropy": Term(
        "t", lambda s, b: terms_cross_entropy.cross_entropy(s), reads=("nll",), scope="token"
    ),
    "focal": lossmith.Focal(0.5).term(),
    "smooth": Term(
        "t",
        lambda s, b: terms_cross_entropy.smooth(s.nll, s, b, label_smoothing=0.1, special_tokens=(1,)),
        reads=("nll", "total_nll", "num_finite"),
        scope="token",
    ),
    "unlikelihood": lossmith.NgramRepetition(1, 3).term(),
    "z_loss": lossmith.ZLoss().term(),
}


@pytest.mark.parametrize("name", TERMS)
def test_every_loss_of_a_token_keeps_its_promises(name):
    scores = {"confidence_scores": torch.rand(B, T, dtype=torch.float64)}
    for features in ({}, scores) if name == "confidence" else (scores,):
        check_term(TERMS[name], num_classes=V, shape=(B, T), features=features)


def test_no_loss_of_a_token_is_forgotten():
    found = set()
    for info in pkgutil.iter_modules(terms.__path__, "lossmith.terms."):
        for name, value in vars(importlib.import_module(info.name)).items():
            is_own = inspect.isfunction(value) and value.__module__ == info.name
            if is_own and "stats" in inspect.signature(value).parameters:
                found.add(name)
    assert found == set(TERMS)


def test_a_term_that_wants_several_tokens_is_told_before_a_head_gives_it_few():
    third = Term("third", lambda s, b: s.nll + 0 * s.nll[2], reads=("nll",), scope="token")
    with pytest.raises(AssertionError, match=r"'third' has scope='token'.*it fails on some tokens alone"):
        check_term(third)
