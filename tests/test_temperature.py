"""The adaptive temperature: when it moves, by how much, and that it moves once a step."""

import copy

import pytest
import torch

from lossmith import AdaptiveTemperature, CrossEntropyLoss


def fed(losses, **options) -> AdaptiveTemperature:
    temperature = AdaptiveTemperature(**options)
    for loss in losses:
        temperature.observe(torch.tensor(float(loss) * 4), torch.tensor(4))
        temperature.on_optimizer_step()
    return temperature


def by_hand(losses, initial=1.0, bounds=(0.5, 2.0), rate=0.01, window=100, low=0.05, high=0.1) -> float:
    value = initial
    for step in range(1, len(losses) + 1):
        if step < 2:
            continue
        recent = torch.tensor(losses[max(step - window, 0) : step], dtype=torch.float64)
        variation = (recent.std(unbiased=False) / recent.mean()).item()
        value *= 1 - rate if variation < low else 1 + rate if variation > high else 1
        value = min(max(value, bounds[0]), bounds[1])
    return value


# The swing is the coefficient of variation where squares are divided by the number of steps; by one less it
# would be 5% more in a window of ten.
DIRECTIONS = {0.0: -1, 0.049: -1, 0.051: 0, 0.07: 0, 0.099: 0, 0.101: 1, 0.5: 1}


@pytest.mark.parametrize("swing", DIRECTIONS)
def test_it_is_its_rule(swing):
    losses = [3.0 + (3.0 * swing if i % 2 else -3.0 * swing) for i in range(40)]
    temperature = fed(losses, window=10)
    assert temperature.value.item() == pytest.approx(by_hand(losses, window=10), rel=1e-5)
    steady = fed([3.0 + (3.0 * swing if i % 2 else -3.0 * swing) for i in range(10)], window=10)
    before = steady.value.clone()
    steady.observe(torch.tensor(4 * losses[10]), torch.tensor(4))
    steady.on_optimizer_step()
    assert (steady.value > before).item() - (steady.value < before).item() == DIRECTIONS[swing]


def test_the_window_fills_as_it_goes():
    """It moves from the second step on, by the steps that there are."""
    assert fed([2.0]).value == 1
    for num_steps in (2, 3, 99, 100, 150):
        losses = [3.0 + 0.3 * torch.tensor(0.7 * step).sin().item() for step in range(num_steps)]
        assert fed(losses).value.item() == pytest.approx(by_hand(losses), rel=1e-5)
    assert fed([2.0] * 2).value == pytest.approx(0.99)
    assert fed([1.0, 3.0]).value == pytest.approx(1.01)


def test_the_oldest_step_leaves_the_window():
    losses = [1.0, 5.0, 2.0, 8.0, 3.0, 3.1, 3.2, 3.1, 3.0, 9.0]
    for num_steps in range(1, len(losses) + 1):
        given = losses[:num_steps]
        temperature = fed(given, window=3)
        assert sorted(temperature.history.tolist()) == pytest.approx(sorted([0.0, 0.0, *given][-3:]))
        assert temperature.value.item() == pytest.approx(by_hand(given, window=3), rel=1e-5)


def test_it_stays_within_its_bounds():
    assert fed([2.0] * 60, window=5, bounds=(0.9, 1.1)).value == pytest.approx(0.9)
    assert fed([1.0, 3.0] * 30, window=5, bounds=(0.9, 1.1)).value == pytest.approx(1.1)


def train(criterion, num_steps, micro_batches=2):
    weight = torch.nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    targets = torch.ones(2, 3, dtype=torch.long)
    for _ in range(num_steps):
        for _ in range(micro_batches):
            criterion(weight.expand(2, 3, 5), targets).backward()
        optimizer.step()


