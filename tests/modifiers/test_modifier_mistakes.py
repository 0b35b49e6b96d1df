"""What a user may get wrong in making modifiers and pipelines: an error that says what to write."""

import dataclasses
import math
import pickle
from typing import Annotated

import pytest
import torch

import lossmith
from lossmith import (
    BaseLossModifier,
    CrossEntropyLoss,
    EntropyModifier,
    LossModifierPipeline,
    MaskRatioWeightModifier,
    MetricsCollectorModifier,
    SequenceScorerVarianceModifier,
    SequenceScoringJudgeWeightModifier,
    TargetSmoothingModifier,
    create_loss_modifier_pipeline,
)
from lossmith.modifiers import Measured, ScorerModifier, TokenModifier
from lossmith.modifiers.config import KEYS

ON = {"loss_modifiers_enabled": True}


class Doubled(BaseLossModifier):
    def modify_loss(self, logits, targets, loss, **kwargs):
        return self.config.get("factor", 2) * loss


# ── parameters by name ────────────────────────────────────────────────────────────────────────────


def test_parameters_in_a_mapping_or_by_name(batch):
    for modifier in (
        EntropyModifier({"threshold": 0.1, "weight": 0.5}),
        EntropyModifier(threshold=0.1, weight=0.5),
        EntropyModifier({"threshold": 0.1}, weight=0.5),
    ):
        assert (modifier.settings.threshold, modifier.settings.weight) == (0.1, 0.5)
        assert dict(modifier.config) == {"threshold": 0.1, "weight": 0.5}
    assert not EntropyModifier(enabled=False).enabled
    assert MetricsCollectorModifier(ema_decay=0.5).settings.ema_decay == 0.5
    assert MaskRatioWeightModifier(max=5.0).settings.max_weight == 5
    judged = SequenceScoringJudgeWeightModifier(judge=lambda ids: torch.ones(len(ids)), exponent=2.0)
    assert judged.settings.exponent == 2
    assert LossModifierPipeline([Doubled(factor=3)]).modify_loss(*batch, torch.tensor(1.0)) == 3
    loss = LossModifierPipeline([EntropyModifier(threshold=0.1)])(*batch)
    assert loss == LossModifierPipeline([EntropyModifier({"threshold": 0.1})])(*batch)


def test_mistakes_in_them():
    with pytest.raises(
        ValueError, match=r"EntropyModifier has no option 'treshold'\. Did you mean 'threshold'"
    ):
        EntropyModifier(treshold=0.1)
    with pytest.raises(TypeError, match="EntropyModifier: threshold is in the mapping and given by name"):
        EntropyModifier({"threshold": 0.1}, threshold=0.1)
    for wrong in (0.1, "threshold=0.1", [("threshold", 0.1)], len):
        for kind in (EntropyModifier, SequenceScoringJudgeWeightModifier, Doubled):
            with pytest.raises(TypeError, match=rf"{kind.__name__}: config must be a mapping .*by name"):
                kind(wrong)


# ── what a pipeline is made of ────────────────────────────────────────────────────────────────────


def test_one_modifier_stands_for_a_list_of_one(batch):
    one = EntropyModifier({})
    pipeline = LossModifierPipeline(one)
    assert list(pipeline.modifiers) == [one]
    assert pipeline(*batch) == LossModifierPipeline([EntropyModifier({})])(*batch)


@pytest.mark.parametrize(
    ("modifiers", "message"),
    [
        ([EntropyModifier], r"got the class EntropyModifier; write EntropyModifier\(\)"),
        (EntropyModifier, r"got the class EntropyModifier; write EntropyModifier\(\)"),
        (ON, "create_loss_modifier_pipeline"),
        ("entropy", "create_loss_modifier_pipeline"),
        (3, r"modifiers must be a list of modifiers; got 3"),
        ([torch.nn.Linear(1, 1)], "instance of a subclass of lossmith.BaseLossModifier; got Linear"),
    ],
)
def test_what_are_no_modifiers(modifiers, message):
    with pytest.raises(TypeError, match=message):
        LossModifierPipeline(modifiers)


def test_a_list_is_not_added():
    with pytest.raises(TypeError, match="one at a time"):
        LossModifierPipeline().add_modifier([EntropyModifier({})])  # pyright: ignore


