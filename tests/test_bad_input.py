"""Mistakes are answered with what was expected, what came and what to do."""

import inspect

import pytest
import torch

import lossmith
from lossmith import CrossEntropyLoss, Objective, Term

LOGITS, TARGETS = torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.long)

# Every way in from logits and targets: all of them must check the same things.
ENTRANCES = {
    "cross_entropy": lossmith.cross_entropy,
    "token_stats": lambda logits, targets: lossmith.token_stats(logits, targets).nll,
    "module": CrossEntropyLoss(),
    "objective": Objective([Term("nll", lambda s, b: s.nll)]),
    "accumulator": lambda logits, targets: lossmith.Perplexity().update(logits, targets),
}


@pytest.fixture(params=ENTRANCES)
def enter(request):
    return ENTRANCES[request.param]


# -- logits and targets ---------------------------------------------------------------------------


def test_shapes_that_do_not_match(enter):
    with pytest.raises(
        ValueError, match=r"expected targets of shape \[2, 3\] for logits \[2, 3, 5\].*got \[2, 4\]"
    ):
        enter(LOGITS, torch.ones(2, 4, dtype=torch.long))


def test_classes_in_dimension_one(enter):
    with pytest.raises(ValueError, match=r"classes seem to be in dimension 1; pass logits\.movedim\(1, -1\)"):
        enter(torch.zeros(2, 5, 3), TARGETS)


def test_one_hot_targets(enter):
    with pytest.raises(ValueError, match=r"got \[2, 3, 5\].*Pass class ids, not one-hot"):
        enter(LOGITS, torch.ones(2, 3, 5, dtype=torch.long))


def test_flattened_on_one_side_only(enter):
    with pytest.raises(ValueError, match=r"got \[6\].*numbers of tokens agree; reshape"):
        enter(LOGITS, TARGETS.reshape(-1))


@pytest.mark.parametrize("value", [5, 99, -1, -101, 2**40])
def test_targets_out_of_range_are_named_with_their_position(enter, value):
    targets = TARGETS.clone()
    targets[1, 2] = value
    with pytest.raises(ValueError, match=rf"class ids in \[0, 5\) or .*; got {value} at position \(1, 2\)"):
        enter(LOGITS, targets)


def test_the_position_is_that_in_the_callers_labels_when_they_are_shifted():
    targets = TARGETS.clone()
    targets[1, 2] = 7
    with pytest.raises(ValueError, match=r"got 7 at position \(1, 2\)"):
        lossmith.cross_entropy(LOGITS, targets, shift=True)


def test_out_of_range_targets_do_no_harm_where_they_do_not_count():
    targets = TARGETS.clone()
    targets[1, 2] = 99
    lossmith.cross_entropy(LOGITS, targets, ignore_index=99)
    lossmith.cross_entropy(LOGITS, targets, mask=targets != 99)


def test_a_single_target_out_of_range():
    with pytest.raises(ValueError, match="got 9"):
        lossmith.cross_entropy(torch.zeros(5), torch.tensor(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64], ids=str)
def test_targets_that_are_not_ids(enter, dtype):
    with pytest.raises(TypeError, match=rf"targets must be integer class ids.*got {dtype}.*label_smoothing"):
        enter(LOGITS, TARGETS.to(dtype))


def test_targets_and_logits_that_are_not_tensors(enter):
    with pytest.raises(TypeError, match="targets must be a tensor of class ids; got list"):
        enter(LOGITS, [[1, 1, 1], [1, 1, 1]])
    with pytest.raises(TypeError, match=r"logits must be a tensor.*got list"):
        enter([[0.0, 1.0]], torch.tensor([1]))


def test_integer_logits(enter):
    with pytest.raises(TypeError, match=r"logits must be floating point; got torch\.int64"):
        enter(LOGITS.long(), TARGETS)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_a_batch_without_tokens(enter, shape):
    with pytest.raises(ValueError, match=r"empty batch.*hold no token.*ignore_index"):
        enter(torch.zeros(shape), torch.zeros(shape[:-1], dtype=torch.long))


def test_logits_and_targets_on_two_devices(enter):
    with pytest.raises(ValueError, match="logits are on cpu but targets on meta; move one of them"):
        enter(LOGITS, TARGETS.to("meta"))
    with pytest.raises(ValueError, match="logits are on meta but targets on cpu; move one of them"):
        enter(LOGITS.to("meta"), TARGETS)


