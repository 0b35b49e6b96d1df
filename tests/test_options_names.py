"""An unknown name is answered with the nearest one, or with all of them: by one matcher, everywhere."""

import ast
from pathlib import Path

import pytest
import torch

import lossmith
from lossmith import CrossEntropyLoss, Objective, Term, UnifiedLoss
from lossmith.options import is_misspelt, nearest

SOURCE = Path(lossmith.__file__).parent
LOGITS, TARGETS = torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.long)
MODULES = {
    "module": CrossEntropyLoss(),
    "objective": Objective([Term("nll", lambda s, b: s.nll)]),
    "unified": UnifiedLoss(5),
    "pipeline": lossmith.LossModifierPipeline(),
}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("given", "meant"),
    [({"logits": LOGITS, "labels": TARGETS}, "targets"), ({"input": LOGITS, "target": TARGETS}, "logits")],
)
def test_what_other_libraries_call_logits_and_targets(module, given, meant):
    with pytest.raises(TypeError, match=rf"has no option '\w+'\. Did you mean '{meant}'"):
        MODULES[module](**given)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("weight", "class_weight"), ("lse_square_scale", "z_loss"), ("gamma", "focal_gamma"), ("ls", None)],
)
def test_what_other_libraries_call_an_option(given, meant):
    said = rf"Did you mean '{meant}'" if meant else "Did you mean 'label_smoothing'"
    for function in (lambda **o: lossmith.cross_entropy(LOGITS, TARGETS, **o), CrossEntropyLoss):
        with pytest.raises(TypeError, match=said):
            function(**{given: 0.1})


@pytest.mark.parametrize("name", ["confidence_reg_strength", "epochs", "temp", "num_heads", "xyzzy"])
def test_a_bad_guess_is_worse_than_the_list(name):
    with pytest.raises(TypeError, match=rf"has no option '{name}'\. It has .*eos_token_id.*vocab_size"):
        UnifiedLoss(5, **{name: 1})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("eos_id", "eos_token_id"),
        ("pad_id", "pad_token_id"),
        ("EOS_TOKEN_ID", "eos_token_id"),
        ("mtp-weight", "mtp_weight"),
        ("use_ngram_penality", "use_ngram_penalty"),
        ("num_future_token", "num_future_tokens"),
        ("smoothing", "label_smoothing"),
        ("contrast_margin", "contrastive_margin"),
        ("repetition_penalty", "use_immediate_repetition_penalty"),
    ],
)
def test_a_good_guess(name, meant):
    with pytest.raises(TypeError, match=rf"Did you mean '{meant}'"):
        UnifiedLoss(5, **{name: 1})


def test_an_option_of_the_base_is_an_option_too():
    for given, meant in (("treshold", "threshold"), ("label_smothing", "label_smoothing")):
        with pytest.raises(TypeError, match=rf"AdaptiveCrossEntropyLoss has .*Did you mean '{meant}'"):
            lossmith.AdaptiveCrossEntropyLoss(**{given: 0.1})


def test_nearest_by_itself():
    assert nearest("lr", ["learning_rate", "log_interval"]) == "learning_rate"
    assert nearest("input", ["logits", "input_ids"]) == "logits"
    assert nearest("token", ["eos_token_id", "pad_token_id"]) is None  # of both alike
    assert nearest("anything", []) is None


def test_what_can_be_somebody_elses_is_no_misspelling():
    known = ["target_smoothing_mode", "entropy_modifier_weight", "mask"]
    assert is_misspelt("entropy_modifer_weight", known)
    assert not any(
        is_misspelt(name, known) for name in ("smoothing_mode", "entropy_weight", "labels", "task")
    )


def test_there_is_one_matcher():
    importing = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            if "difflib" in names or getattr(node, "module", None) == "difflib":
                importing.append(path.name)
    assert importing == ["matching.py"]
