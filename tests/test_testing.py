"""``check_term``: every term of the library keeps its promises, and a term that breaks one is told which."""

import pytest
import torch
from torch import nn

import lossmith
from lossmith import Term
from lossmith.testing import check_term

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