def test_candidates_on_another_device():
    candidates = TARGETS.unsqueeze(-1).to("meta")
    with pytest.raises(ValueError, match="candidates are on meta but targets on cpu; move one of them"):
        lossmith.token_stats(LOGITS, TARGETS, candidates=candidates)
    term = Term("t", lambda s, b: s.candidate_logits.sum(-1), candidates=lambda b: candidates.reshape(6, 1))
    with pytest.raises(ValueError, match="candidates of the term 't' are on meta but targets on cpu"):
        Objective([term])(LOGITS, TARGETS)


def test_a_vocabulary_without_classes(enter):
    with pytest.raises(ValueError, match=r"V >= 1; got \[2, 0\]"):
        enter(torch.zeros(2, 0), torch.zeros(2, dtype=torch.long))


def test_a_scalar_for_logits(enter):
    with pytest.raises(ValueError, match=r"logits must be \[\.\.\., V\]"):
        enter(torch.tensor(1.0), torch.tensor(0))


# -- options ----------------------------------------------------------------------------------------

OUT_OF_RANGE = [
    ("label_smoothing", 1.0, r"label_smoothing must be a number >= 0 and < 1; got 1"),
    ("label_smoothing", -0.1, r"label_smoothing must be a number >= 0 and < 1; got -0\.1"),
    ("label_smoothing", float("nan"), r"label_smoothing must be a number >= 0 and < 1; got nan"),
    (
        "smoothing_mode",
        "exclude",
        r"smoothing_mode must be one of 'uniform', 'exclude_target'; got 'exclude'",
    ),
    ("special_tokens", ["<s>"], r"special_tokens must be token ids >= 0; got '<s>'"),
    ("temperature", 0.0, r"temperature must be a number.* >= 1e-20.*; got 0"),
    ("temperature", -1.0, r"temperature must be a number.* >= 1e-20.*; got -1"),
    ("temperature", float("nan"), r"temperature must be a number.* >= 1e-20.*; got nan"),
    ("softcap", 0.0, r"softcap must be a number >= 1e-20.* or None; got 0"),
    ("focal_gamma", -1.0, r"focal_gamma must be .*>= 0; got -1"),
    ("focal_gamma", float("nan"), r"focal_gamma must be .*>= 0; got nan"),
    ("z_loss", float("nan"), r"z_loss must be .*; got nan"),
    ("confidence_penalty", float("inf"), r"confidence_penalty must be .*; got inf"),
    ("reduction", "average", r"reduction must be one of 'mean', .*'none'; got 'average'"),
    ("empty", "skip", r"empty must be one of 'zero', 'nan'; got 'skip'"),
]


@pytest.mark.parametrize(("name", "value", "message"), OUT_OF_RANGE, ids=lambda x: str(x)[:20])
def test_options_out_of_range(name, value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lossmith.cross_entropy(LOGITS, TARGETS, **{name: value})
    with pytest.raises((TypeError, ValueError), match=message):
        CrossEntropyLoss(**{name: value})


MISSPELT = [
    ("label_smothing", "label_smoothing"),
    ("ignore_idx", "ignore_index"),
    ("focal_gama", "focal_gamma"),
    ("zloss", "z_loss"),
    ("class_weights", "class_weight"),
    ("reducton", "reduction"),
    ("temprature", "temperature"),
]


@pytest.mark.parametrize(("given", "meant"), MISSPELT)
def test_unknown_options_name_the_nearest(given, meant):
    for function in (lambda **o: lossmith.cross_entropy(LOGITS, TARGETS, **o), CrossEntropyLoss):
        with pytest.raises(TypeError, match=f"no option '{given}'") as error:
            function(**{given: 0.1})
        assert meant in str(error.value)


def test_an_option_like_none_known_lists_them_all():
    with pytest.raises(TypeError, match=r"cross_entropy has no option 'qqqq'.*label_smoothing.*z_loss"):
        lossmith.cross_entropy(LOGITS, TARGETS, qqqq=1)


@pytest.mark.parametrize("function", [lossmith.cross_entropy, lossmith.token_stats, lossmith.ranking_loss])
def test_options_are_keyword_only(function):
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in list(parameters)[2:])


@pytest.mark.parametrize("call", [CrossEntropyLoss(), Objective([Term("nll", lambda s, b: s.nll)])])
def test_unknown_inputs_of_a_module_are_not_dropped(call):
    with pytest.raises(TypeError, match="attention_msk"):
        call(LOGITS, TARGETS, attention_msk=torch.ones(2, 3))