def test_a_modifier_that_forgot_its_base_class():
    class Forgot(BaseLossModifier):
        def __init__(self, config):
            pass

        def modify_loss(self, logits, targets, loss, **kwargs):
            return loss

    with pytest.raises(TypeError, match=r"Forgot.__init__ does not call super\(\).__init__\(config\)"):
        LossModifierPipeline([Forgot({})])


@pytest.mark.parametrize(
    "base", [torch.nn.CrossEntropyLoss(), lossmith.cross_entropy, CrossEntropyLoss, "ce"]
)
def test_a_base_that_is_no_objective(base):
    for make in (LossModifierPipeline, lambda base: create_loss_modifier_pipeline({}, base=base)):
        with pytest.raises(
            TypeError, match=r"base must be a lossmith.Objective, such as .*CrossEntropyLoss\(\)"
        ):
            make(base=base)


# ── settings, now and later ───────────────────────────────────────────────────────────────────────

WRONG_NUMBERS = ["high", "true", True, None, [1.0], math.nan, math.inf, -1.0, torch.tensor(0.5)]


@pytest.mark.parametrize("key", [key for key, spec in KEYS.items() if spec.type is float])
@pytest.mark.parametrize("value", WRONG_NUMBERS, ids=str)
def test_a_number_of_another_kind_is_an_error_that_names_the_key(key, value):
    if value is None:
        return  # stands for the default there
    with pytest.raises((TypeError, ValueError), match=key):
        create_loss_modifier_pipeline({**ON, key: value})


@pytest.mark.parametrize("key", [key for key, spec in KEYS.items() if spec.type is bool])
@pytest.mark.parametrize("value", ["true", "False", 1, 0.0, math.nan, []], ids=str)
def test_a_switch_of_another_kind_likewise(key, value):
    with pytest.raises(TypeError, match=f"{key} expects True or False; got"):
        create_loss_modifier_pipeline({**ON, key: value})


@pytest.mark.parametrize(
    "key", ["target_smoothing_padding_token", "judge_weight_checkpoint", "entropy_modifier_direction"]
)
@pytest.mark.parametrize("value", [1.5, True, math.nan, [0]], ids=str)
def test_ids_and_texts_likewise(key, value):
    with pytest.raises((TypeError, ValueError), match=key):
        create_loss_modifier_pipeline({**ON, key: value})


def test_scalars_of_numpy_are_what_they_hold():
    numpy = pytest.importorskip("numpy")
    keys = {
        "loss_modifiers_enabled": numpy.True_,
        "target_smoothing_enabled": numpy.True_,
        "target_smoothing_factor": numpy.float32(0.25),
        "target_smoothing_padding_token": numpy.int64(7),
    }
    (modifier,) = create_loss_modifier_pipeline(keys).modifiers
    assert (modifier.settings.factor, modifier.settings.padding_token) == (0.25, 7)
    off = EntropyModifier({"enabled": numpy.False_})
    assert off.enabled is False
    off.enabled = numpy.True_
    assert off.enabled is True
    with pytest.raises((TypeError, ValueError), match="target_smoothing_factor"):
        create_loss_modifier_pipeline({**keys, "target_smoothing_factor": numpy.float64("nan")})


def test_enabled_is_checked_whenever_it_is_set():
    for modifier in (EntropyModifier({}), Doubled({})):
        for wrong in ("False", 0, None):
            with pytest.raises(
                TypeError, match=f"{modifier.name}: enabled expects True or False; got {wrong!r}"
            ):
                modifier.enabled = wrong
        assert modifier.enabled is True
        modifier.enabled = False
        assert LossModifierPipeline([modifier]).is_empty()


def test_settings_are_checked_whenever_they_are_set(batch):
    modifier = EntropyModifier({})
    for wrong in ({"weight": -1.0}, {"threshold": 2.0}):
        with pytest.raises(ValueError, match="is out of range"):
            modifier.settings = dataclasses.replace(modifier.settings, **wrong)
    with pytest.raises(TypeError, match="weight expects a number"):
        modifier.settings = dataclasses.replace(modifier.settings, weight="much")
    with pytest.raises(
        TypeError, match=r"settings must be .*Settings; .*dataclasses.replace\(modifier.settings"
    ):
        modifier.settings = {"weight": 0.5}  # pyright: ignore
    assert modifier.settings == EntropyModifier.Settings()
    modifier.settings = dataclasses.replace(modifier.settings, weight=0.5)
    expected = LossModifierPipeline([EntropyModifier(weight=0.5)])(*batch)
    assert LossModifierPipeline([modifier])(*batch) == expected
    assert pickle.loads(pickle.dumps(modifier)).settings.weight == 0.5


