"""Values that mean nothing are refused by name: of another type, not finite, or out of range."""

import math

import pytest
import torch

import lossmith
from lossmith import CrossEntropyLoss, NVAMPLoss, Objective, Term, UnifiedLoss
from lossmith.engine.head.linear_head import LinearHead

V, D = 5, 4
LOGITS, TARGETS = torch.zeros(2, 3, V), torch.ones(2, 3, dtype=torch.long)
HIDDEN, WEIGHT = torch.zeros(2, 3, D), torch.zeros(V, D)
NAN, INF = math.nan, math.inf

# Every way in from the options of cross-entropy: all of them must refuse the same.
ENTRANCES = {
    "cross_entropy": lambda **options: lossmith.cross_entropy(LOGITS, TARGETS, **options),
    "linear_cross_entropy": lambda **options: lossmith.linear_cross_entropy(
        HIDDEN, WEIGHT, TARGETS, **options
    ),
    "explain": lambda **options: lossmith.linear_cross_entropy.explain(HIDDEN, WEIGHT, TARGETS, **options),
    "CrossEntropyLoss": CrossEntropyLoss,
    "AdaptiveCrossEntropyLoss": lossmith.AdaptiveCrossEntropyLoss,
}

NONSENSE = [
    ("shift", "False"),
    ("shift", 2.5),
    ("shift", -1),
    ("label_smoothing", True),
    ("label_smoothing", "0.1"),
    ("label_smoothing", torch.tensor(0.1)),
    ("label_smoothing", None),
    ("temperature", 1e-38),
    ("temperature", INF),
    ("temperature", "1"),
    ("temperature", True),
    ("temperature", torch.tensor(0.0)),
    ("temperature", torch.tensor(-1.0)),
    ("temperature", torch.tensor(NAN)),
    ("temperature", torch.tensor(True)),
    ("temperature", torch.ones(2)),
    ("softcap", INF),
    ("softcap", NAN),
    ("softcap", 1e-40),
    ("softcap", "30"),
    ("softcap", False),
    ("z_loss", NAN),
    ("z_loss", INF),
    ("z_loss", 1e39),
    ("z_loss", "1"),
    ("z_loss", False),
    ("focal_gamma", INF),
    ("focal_gamma", True),
    ("confidence_penalty", -INF),
    ("confidence_penalty", [0.1]),
    ("class_weight", torch.ones(V, 1)),
    ("class_weight", torch.ones(V, dtype=torch.long)),
    ("class_weight", torch.tensor([1.0, 1.0, INF, 1.0, 1.0])),
    ("class_weight", torch.tensor([1.0, 1.0, NAN, 1.0, 1.0])),
    ("class_weight", [1.0] * V),
    ("special_tokens", "12"),
    ("special_tokens", [-1]),
    ("special_tokens", [True]),
    ("special_tokens", [1.0]),
    ("special_tokens", 1),
    ("special_tokens", torch.tensor([1])),
    ("ignore_index", "-100"),
    ("ignore_index", -100.0),
    ("ignore_index", True),
    ("ignore_index", None),
    ("ignore_index", 2**63),
    ("reduction", "average"),
    ("reduction", None),
    ("reduction", True),
    ("empty", "skip"),
    ("empty", 0),
    ("smoothing_mode", "exclude"),
    ("smoothing_mode", ["uniform"]),
]


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(("name", "value"), NONSENSE, ids=lambda x: str(x)[:24])
def test_an_option_of_cross_entropy_that_means_nothing(entrance, name, value):
    with pytest.raises((TypeError, ValueError), match=rf"\b{name} must be .*; got "):
        ENTRANCES[entrance](**{name: value})


OF_A_BATCH = [
    ("denominator", "6"),
    ("denominator", True),
    ("denominator", INF),
    ("denominator", [6]),
    ("denominator", torch.tensor(NAN)),
    ("denominator", torch.tensor(INF)),
    ("denominator", torch.tensor(-1)),
    ("denominator", torch.tensor(True)),
    ("denominator", torch.tensor(1j)),
    ("denominator", torch.ones(2)),
    ("token_weight", torch.ones(2, 3, dtype=torch.bool)),
    ("token_weight", torch.ones(2, 3, dtype=torch.complex64)),
    ("token_weight", [[1.0] * 3] * 2),
    ("mask", [[1] * 3] * 2),
    ("return_stats", "no"),
    ("return_stats", 1),
]
OF_A_HEAD = [
    ("strategy", "once"),
    ("strategy", None),
    ("memory_budget", 0),
    ("memory_budget", 2.5e6),
    ("memory_budget", "1e6"),
    ("memory_budget", True),
]


