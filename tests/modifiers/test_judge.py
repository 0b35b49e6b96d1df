"""The judge: what it is shown, what its word does, and that nothing else changes."""

import copy
import pickle
import types

import pytest
import torch

import reference_modifiers as ref
from lossmith import (
    CrossEntropyLoss,
    LossModifierPipeline,
    SequenceScoringJudgeWeightModifier,
    create_loss_modifier_pipeline,
)
from lossmith.modifiers.tokens import judge as judge_module
from lossmith.modifiers.tokens.judge import expected_wrongness

IGNORE = -100


class Judge(torch.nn.Module):
    """Remembers what it was shown; finds each row as wrong as it was told."""

    def __init__(self, wrongness=(0.3, 0.6, 0.9, 0.1), **attributes):
        super().__init__()
        self.wrongness = torch.nn.Parameter(torch.tensor(wrongness))
        self.seen: list[torch.Tensor] = []
        self.modes: list[tuple[bool, bool]] = []
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, ids):
        self.seen.append(ids)
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.wrongness[: len(ids)]


def pipeline_of(judge, base=None, **options) -> LossModifierPipeline:
    return LossModifierPipeline([SequenceScoringJudgeWeightModifier({"judge": judge, **options})], base=base)


def test_what_a_corrupted_share_should_score():
    """y(x) = 1 - (-x^4 + 2x^3 - 2x + 1) = x^4 - 2x^3 + 2x."""
    x = torch.linspace(0, 1, 11, dtype=torch.float64)
    y = expected_wrongness(x)
    torch.testing.assert_close(y, 1 - (-(x**4) + 2 * x**3 - 2 * x + 1))
    assert (y[0], y[5], y[10]) == (0, 0.8125, 1)
    assert (y.diff() > 0).all()


@pytest.mark.parametrize(
    "options", [{}, {"exponent": 2.0}, {"max_factor": 0.8}, {"min_factor": 0.5}], ids=str
)
def test_the_loss_is_its_formula(options, batch):
    logits, targets = batch
    judge = Judge()
    loss = pipeline_of(judge, **options).modify_loss(logits, targets)
    valid = ref.valid_of(targets)
    named = {"exponent": "exponent", "max_factor": "high", "min_factor": "low"}
    wrongness = judge.wrongness.detach().double()
    factor = ref.judge_factor(wrongness, valid, **{named[k]: v for k, v in options.items()})
    expected = ref.sequence_mean(ref.token_loss(logits, targets), valid, factor)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits), rtol=1e-6, atol=1e-12
    )
    assert judge.modes == [(False, False)]


def certain(ids: torch.Tensor, num_classes: int = 9) -> torch.Tensor:
    """Logits from which exactly these ids are drawn."""
    return torch.full((*ids.shape, num_classes), -torch.inf).scatter(-1, ids.unsqueeze(-1), 0.0)


def test_drawn_where_supervised_and_known_elsewhere():
    targets = torch.tensor([[1, IGNORE, 2, IGNORE]])
    input_ids = torch.tensor([[8, 5, 8, 6]])
    logits = certain(torch.tensor([[3, 4, 7, 0]]))
    logits[..., :8] = logits[..., :8].clamp(min=-50)  # the targets are possible
    judge = Judge()
    pipeline_of(judge).modify_loss(logits, targets, input_ids=input_ids)
    pipeline_of(judge).modify_loss(logits, targets)
    assert judge.seen[0].tolist() == [[3, 5, 7, 6]]
    assert judge.seen[1].tolist() == [[3, 4, 7, 0]]


def test_under_a_shift_what_is_drawn_stands_one_further():
    """logits[t] predict labels[t + 1]; a prompt is known."""
    labels = torch.tensor([[IGNORE, IGNORE, 2, 3]])
    input_ids = torch.tensor([[5, 6, 2, 3]])
    logits = certain(torch.tensor([[1, 7, 8, 4]])).clamp(min=-50)
    judge = Judge()
    pipeline = pipeline_of(judge, base=CrossEntropyLoss(shift=True))
    pipeline.modify_loss(logits, labels, input_ids=input_ids)
    pipeline.modify_loss(logits, labels)
    assert judge.seen[0].tolist() == [[5, 6, 7, 8]]
    assert judge.seen[1].tolist() == [[1, 7, 8]]


def test_the_cls_token_comes_first_and_the_end_is_cut_off():
    logits, targets = certain(torch.tensor([[3, 4, 7, 1]])).clamp(min=-50), torch.tensor([[1, 1, 1, 1]])
    judge = Judge(cls_token_id=8, block_size=3, vocab_size=9)
    pipeline_of(judge).modify_loss(logits, targets)
    assert judge.seen[0].tolist() == [[8, 3, 4]]


def test_it_draws_at_temperature_one():
    logits = torch.zeros(1, 4000, 2)
    logits[..., 1] = 1.0
    judge = Judge()
    pipeline_of(judge, base=CrossEntropyLoss(temperature=0.05)).modify_loss(
        logits, torch.zeros(1, 4000).long()
    )
    assert judge.seen[0].float().mean().item() == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.03)