def test_it_advances_by_itself_once_an_optimizer_step():
    criterion = CrossEntropyLoss(temperature=AdaptiveTemperature(window=3))
    train(criterion, 5)
    assert criterion.temperature.num_steps == 5
    assert criterion.temperature.value == pytest.approx(0.99**4)
    criterion.temperature.on_optimizer_step()  # said again, it is not done again
    assert criterion.temperature.num_steps == 5
    with torch.no_grad():
        criterion(torch.zeros(1, 2, 5), torch.ones(1, 2, dtype=torch.long))
    criterion.temperature.on_optimizer_step()  # an evaluation is no step
    assert criterion.temperature.num_steps == 5


def test_the_loss_is_taken_at_it_and_it_is_driven_by_the_plain_one(count_ops):
    criterion = CrossEntropyLoss(temperature=AdaptiveTemperature(2.0, window=2), z_loss=0.1)
    logits = torch.randn(2, 3, 5, requires_grad=True)
    targets = torch.randint(5, (2, 3))
    with count_ops as ops:
        loss = criterion(logits, targets)
        loss.backward()
    assert ops.passes == (1, 1)
    plain = CrossEntropyLoss(temperature=2.0, z_loss=0.1)
    torch.testing.assert_close(loss, plain(logits, targets))
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert criterion.temperature.pending.tolist() == pytest.approx([nll.item(), 6])


def test_a_step_without_tokens_says_nothing():
    temperature = fed([2.0] * 6, window=3)
    before, steps = temperature.value.clone(), temperature.num_steps.clone()
    temperature.observe(torch.tensor(0.0), torch.tensor(0))
    temperature.on_optimizer_step()
    assert torch.equal(temperature.value, before)
    assert torch.equal(temperature.num_steps, steps)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_no_number_is_left_out(bad):
    expected = fed([2.0, 3.0, 4.0], window=5)
    temperature = AdaptiveTemperature(window=5)
    for loss in (2.0, bad, 3.0, 4.0):
        temperature.observe(torch.tensor(4 * loss), torch.tensor(4))
        temperature.on_optimizer_step()
    for name, value in expected.state_dict().items():
        assert torch.equal(temperature.state_dict()[name], value), name
    # and of a step, only the micro-batch
    for loss in (bad, 5.0):
        temperature.observe(torch.tensor(4 * loss), torch.tensor(4))
    temperature.on_optimizer_step()
    assert temperature.history.tolist() == [2.0, 3.0, 4.0, 5.0, 0.0]


def test_a_bad_batch_does_not_reach_it_through_the_loss():
    criterion = CrossEntropyLoss(temperature=AdaptiveTemperature(window=3))
    logits = torch.zeros(1, 2, 5, requires_grad=True)
    targets = torch.ones(1, 2, dtype=torch.long)
    assert criterion(logits * torch.nan, targets).isnan()
    criterion.on_optimizer_step()
    assert criterion.temperature.num_steps == 0
    train(criterion, 3)
    assert criterion.temperature.value == pytest.approx(0.99**2)


def test_its_state_is_saved_and_copied():
    criterion = CrossEntropyLoss(temperature=AdaptiveTemperature(window=3))
    train(criterion, 4)
    fresh = CrossEntropyLoss(temperature=AdaptiveTemperature(window=3))
    fresh.load_state_dict(criterion.state_dict())
    twin = copy.deepcopy(criterion)
    for other in (criterion, fresh, twin):
        train(other, 2)
    values = [c.temperature.value.item() for c in (criterion, fresh, twin)]
    assert values == pytest.approx([0.99**5] * 3)


def test_it_stays_precise_when_the_model_is_cast():
    temperature = fed([2.0] * 8, window=3).to(torch.bfloat16)
    before = temperature.value.item()
    temperature.observe(torch.tensor(8.0), torch.tensor(4))
    temperature.on_optimizer_step()
    assert temperature.value.item() == pytest.approx(before * 0.99, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": 3.0}, "lowest <= initial <= highest"),
        ({"bounds": (0.0, 1.0)}, "bounds must be two numbers >= 1e-20"),
        ({"rate": 1.0}, "rate"),
        ({"window": 1}, "window"),
        ({"low": 0.2, "high": 0.1}, "low <= high"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveTemperature(**options)
