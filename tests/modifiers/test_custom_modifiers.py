"""Modifiers of the user's own, written as the documentation says."""

import pytest
import torch

import reference_modifiers as ref
from lossmith import LossModifierPipeline, MaskRatioWeightModifier, ModelMode, TargetSmoothingModifier
from lossmith.modifiers.base import BaseLossModifier


class CustomModifier(BaseLossModifier):
    """As in the user's document, with only the import changed."""

    def __init__(self, config):
        super().__init__(config)
        self.custom_param = config.get("custom_param", 1.0)

    def modify_loss(self, logits, targets, loss, **kwargs):
        if not self.enabled:
            return loss

        # Your custom loss modification logic here
        modified_loss = loss * self.custom_param

        # Store metrics for monitoring
        self._metrics = {
            "custom_metric": modified_loss.item(),
        }

        return modified_loss

    def get_metrics(self):
        return self._metrics.copy()


class Squared(BaseLossModifier):
    """Not interchangeable with a multiplication."""

    def modify_loss(self, logits, targets, loss, **kwargs):
        self._metrics = {"before": loss.detach()}
        return loss**2


class Halved(BaseLossModifier):
    """Returns the loss of every position."""

    def modify_loss(self, logits, targets, loss, **kwargs):
        self.calls = [*getattr(self, "calls", []), kwargs]
        return {"per_position_loss": kwargs["per_position_loss"] / 2}


def test_the_documented_modifier_works_unchanged(batch):
    logits, targets = batch
    pipeline = LossModifierPipeline([CustomModifier({"enabled": True, "custom_param": 3.0})])
    loss = torch.tensor(0.5, requires_grad=True)
    modified = pipeline.modify_loss(logits, targets, loss)
    assert modified.item() == 1.5
    modified.backward()
    assert loss.grad == 3
    assert pipeline.get_all_metrics() == {"CustomModifier.custom_metric": 1.5}
    assert pipeline.get_enabled_modifier_names() == ["CustomModifier"]
    off = LossModifierPipeline([CustomModifier({"enabled": False, "custom_param": 3.0})])
    assert off.modify_loss(logits, targets, loss) is loss


def test_it_acts_on_the_loss_that_the_others_made(batch):
    """Whatever its place: the others work on tokens, it on their sum."""
    logits, targets = batch
    expected = 3 * MaskRatioWeightModifier({}).modify_loss(logits, targets)
    custom = CustomModifier({"custom_param": 3.0})
    for modifiers in ([custom, MaskRatioWeightModifier({})], [MaskRatioWeightModifier({}), custom]):
        output = LossModifierPipeline(modifiers).evaluate(logits, targets)
        torch.testing.assert_close(output.total, expected)
        torch.testing.assert_close(sum(output.parts.values()), expected)
        torch.testing.assert_close(output.parts["CustomModifier"], expected * 2 / 3)


def test_scalar_modifiers_act_in_the_order_of_the_list(batch):
    logits, targets = batch
    loss = torch.tensor(2.0)
    triple, square = CustomModifier({"custom_param": 3.0}), Squared({})
    assert LossModifierPipeline([triple, square]).modify_loss(logits, targets, loss) == 36
    assert LossModifierPipeline([square, triple]).modify_loss(logits, targets, loss) == 12


def test_one_that_returns_positions_is_weighted_and_reduced(batch):
    logits, targets = batch
    plain = MaskRatioWeightModifier({}).modify_loss(logits, targets)
    for modifiers in ([Halved({}), MaskRatioWeightModifier({})], [MaskRatioWeightModifier({}), Halved({})]):
        loss = LossModifierPipeline(modifiers).modify_loss(logits, targets)
        torch.testing.assert_close(loss, plain / 2)
        torch.testing.assert_close(
            torch.autograd.grad(loss, logits)[0], torch.autograd.grad(plain, logits, retain_graph=True)[0] / 2
        )


def test_one_that_returns_positions_acts_at_its_place(batch):
    """Before smoothing it halves what is smoothed; after it the smoothed loss."""
    logits, targets = batch
    valid = ref.valid_of(targets)
    smoothing = TargetSmoothingModifier({"factor": 0.2})
    first = LossModifierPipeline([Halved({}), smoothing]).modify_loss(logits, targets)
    last = LossModifierPipeline([smoothing, Halved({})]).modify_loss(logits, targets)
    own, mean = ref.token_loss(logits, targets), ref.neg_log_p(logits).mean(-1)
    torch.testing.assert_close(first, ref.token_mean(0.8 * own / 2 + 0.2 * mean, valid))
    torch.testing.assert_close(last, ref.token_mean((0.8 * own + 0.2 * mean) / 2, valid))


def test_a_scalar_modifier_before_one_of_positions_keeps_its_effect(batch):
    logits, targets = batch
    plain = LossModifierPipeline()(logits, targets)
    pipeline = LossModifierPipeline([Squared({}), Halved({})])
    torch.testing.assert_close(pipeline.modify_loss(logits, targets), (plain / 2) ** 2)
    assert pipeline.get_all_metrics() == {"Squared.before": pytest.approx(plain.item() / 2)}