def test_the_judge_is_not_a_part_of_the_loss():
    """Neither trained, nor saved, nor turned to training."""
    judge = Judge()
    pipeline = pipeline_of(judge)
    assert list(pipeline.parameters()) == []
    assert pipeline.state_dict() == {}
    judge.train()  # with the model that it is a part of, say
    pipeline.modify_loss(torch.randn(2, 3, 9), torch.ones(2, 3, dtype=torch.long))
    assert judge.modes == [(False, False)]


def test_an_exponent_of_zero_does_not_ask(batch):
    judge = Judge()
    pipeline_of(judge, exponent=0.0).modify_loss(*batch)
    assert judge.seen == []


def test_metrics(batch):
    logits, targets = batch
    pipeline = pipeline_of(Judge())
    pipeline.modify_loss(logits, targets)
    wrongness = torch.tensor([0.3, 0.6, 0.9, 0.1], dtype=torch.float64)
    factor = ref.judge_factor(wrongness, ref.valid_of(targets))
    name = "SequenceScoringJudgeWeightModifier."
    expected = {
        f"{name}{stat}_{what}" if stat != "std" else f"{name}{what}_std": value.item()
        for what, values in (("wrongness", wrongness), ("factor", factor))
        for stat, value in (
            ("mean", values.mean()),
            ("min", values.min()),
            ("max", values.max()),
            ("std", values.std(unbiased=False)),
        )
    }
    assert pipeline.get_all_metrics() == pytest.approx(expected, rel=1e-6)


def test_a_judge_that_does_not_fit(batch):
    logits, targets = batch
    with pytest.raises(ValueError, match=r"one number a sequence, \[4\]; got \[4, 2\]"):
        pipeline_of(lambda ids: torch.zeros(len(ids), 2)).modify_loss(logits, targets)
    with pytest.raises(ValueError, match="the judge knows 5 tokens and the model writes 9"):
        pipeline_of(Judge(vocab_size=5)).modify_loss(logits, targets)
    with pytest.raises(TypeError, match=r"must return a tensor.*got dict.*SequenceJudge"):
        pipeline_of(lambda ids: {"logits": ids}).modify_loss(logits, targets)


def test_wrongness_outside_its_range_is_clamped(batch):
    pipeline = pipeline_of(lambda ids: torch.tensor([-1.0, 2.0, 0.5, 0.5]), exponent=0.5)
    assert pipeline.modify_loss(*batch).isfinite()
    metrics = pipeline.get_all_metrics()
    assert metrics["SequenceScoringJudgeWeightModifier.min_wrongness"] == 0
    assert metrics["SequenceScoringJudgeWeightModifier.max_wrongness"] == 1


def test_the_smallest_expectation_is_eps(batch):
    """Every sample expects less than eps, which is divided by in its place."""
    logits, targets = batch
    pipeline = pipeline_of(Judge(), eps=4.0)
    pipeline.modify_loss(logits, targets)
    factors = torch.tensor([0.3, 0.6, 0.9, 0.1]) / 4
    name = "SequenceScoringJudgeWeightModifier."
    metrics = pipeline.get_all_metrics()
    assert metrics[f"{name}mean_factor"] == pytest.approx(factors.clamp(min=0.1).mean().item())
    assert metrics[f"{name}max_factor"] == pytest.approx(0.225)


class Loaded:
    """Stands for what reads checkpoints, and keeps what it was asked for."""

    def __init__(self, monkeypatch):
        self.asked: list[tuple[str, dict]] = []
        integration = types.SimpleNamespace(load_judge=self.load_judge)
        monkeypatch.setattr(judge_module, "import_module", lambda name: integration)

    def load_judge(self, checkpoint, **place):
        self.asked.append((checkpoint, place))
        return Judge()


def test_a_checkpoint_is_read_to_its_device_in_its_dtype(monkeypatch):
    loaded = Loaded(monkeypatch)
    SequenceScoringJudgeWeightModifier(checkpoint="out/judge", device="meta", dtype="bfloat16")
    keys = {"loss_modifiers_enabled": True, "judge_weight_modifier_enabled": True}
    keys["judge_weight_checkpoint"] = "out/other"
    create_loss_modifier_pipeline({**keys, "device": "cpu", "dtype": "float16"})
    create_loss_modifier_pipeline(keys)
    assert loaded.asked == [
        ("out/judge", {"device": "meta", "dtype": "bfloat16"}),
        ("out/other", {"device": "cpu", "dtype": "float16"}),
        ("out/other", {"device": None, "dtype": None}),
    ]


def test_a_copy_reads_its_checkpoint_again(monkeypatch, batch):
    """Neither the judge nor its weights are in the pickle; a judge without a checkpoint has to be."""
    loaded = Loaded(monkeypatch)
    modifier = SequenceScoringJudgeWeightModifier(checkpoint="out/judge", device="cpu", dtype="float32")
    expected = modifier.modify_loss(*batch)
    for copied in (pickle.loads(pickle.dumps(modifier)), copy.deepcopy(modifier)):
        assert copied.judge is None
        torch.testing.assert_close(copied.modify_loss(*batch), expected)
        assert loaded.asked[-1] == ("out/judge", {"device": "cpu", "dtype": "float32"})
    assert len(loaded.asked) == 3
    own = pickle.loads(pickle.dumps(SequenceScoringJudgeWeightModifier(judge=Judge())))
    torch.testing.assert_close(own.judge.wrongness, Judge().wrongness)