@pytest.mark.parametrize(
    ("make", "name", "parameter"),
    [
        (lambda: EntropyModifier({}), "weight", "weight"),
        (lambda: EntropyModifier({}), "entropy_threshold", "threshold"),
        (lambda: TargetSmoothingModifier({}), "smoothing_factor", "factor"),
        (lambda: SequenceScorerVarianceModifier({}), "scale", "scale"),
    ],
)
def test_a_parameter_is_no_attribute(make, name, parameter):
    """Setting it would be without effect."""
    modifier = make()
    with pytest.raises(AttributeError, match=rf"has no attribute '{name}'.*settings\.{parameter}"):
        getattr(modifier, name)
    with pytest.raises(AttributeError, match=rf"dataclasses.replace\(modifier.settings, {parameter}=0.5\)"):
        setattr(modifier, name, 0.5)
    assert not hasattr(modifier, name)


def test_a_modifier_of_ones_own_may_keep_its_parameters_at_hand():
    from dataclasses import dataclass

    from lossmith.modifiers.configured_modifier import ConfiguredModifier
    from lossmith.options import option

    @dataclass(frozen=True)
    class Settings:
        power: Annotated[float, option("exponent", above=0)] = 2.0

    class Power(ConfiguredModifier):
        def __init__(self, config=None):
            super().__init__(config)
            self.power = self.settings.power

        def modify_loss(self, logits, targets, loss, **kwargs):
            return loss**self.power

    Power.Settings = Settings
    assert Power({"power": 3.0}).power == 3


# ── special tokens ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ids", [[-1], [3, -100], "-1"])
def test_a_negative_special_token(ids):
    with pytest.raises(ValueError, match=r"special_tokens.*-1.*out of range"):
        TargetSmoothingModifier({"special_tokens": ids})
    with pytest.raises(ValueError, match=r"target_smoothing_special_tokens.*-1.*out of range"):
        create_loss_modifier_pipeline({**ON, "target_smoothing_special_tokens": ids})


def test_a_special_token_beyond_the_vocabulary(batch):
    pipeline = LossModifierPipeline([TargetSmoothingModifier({"special_tokens": [8, 9]})])
    with pytest.raises(
        ValueError, match=r"special_tokens \(target_smoothing_special_tokens\) holds 9, .* 9 classes"
    ):
        pipeline.modify_loss(*batch)
    LossModifierPipeline([TargetSmoothingModifier({"special_tokens": [8, 0]})]).modify_loss(*batch)


def test_padding_may_be_beyond_it(batch):
    """A tokenizer's padding need not be one of the model's classes."""
    logits, targets = batch
    padded = targets.masked_fill(targets == -100, 12)
    found = TargetSmoothingModifier({"padding_token": 12}).modify_loss(logits, padded)
    torch.testing.assert_close(found, TargetSmoothingModifier({}).modify_loss(logits, targets))


# ── judges ────────────────────────────────────────────────────────────────────────────────────────


class Judge:
    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __call__(self, ids):
        return torch.full((len(ids),), 0.5)


@pytest.mark.parametrize("judge", ["out/judge", 3, {"model": 1}])
def test_a_judge_that_cannot_be_asked(judge):
    with pytest.raises(TypeError, match=r"judge must be a callable ids \[B, L\] -> wrongness \[B\]; got"):
        SequenceScoringJudgeWeightModifier({"judge": judge})
    with pytest.raises(TypeError, match="judge must be a callable"):
        create_loss_modifier_pipeline({**ON, "judge_weight_modifier_enabled": True}, judge=judge)


