"""What a loss was computed from changes before its gradient is, or before another statistic is read."""

import pytest
import torch

import lossmith
from lossmith import CrossEntropyLoss
from lossmith.engine.head.linear_head import LinearHead
from lossmith.engine.predictions import Logits
from lossmith.engine.sweep_options import SweepOptions

pytestmark = pytest.mark.usefixtures("arithmetic")

N, D, V = 12, 6, 20


def predictions(kind: str):
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=rng).requires_grad_()
    weight = torch.randn(V, D, generator=rng).requires_grad_()
    return (
        Logits(hidden @ weight.T) if kind == "logits" else LinearHead(hidden, weight, memory_budget=5 * V * 4)
    )


def options() -> dict[str, torch.Tensor]:
    return {"class_weight": torch.linspace(0.5, 2.0, V), "temperature": torch.tensor(1.7)}


def run(criterion: CrossEntropyLoss, kind: str) -> torch.Tensor:
    given, targets = predictions(kind), torch.arange(N) % V
    if isinstance(given, Logits):
        return criterion(given.values, targets)
    return criterion(
        targets=targets, hidden_states=given.hidden, lm_head_weight=given.weight, strategy="two_sweep"
    )


@pytest.mark.parametrize("kind", ["logits", "head"])
@pytest.mark.parametrize("name", ["class_weight", "temperature"])
def test_an_option_that_changes_between_forward_and_backward(kind, name):
    given = options()
    loss = run(CrossEntropyLoss(label_smoothing=0.1, **given), kind)
    with torch.no_grad():
        given[name].mul_(2.0)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", ["logits", "head"])
@pytest.mark.parametrize("name", ["class_weight", "temperature", "targets", "candidates"])
def test_anything_that_changes_before_another_statistic_is_read(kind, name):
    given, targets = options(), torch.arange(N) % V
    candidates = targets.unsqueeze(-1).clone()
    stats = SweepOptions(**given).stats(predictions(kind), targets, ignore_index=-100, candidates=candidates)
    _ = stats.compute("nll").nll
    (given | {"targets": targets, "candidates": candidates})[name].add_(1)
    with pytest.raises(RuntimeError, match=r"modified in place.*announce"):
        _ = stats.entropy


def test_parts_of_one_sweep_see_the_change_too():
    """Their gradients take a second sweep, which would read the weights as they are by then."""
    given, head = options(), predictions("head")
    criterion = CrossEntropyLoss(z_loss=0.1, **given)
    output = criterion.evaluate(
        targets=torch.arange(N) % V,
        hidden_states=head.hidden,
        lm_head_weight=head.weight,
        strategy="one_sweep",
    )
    with torch.no_grad():
        given["class_weight"].mul_(2.0)
    with pytest.raises(RuntimeError, match="inplace operation"):
        output.parts["cross_entropy"].backward()


def test_nothing_is_said_where_nothing_changes():
    given = options()
    for kind in ("logits", "head"):
        run(CrossEntropyLoss(**given), kind).backward()
    stats = lossmith.token_stats(torch.randn(4, V), torch.zeros(4, dtype=torch.int64))
    _ = stats.compute("nll").nll, stats.entropy