@pytest.mark.parametrize("entrance", ["cross_entropy", "linear_cross_entropy", "explain"])
@pytest.mark.parametrize(("name", "value"), OF_A_BATCH, ids=lambda x: str(x)[:24])
def test_an_input_of_a_batch_that_means_nothing(entrance, name, value):
    with pytest.raises((TypeError, ValueError), match=rf"\b{name} must be "):
        ENTRANCES[entrance](**{name: value})


@pytest.mark.parametrize("entrance", ["linear_cross_entropy", "explain"])
@pytest.mark.parametrize(("name", "value"), OF_A_HEAD, ids=lambda x: str(x)[:24])
def test_an_option_of_a_head_that_means_nothing(entrance, name, value):
    with pytest.raises((TypeError, ValueError), match=rf"\b{name} must be "):
        ENTRANCES[entrance](**{name: value})


@pytest.mark.parametrize(
    "value", ["6", True, INF, -1, torch.tensor(NAN), torch.tensor(-1), torch.tensor(True)]
)
@pytest.mark.parametrize("name", ["denominator", "num_items_in_batch"])
def test_a_denominator_given_to_a_module(name, value):
    with pytest.raises((TypeError, ValueError), match="denominator must be "):
        CrossEntropyLoss()(LOGITS, TARGETS, **{name: value})


@pytest.mark.parametrize("value", ["-100", 1.5, True])
def test_an_ignore_index_of_one_call(value):
    pipeline = lossmith.LossModifierPipeline([lossmith.EntropyModifier({})])
    for call in (CrossEntropyLoss().count, lambda t, **options: pipeline.modify_loss(LOGITS, t, **options)):
        with pytest.raises(TypeError, match=r"ignore_index must be .*a whole number; got"):
            call(TARGETS, ignore_index=value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64], ids=str)
def test_token_weights_given_to_a_module(dtype):
    with pytest.raises(TypeError, match="token_weight must be a tensor of numbers"):
        CrossEntropyLoss()(LOGITS, TARGETS, token_weight=torch.ones(2, 3, dtype=dtype))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strategy", "once"),
        ("memory_budget", "1e6"),
        ("lm_head_softcap", INF),
        ("lm_head_softcap", "30"),
        ("lm_head_scale", NAN),
        ("lm_head_scale", "2"),
        ("lm_head_scale", True),
    ],
)
def test_an_input_of_the_head_of_a_module(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"\b{name} must be "):
        CrossEntropyLoss()(targets=TARGETS, hidden_states=HIDDEN, lm_head_weight=WEIGHT, **{name: value})


@pytest.mark.parametrize("softcap", [0.0, INF, NAN, 1e-40, "30"])
def test_a_cap_of_a_head(softcap):
    with pytest.raises((TypeError, ValueError), match=r"softcap must be "):
        LinearHead(HIDDEN, WEIGHT, softcap=softcap)