def test_class_weights_of_another_vocabulary():
    with pytest.raises(ValueError, match=r"class_weight must be \[V\] = \[5\]; got \[4\]"):
        lossmith.cross_entropy(LOGITS, TARGETS, class_weight=torch.ones(4))
    with pytest.raises((TypeError, ValueError), match="class_weight"):
        lossmith.cross_entropy(LOGITS, TARGETS, class_weight=[1.0] * 5)


@pytest.mark.parametrize(("name", "dtype"), [("mask", torch.bool), ("token_weight", torch.float)])
def test_masks_and_weights_of_another_shape(name, dtype):
    with pytest.raises(ValueError, match=rf"{name} must have the targets' shape \[2, 3\]; got \[3, 2\]"):
        lossmith.cross_entropy(LOGITS, TARGETS, **{name: torch.ones(3, 2, dtype=dtype)})


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, float("nan")])
def test_a_floating_point_mask_of_something_else_than_0_and_1(value):
    mask = torch.ones(2, 3)
    mask[1, 2] = value
    message = rf"mask must be 0 or 1 .*; got {value} at position \(1, 2\).*[Pp]ass weights as token_weight"
    with pytest.raises(ValueError, match=message):
        lossmith.cross_entropy(LOGITS, TARGETS, mask=mask)


def test_masks_and_weights_that_are_not_tensors():
    for name in ("mask", "token_weight"):
        with pytest.raises(TypeError, match=name):
            lossmith.cross_entropy(LOGITS, TARGETS, **{name: [[1, 1, 1], [1, 1, 1]]})


@pytest.mark.parametrize("value", [-1, float("nan")])
def test_a_denominator_that_counts_nothing_sensible(value):
    with pytest.raises(ValueError, match="denominator"):
        lossmith.cross_entropy(LOGITS, TARGETS, denominator=value)


# -- candidates and terms ---------------------------------------------------------------------------


def test_candidates():
    with pytest.raises(
        ValueError, match=r"candidates must be \[\.\.\., K\] ids for targets \[2, 3\]; got \[2, 3\].*-1"
    ):
        lossmith.token_stats(LOGITS, TARGETS, candidates=TARGETS)
    with pytest.raises(TypeError, match=r"candidates must be integer class ids; got torch\.float32"):
        lossmith.token_stats(LOGITS, TARGETS, candidates=torch.ones(2, 3, 1))


@pytest.mark.parametrize("name", ["candidate_logits", "candidate_log1m_prob"])
def test_statistics_of_candidates_that_were_not_given(name):
    with pytest.raises(ValueError, match=r"candidates=\[\.\.\., K\]"):
        getattr(lossmith.token_stats(LOGITS, TARGETS), name)


@pytest.mark.parametrize("value", [5, -2])
def test_candidates_out_of_range(value):
    candidates = torch.zeros(2, 3, 2, dtype=torch.long)
    candidates[1, 2, 0] = value
    with pytest.raises(ValueError, match=rf"candidates.*got {value}"):
        _ = lossmith.token_stats(LOGITS, TARGETS, candidates=candidates).candidate_logits


def test_temperatures_of_a_call_to_token_stats():
    for options in ({"temperature": 0.0}, {"softcap": -2.0}):
        with pytest.raises(ValueError, match=r"must be .* >= 1e-20"):
            lossmith.token_stats(LOGITS, TARGETS, **options)
    with pytest.raises(TypeError, match="Did you mean 'temperature'"):
        lossmith.token_stats(LOGITS, TARGETS, temprature=2.0)


def test_terms_of_one_name_are_refused_rather_than_dropped():
    nll = Term("nll", lambda s, b: s.nll)
    with pytest.raises(ValueError, match="nll"):
        Objective([nll, Term("nll", lambda s, b: s.entropy)])(LOGITS, TARGETS)
    with pytest.raises(ValueError, match="nll"):
        Objective([nll]).evaluate(LOGITS, TARGETS, scalars={"nll": torch.tensor(1.0)})


def test_terms_that_reduce():
    with pytest.raises(ValueError, match=r"(?s)mean.*\[6\].*\[\]|per.token"):
        Objective([Term("mean", lambda s, b: s.nll.mean())])(LOGITS, TARGETS)