def test_a_path_goes_into_checkpoint():
    with pytest.raises(TypeError, match="pass a path as checkpoint"):
        SequenceScoringJudgeWeightModifier({"judge": "out/judge"})


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"cls_token_id": "[CLS]"}, r"cls_token_id must be None or a token id, >= 0; got '\[CLS\]'"),
        ({"cls_token_id": -1}, "cls_token_id must be None or a token id, >= 0; got -1"),
        ({"cls_token_id": 9, "vocab_size": 9}, "cls_token_id=9 is outside its vocabulary of 9"),
        ({"block_size": 0}, "block_size must be None or a whole number >= 1; got 0"),
        ({"block_size": -3}, "block_size must be None or a whole number >= 1; got -3"),
        ({"block_size": "512"}, "block_size must be None or a whole number >= 1; got '512'"),
        ({"vocab_size": 9.5}, "vocab_size must be None or a whole number >= 1; got 9.5"),
    ],
)
def test_a_judge_with_attributes_that_cannot_be(attributes, message, batch):
    pipeline = LossModifierPipeline([SequenceScoringJudgeWeightModifier({"judge": Judge(**attributes)})])
    with pytest.raises((TypeError, ValueError), match=f"the judge's {message}"):
        pipeline.modify_loss(*batch)


def test_limits_of_a_judge_that_leave_one_factor(batch):
    modifier = SequenceScoringJudgeWeightModifier(judge=Judge(), min_factor=1.0, max_factor=1.0)
    with pytest.warns(UserWarning, match="weighs all samples alike: min_factor and max_factor are equal"):
        modifier.modify_loss(*batch)


# ── modifiers of one's own ────────────────────────────────────────────────────────────────────────


def test_a_modifier_is_not_called_itself(batch):
    for modifier in (EntropyModifier(), Doubled()):
        with pytest.raises(TypeError, match=f"{modifier.name} is not called itself; put it into a LossModif"):
            modifier(*batch)


def test_options_that_are_none():
    with pytest.raises(
        TypeError, match=r"LossModifierPipeline has no option 'modifier'\. Did you mean 'modif"
    ):
        LossModifierPipeline(modifier=[])  # pyright: ignore
    with pytest.raises(TypeError, match=r"create_loss_modifier_pipeline has no option 'mode'.*'model_mode'"):
        create_loss_modifier_pipeline({}, mode="language_model")  # pyright: ignore
    with pytest.raises(
        TypeError, match="create_loss_modifier_pipeline has no option 'loss_modifiers_enabled'"
    ):
        create_loss_modifier_pipeline(loss_modifiers_enabled=True)  # pyright: ignore


class Measures(TokenModifier):
    answer: object = None

    def measure(self, stats, batch):
        return self.answer


class Multiplies(ScorerModifier):
    answer: object = None

    def factor(self, predictions, targets, where):
        return self.answer


def test_answers_of_other_kinds(batch):
    modifier = Measures()
    for answer, message in (
        (None, "got NoneType"),
        (Measured(torch.ones(24)), r"a weight, \[4\]; got \[24\]"),
    ):
        modifier.answer = answer
        with pytest.raises((TypeError, ValueError), match=f"Measures.measure must .*{message}"):
            LossModifierPipeline(modifier)(*batch)
    scorer, scores = Multiplies(), torch.rand(3)
    for answer in (None, torch.tensor(2.0), (2.0, {}), (torch.ones(3), {})):
        scorer.answer = answer
        with pytest.raises(TypeError, match=r"Multiplies\.factor must return a scalar tensor and metrics"):
            LossModifierPipeline(scorer)(scores, scores)


def test_an_input_that_nobody_gave(batch):
    class OfEpoch(BaseLossModifier):
        def modify_loss(self, logits, targets, loss, *, epoch):
            return loss * epoch

    pipeline = LossModifierPipeline(OfEpoch())
    with pytest.raises(
        TypeError, match=r"OfEpoch.modify_loss takes 'epoch', which nobody gave; .*epoch=\.\.\."
    ):
        pipeline.modify_loss(*batch)
    assert pipeline.modify_loss(*batch, torch.tensor(2.0), epoch=3) == 6


def test_metrics_that_are_none(batch):
    class Forgets(Doubled):
        def modify_loss(self, logits, targets, loss, **kwargs):
            self._metrics = None
            return loss

    with pytest.raises(
        TypeError, match=r"Forgets\._metrics must be a mapping of names to numbers; got NoneType"
    ):
        LossModifierPipeline(Forgets())(*batch)