def test_what_a_custom_modifier_is_given(batch, count_ops):
    logits, targets = batch
    mask = torch.ones_like(targets)
    custom = Halved({})
    with count_ops as ops:
        LossModifierPipeline([custom]).modify_loss(
            logits, targets, model_mode=ModelMode.TOKEN_CLASSIFIER, mask=mask, denominator=7, epoch=3
        )
    assert ops.passes == (1, 0)
    (given,) = custom.calls
    assert given["model_mode"] is ModelMode.TOKEN_CLASSIFIER
    assert given["mask"] is mask
    assert (given["denominator"], given["ignore_index"], given["reduction"]) == (7, -100, "mean")
    assert given["epoch"] == 3
    assert given["input_ids"] is None
    valid = ref.valid_of(targets)
    torch.testing.assert_close(given["per_position_loss"][valid], ref.token_loss(logits, targets)[valid])
    assert given["stats"].nll.shape == targets.shape


def test_scores_have_custom_modifiers_too():
    p, t = torch.tensor([0.5, 0.2], requires_grad=True), torch.tensor([1.0, 0.2])
    pipeline = LossModifierPipeline([CustomModifier({"custom_param": 2.0}), Halved({})])
    assert pipeline(p, t).item() == pytest.approx(0.125)
    output = pipeline.evaluate(p, t)
    torch.testing.assert_close(sum(output.parts.values()), output.total)
    assert pipeline.modify_loss(p, t, torch.tensor(9.0)).item() == pytest.approx(0.125)  # put in its place


class Capped(BaseLossModifier):
    """Not interchangeable with halving."""

    def modify_loss(self, logits, targets, loss, *, per_position_loss):
        return {"per_position_loss": per_position_loss.clamp(max=self.config["cap"])}


def test_those_that_return_positions_act_in_the_order_of_the_list(batch):
    logits, targets = batch
    valid, losses = ref.valid_of(targets), ref.token_loss(logits, targets)
    capped, halved = Capped({"cap": 1.0}), Halved({})
    first = LossModifierPipeline([capped, halved]).modify_loss(logits, targets)
    last = LossModifierPipeline([halved, capped]).modify_loss(logits, targets)
    torch.testing.assert_close(first, ref.token_mean(losses.clamp(max=1) / 2, valid))
    torch.testing.assert_close(last, ref.token_mean((losses / 2).clamp(max=1), valid))
    p, t = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.5])  # squared errors 1 and 1/4
    capped = Capped({"cap": 0.375})
    assert LossModifierPipeline([capped, halved])(p, t) == (0.375 + 0.25) / 4
    assert LossModifierPipeline([halved, capped])(p, t) == (0.375 + 0.125) / 2


def test_scalar_modifiers_are_asked_again_in_the_order_of_the_list(batch):
    """Once one of positions has put another loss in place of the one that they worked on."""
    half = LossModifierPipeline()(*batch) / 2
    triple, square = CustomModifier({"custom_param": 3.0}), Squared({})
    for modifiers, expected in (
        ([triple, square, Halved({})], (3 * half) ** 2),
        ([square, triple, Halved({})], 3 * half**2),
    ):
        torch.testing.assert_close(LossModifierPipeline(modifiers).modify_loss(*batch), expected)


class Returns(BaseLossModifier):
    def __init__(self, value):
        super().__init__({})
        self.value = value

    def modify_loss(self, logits, targets, loss, **kwargs):
        return self.value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "Returns.modify_loss must return the loss as a tensor.*got NoneType"),
        (1.0, "got float"),
        ({"loss_per_position": torch.zeros(4, 6)}, "got NoneType"),
        (torch.zeros(4, 6), r"of the shape that it was given, \[\]; got \[4, 6\].*per_position_loss"),
        (
            {"per_position_loss": torch.zeros(4)},
            r"per_position_loss \[4\]; expected .* shape \[4, 6\]",
        ),
    ],
)
def test_an_answer_that_is_none(value, message, batch):
    with pytest.raises((TypeError, ValueError), match=message):
        LossModifierPipeline([Returns(value)]).modify_loss(*batch)


def test_a_mapping_with_a_reduced_loss_is_taken_too(batch):
    assert LossModifierPipeline([Returns({"loss": torch.tensor(4.0)})]).modify_loss(*batch) == 4


def test_a_custom_metric_has_to_be_a_number(batch):
    custom = CustomModifier({})
    custom._metrics = {"text": "high"}
    with pytest.raises(TypeError, match=r"CustomModifier\.text"):
        LossModifierPipeline([custom]).get_all_metrics()
    custom._metrics = {"vector": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"CustomModifier\.vector.*one number"):
        LossModifierPipeline([custom]).get_all_metrics()


def test_the_interface_has_to_be_filled_in():
    with pytest.raises(TypeError, match="modify_loss"):
        BaseLossModifier({})  # pyright: ignore[reportAbstractUsage]


def test_custom_modifiers_of_scores_build_on_one_another():
    p, t = torch.tensor([0.4, 0.6]), torch.tensor([0.0, 1.0])
    assert LossModifierPipeline([Halved({}), Halved({})])(p, t).item() == pytest.approx(0.04)
    assert LossModifierPipeline([Halved({}) for _ in range(3)])(p, t).item() == pytest.approx(0.02)
