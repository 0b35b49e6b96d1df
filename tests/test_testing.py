"""``check_term``: every term of the library keeps its promises, and a term that breaks one is told which."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import lossmith
from lossmith import Term
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
    check_objective((OBJECTIVES | OF_THE_WHOLE_BATCH)[name], adds_up=adds_up)


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