OF_OTHERS = {
    "scope": lambda: Term("nll", lambda s, b: s.nll, scope="tokens"),
    "coefficient": lambda: Term("nll", lambda s, b: s.nll, NAN),
    "loss": lambda: Term("nll", "nll"),
    "name": lambda: Term(lambda s, b: s.nll, lambda s, b: s.nll),
    "stats_scope": lambda: NVAMPLoss(stats_scope="all"),
    "top_k": lambda: NVAMPLoss(top_k=True),
    "eps": lambda: NVAMPLoss(eps=0.0),
    "alpha": lambda: NVAMPLoss(INF),
    "beta": lambda: NVAMPLoss(beta="0.02"),
    "legacy": lambda: NVAMPLoss(legacy="no"),
    "shift": lambda: Objective(shift="False"),
    "vocab_size": lambda: UnifiedLoss(vocab_size="50257"),
    "hidden_size": lambda: UnifiedLoss(V, 2.0),
    "primary_loss_type": lambda: UnifiedLoss(V, None, None),
    "use_mtp": lambda: UnifiedLoss(V, use_mtp="False"),
    "mtp_weight": lambda: UnifiedLoss(V, D, use_mtp=True, mtp_weight=INF),
    "ngram_size": lambda: UnifiedLoss(V, ngram_size=0),
    "ngram_penalty_weight": lambda: UnifiedLoss(V, ngram_penalty_weight=NAN),
    "temperature_bounds": lambda: UnifiedLoss(V, temperature_bounds=(2.0, 0.5)),
    "adaptive_weight_range": lambda: UnifiedLoss(V, adaptive_weight_range=(0.5, INF)),
    "adaptive_threshold": lambda: UnifiedLoss(V, adaptive_threshold=1.0),
    "eos_token_id": lambda: UnifiedLoss(V, eos_token_id=-1),
    "pad_token_id": lambda: UnifiedLoss(V, pad_token_id="0"),
    "num_experts": lambda: UnifiedLoss(V, use_moe_balancing=True, num_experts=True),
    "target_expert_usage": lambda: UnifiedLoss(V, target_expert_usage="even"),
    "focal_gamma": lambda: UnifiedLoss(V, focal_gamma=-1.0),
    "threshold": lambda: lossmith.ImmediateRepetition("2"),
    "window_size": lambda: lossmith.NgramRepetition(4, 8.0),
    "min_length": lambda: lossmith.EarlyEOS(0, -1),
    "gamma": lambda: lossmith.Focal(NAN),
    "margin": lambda: lossmith.Contrastive(margin=INF),
    "bias_update_rate": lambda: lossmith.MoEBalance(4, bias_update_rate="0.1"),
    "num_future_tokens": lambda: lossmith.MTP(V, num_future_tokens=True),
    "weight_range": lambda: lossmith.MTP(V, weight_range=(0.5, 1.0, 1.5)),
    "weight": lambda: lossmith.Weighted(lossmith.ZLoss(), "1"),
    "component": lambda: lossmith.Weighted(lossmith.ZLoss),
    "window": lambda: lossmith.AdaptiveTemperature(window=2.5),
    "bounds": lambda: lossmith.AdaptiveTemperature(bounds=(0.0, 2.0)),
    "rate": lambda: lossmith.AdaptiveTemperature(rate=NAN),
    "initial": lambda: lossmith.AdaptiveTemperature("1"),
    "ignore_index": lambda: lossmith.Perplexity(ignore_index="-100"),
    "softcap": lambda: lossmith.Perplexity(softcap=INF),
    "temperature": lambda: lossmith.token_stats(LOGITS, TARGETS, temperature=torch.tensor(0.0)),
    "candidates": lambda: lossmith.token_stats(LOGITS, TARGETS, candidates=[[[1]] * 3] * 2),
    "reduction": lambda: lossmith.ranking_loss(LOGITS, LOGITS, reduction="sequence_mean"),
    "positive": lambda: lossmith.ranking_loss([1.0], LOGITS),
    "model_mode": lambda: lossmith.LossModifierPipeline(model_mode=1),
    "base": lambda: lossmith.LossModifierPipeline(base=torch.nn.CrossEntropyLoss()),
    "primary": lambda: lossmith.ComposedLoss(torch.nn.CrossEntropyLoss()),
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_an_option_of_another_constructor_that_means_nothing(name):
    with pytest.raises((TypeError, ValueError), match=rf"\b{name} must be .*; got "):
        OF_OTHERS[name]()


# ── ids and the vocabulary ─────────────────────────────────────────────────────────────────────────


def test_special_tokens_beyond_the_vocabulary():
    for options in ({"label_smoothing": 0.1}, {}):
        with pytest.raises(ValueError, match=r"special_tokens.* 5 .*V=5"):
            lossmith.cross_entropy(LOGITS, TARGETS, special_tokens=[1, 5], **options)
    with pytest.raises(ValueError, match=r"special_tokens.* 9.* 5"):
        lossmith.TargetSmoothingModifier({"special_tokens": [9]}).modify_loss(LOGITS, TARGETS)


def test_the_end_of_a_text_beyond_the_vocabulary():
    with pytest.raises(ValueError, match=r"eos_token_id=5 .*vocab_size=5"):
        UnifiedLoss(5, eos_token_id=5)
    objective = lossmith.ComposedLoss(CrossEntropyLoss(), {"eos": lossmith.EarlyEOS(7)})
    with pytest.raises(ValueError, match=r"eos_token_id=7 .*V=5"):
        objective(LOGITS, TARGETS)


# ── what must stay possible ────────────────────────────────────────────────────────────────────────


def test_what_is_right_is_taken():
    numpy = pytest.importorskip("numpy")
    plain = lossmith.cross_entropy(LOGITS, TARGETS, label_smoothing=0.25, special_tokens=(1, 2), softcap=30)
    for options in (
        {"label_smoothing": numpy.float32(0.25), "special_tokens": [numpy.int64(1), 2]},
        {"label_smoothing": numpy.float64(0.25), "special_tokens": {1, 2}},
    ):
        found = lossmith.cross_entropy(LOGITS, TARGETS, softcap=numpy.int32(30), **options)
        assert torch.equal(found, plain)
    halved = lossmith.cross_entropy(LOGITS, TARGETS, denominator=numpy.int64(12))
    torch.testing.assert_close(halved, lossmith.cross_entropy(LOGITS, TARGETS) / 2)
    for denominator in (0, 6, 6.0, torch.tensor(6), torch.tensor([6.0])):
        lossmith.cross_entropy(LOGITS, TARGETS, denominator=denominator)
    for temperature in (1, 0.5, torch.tensor(2), torch.tensor([0.5])):
        lossmith.cross_entropy(LOGITS, TARGETS, temperature=temperature)
    for shift in (True, False, 0, 1):
        CrossEntropyLoss(shift=shift)
    lossmith.cross_entropy(LOGITS, TARGETS, token_weight=torch.ones(2, 3, dtype=torch.long))
    lossmith.cross_entropy(LOGITS, TARGETS, ignore_index=numpy.int64(-1), z_loss=-1, confidence_penalty=0)
    lossmith.cross_entropy(LOGITS, TARGETS, class_weight=torch.ones(V, dtype=torch.bfloat16))
    lossmith.AdaptiveCrossEntropyLoss(weight_range=[0.5, 1.5])


def test_a_message_says_whose_option_what_is_expected_and_what_came():
    with pytest.raises(
        ValueError, match=r"^cross_entropy: label_smoothing must be a number >= 0 and < 1; got 1.5"
    ):
        lossmith.cross_entropy(LOGITS, TARGETS, label_smoothing=1.5)
    with pytest.raises(TypeError, match=r"^CrossEntropyLoss: label_smoothing must be .*; got True \(bool\)"):
        CrossEntropyLoss(label_smoothing=True)
    with pytest.raises(TypeError, match=r"^NVAMPLoss: top_k must be a whole number >= 1; got '3' \(str\)"):
        NVAMPLoss(top_k="3")
    with pytest.raises(
        ValueError, match=r"^UnifiedLoss: mtp_type must be one of 'deepseek', 'adaptive'; got 'x'"
    ):
        UnifiedLoss(V, mtp_type="x")

    class Mine(NVAMPLoss):
        pass

    with pytest.raises(ValueError, match=r"^Mine: eps must be a number > 0; got 0"):
        Mine(eps=0)


@pytest.mark.parametrize(
    "options", [{"shift": "False"}, {"softcap": INF}, {"label_smoothing": True}], ids=str
)
def test_a_compiled_loss_refuses_the_same(options):
    compiled = torch.compile(lambda z, t: lossmith.cross_entropy(z, t, **options), backend="eager")
    with pytest.raises((TypeError, ValueError), match=rf"^cross_entropy: {next(iter(options))} must be "):
        compiled(LOGITS, TARGETS)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_values_of_tensors_of_another_precision(dtype):
    weight = torch.tensor([1.0, 1.0, INF, 1.0, 1.0], dtype=dtype)
    with pytest.raises(ValueError, match=r"class_weight must be .* got a tensor \[5\] .* from 1\.0 to inf"):
        CrossEntropyLoss(class_weight=weight)
    for wrong in (0.0, -1.0, NAN, INF):
        with pytest.raises(ValueError, match=r"temperature must be .* >= 1e-20 .*got a tensor \[\] of"):
            CrossEntropyLoss(temperature=torch.tensor(wrong, dtype=dtype))
    CrossEntropyLoss(class_weight=torch.ones(V, dtype=dtype), temperature=torch.tensor(0.5, dtype=dtype))
