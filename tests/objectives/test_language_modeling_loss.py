"""FundamentaLLM's loss and function: they work, and say what to write; its reduction is refused by name."""

import pytest
import torch
import torch.nn.functional as F

import lossmith

pytestmark = pytest.mark.filterwarnings("ignore:LanguageModelingLoss|compute_loss:DeprecationWarning")


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, (3, 4), generator=generator)
    targets[0, 2:] = -100
    targets[1, 1] = -1  # ignored as well
    targets[2] = -100
    return logits, targets


def expected(logits, targets, reduction, smoothing):
    ignored = (targets == -100) | (targets == -1)
    safe = targets.masked_fill(ignored, 0)
    losses = F.cross_entropy(logits.transpose(1, 2), safe, reduction="none", label_smoothing=smoothing)
    losses, counts = losses.masked_fill(ignored, 0.0), (~ignored).sum(-1)
    return {
        "none": losses,
        "sum": losses.sum(),
        "mean": losses.sum() / counts.sum(),
        "batch": losses.sum(-1) / counts.clamp(min=1),
        "batchmean": losses.sum(-1) / counts.clamp(min=1),
    }[reduction]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batch", "batchmean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_both_are_what_they_were(reduction, smoothing, case):
    logits, targets = case
    value = expected(logits, targets, reduction, smoothing)
    made = lossmith.LanguageModelingLoss(smoothing, -100, reduction)
    otherwise = lossmith.LanguageModelingLoss(label_smoothing=smoothing)
    for found in (
        made(logits, targets),
        otherwise(logits, targets, reduction=reduction),
        lossmith.compute_loss(logits, targets, reduction, smoothing),
    ):
        torch.testing.assert_close(found, value)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), logits)[0],
            torch.autograd.grad(value.sum(), logits, retain_graph=True)[0],
        )


def test_another_ignored_id(case):
    logits, targets = case
    moved = targets.masked_fill(targets == -100, 5)
    kept = lossmith.cross_entropy(logits, moved.masked_fill(moved == 5, -100).masked_fill(moved == -1, -100))
    torch.testing.assert_close(lossmith.compute_loss(logits, moved, ignore_index=5), kept)


def test_they_say_what_to_write(case):
    with pytest.warns(
        DeprecationWarning, match=r"LanguageModelingLoss\(\) is a former name; write CrossEnt"
    ) as w:
        lossmith.LanguageModelingLoss()
    assert w[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"compute_loss\(\) is a former name; write cross_entropy"):
        lossmith.compute_loss(*case)


def test_mistakes_are_refused(case):
    logits, targets = case
    with pytest.raises(ValueError, match="reduction must be one of 'none', 'mean', 'sum', 'batch'"):
        lossmith.LanguageModelingLoss(reduction="average")
    with pytest.raises(ValueError, match="label_smoothing"):
        lossmith.LanguageModelingLoss(label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"logits must be \[B, T, V\] and targets \[B, T\]; got \[12, 7\]"):
        lossmith.compute_loss(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("reduction", ["batch", "batchmean"])
@pytest.mark.parametrize(
    "call",
    [
        lambda reduction: lossmith.CrossEntropyLoss(reduction=reduction),
        lambda reduction: lossmith.cross_entropy(
            torch.zeros(2, 3), torch.zeros(2).long(), reduction=reduction
        ),
        lambda reduction: lossmith.LossModifierPipeline([], reduction=reduction),
        lambda reduction: lossmith.Objective(reduction=reduction),
    ],
)
def test_elsewhere_its_reduction_is_refused_with_what_to_write(reduction, call):
    message = rf"got '{reduction}'.*write reduction='sequence_mean'.*reduction='none'"
    with pytest.raises(ValueError, match=message):
        call(reduction)


def test_what_the_message_writes_is_what_it_was(case):
    logits, targets = case
    targets = targets.masked_fill(targets == -1, -100)
    losses = lossmith.cross_entropy(logits, targets, reduction="none")
    per_sample = losses.sum(-1) / (targets != -100).sum(-1).clamp(min=1)
    torch.testing.assert_close(per_sample, expected(logits, targets, "batch", 0.0))
