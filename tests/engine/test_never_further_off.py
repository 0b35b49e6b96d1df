"""No formula is further off than the one that everybody writes down, in the same dtype: value and gradient.

The truth is the careful formula in fp64. What is allowed on top of the plain formula's own error, which may
be nothing by luck, are a few units of what rounding the logits once would do to the result.
"""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import lossmith
import reference
from lossmith.engine.predictions import Logits
from lossmith.engine.sweep_options import SweepOptions

pytestmark = pytest.mark.usefixtures("arithmetic")

INF, EPS = float("inf"), torch.finfo(torch.float32).eps
ROWS, SMOOTHING, UNITS = 16, 0.1, 4.0
GAPS = [0.0, 1e-3, 1.0, 5.0, 12.0, 20.0, 30.0, 60.0, 87.0, 120.0, 1e3, 1e5, 1e7, 1e9]
EVERYTHING = {"label_smoothing": SMOOTHING, "z_loss": 0.01, "confidence_penalty": 0.1, "focal_gamma": 2.0}
STATISTICS = {"lse": "logsumexp", "entropy": "entropy", "mean": "mean_logit", "total": "total_nll"}
LOSSES = {
    "nll": {},
    "z_loss": {"z_loss": 1.0},
    "uniform": {"label_smoothing": SMOOTHING},
    "exclude_target": {"label_smoothing": SMOOTHING, "smoothing_mode": "exclude_target"},
    "focal": {"focal_gamma": 2.0},
    "everything": EVERYTHING,
}
READINGS = [{}, {"temperature": 0.7}, {"temperature": 3.0}, {"softcap": 5.0}, {"softcap": 30.0}]


def rows(seed: int, num_classes: int, gap: float, spread: float, offset: float, masked: float):
    """Logits whose target is ``gap`` above the largest wrong one, or below if negative."""
    rng = torch.Generator().manual_seed(seed)
    z = spread * torch.randn(ROWS, num_classes, generator=rng)
    y = torch.randint(num_classes, (ROWS, 1), generator=rng)
    top = z.scatter(1, y, -INF).amax(1, keepdim=True)
    z.scatter_(1, y, top + gap)
    if gap > 1e3:  # large numbers at the bottom, too: the masks of some models
        z[ROWS // 2 :] -= gap
    z += offset
    hidden = torch.rand(ROWS, num_classes, generator=rng) < masked
    return z.masked_fill(hidden.scatter(1, y, False), -INF), y.squeeze(1)


# -- the three ways -----------------------------------------------------------------------------------


def ours(z: Tensor, y: Tensor, weight: Tensor, kind: str, reading: dict) -> Tensor:
    if kind in LOSSES:
        return lossmith.cross_entropy(z, y, reduction="none", class_weight=weight, **LOSSES[kind], **reading)
    options = SweepOptions(**reading, class_weight=weight if kind == "total" else None)
    return getattr(options.stats(Logits(z), y, ignore_index=-100), STATISTICS[kind])


def careful(z: Tensor, y: Tensor, weight: Tensor, kind: str, reading: dict) -> Tensor:
    if kind in LOSSES:
        return reference.cross_entropy(z, y, reduction="none", class_weight=weight, **LOSSES[kind], **reading)
    reading = reading | {"class_weight": weight if kind == "total" else None}
    return reference.statistics(z, y, **reading)[STATISTICS[kind]]


def plain(z: Tensor, y: Tensor, weight: Tensor, kind: str, reading: dict) -> Tensor:
    """As it is written down with log_softmax."""
    cap = reading.get("softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    finite, scaled = z > -INF, z / reading.get("temperature", 1.0)
    log_p = scaled.log_softmax(-1)
    ids, own = y.unsqueeze(1), torch.nn.functional.one_hot(y, z.shape[-1]).bool()
    nll = -log_p.gather(1, ids).squeeze(1)
    surprise = torch.where(finite, -log_p, 0.0)
    entropy = (log_p.exp() * surprise).sum(-1)
    total = (surprise * weight).sum(-1)
    if kind in STATISTICS:
        mean = torch.where(finite, scaled, 0.0).sum(-1) / finite.sum(-1)
        return {"lse": scaled.logsumexp(-1), "entropy": entropy, "mean": mean, "total": total}[kind]
    options = LOSSES[kind]
    loss, share = weight[y] * nll, options.get("label_smoothing", 0.0)
    if options.get("smoothing_mode") == "exclude_target":
        total = torch.where(own, 0.0, surprise * weight).sum(-1)
        finite = finite & ~own
    if share:
        loss = (1 - share) * loss + share * total / finite.sum(-1).clamp(min=1)
    if "focal_gamma" in options:
        loss = (1 - log_p.exp().gather(1, ids).squeeze(1)) ** 2 * loss
    if "z_loss" in options:
        loss = loss + options["z_loss"] * weight[y] * z.logsumexp(-1) ** 2
    if "confidence_penalty" in options:
        loss = loss - options["confidence_penalty"] * weight[y] * entropy
    return loss


def run(way, z: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """[N] values and [N, V] gradients, in fp64."""
    z = z.detach().requires_grad_()
    value = way(z, *rest)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    return value.detach().double(), gradient.double()


# -- what is allowed ----------------------------------------------------------------------------------


def truth_and_units(z: Tensor, y: Tensor, weight: Tensor, kind: str, reading: dict):
    """The truth, and the units in which an error of it is counted, for each row."""
    wide, weight = z.double(), weight.double()
    cap = reading.get("softcap")
    rest = {name: value for name, value in reading.items() if name != "softcap"}
    capped = reference.softcapped(wide, cap)
    slope = torch.ones(()) if cap is None else (wide / cap).cosh() ** -2  # 1 - tanh^2 cancels in fp64 too
    value, gradient = run(careful, capped, y, weight, kind, rest)
    known = torch.where(capped.isfinite(), capped, 0.0)
    floor = floor_of(kind, weight, known)
    of_value = value.abs() + (gradient * known).abs().sum(-1) + floor
    rng, change = torch.Generator().manual_seed(0), torch.zeros_like(gradient)
    for _ in range(4):
        moved = (1 + EPS * (2 * torch.rand(z.shape, generator=rng).double() - 1)) * capped
        change = torch.maximum(change, (run(careful, moved, y, weight, kind, rest)[1] - gradient).abs())
    bent = torch.zeros(()) if cap is None else 2 * torch.where(wide.isfinite(), wide / cap, 0.0).abs()
    of_gradient = ((gradient.abs() * (1 + bent) + change / EPS) * slope).amax(-1, keepdim=True)
    least = torch.zeros(()) if kind in ("nll", "focal") else floor.unsqueeze(-1) * slope
    return value, gradient * slope, EPS * of_value, EPS * (of_gradient + least)


def floor_of(kind: str, weight: Tensor, z: Tensor) -> Tensor:
    """[N] by what the result is off if each -log p_i, of classes other than the target, is off by 1."""
    total = weight.sum().expand(len(z))
    share = SMOOTHING * weight.max()
    return {
        "nll": torch.zeros(len(z)),
        "focal": torch.zeros(len(z)),
        "lse": torch.ones(len(z)),
        "entropy": torch.ones(len(z)),
        "mean": z.abs().amax(-1),
        "total": total,
        "z_loss": 2 * weight.max() * (1 + z.abs().amin(-1)),
    }.get(kind, share + 0.1 * weight.max()).expand(len(z))


def check(z: Tensor, y: Tensor, weight: Tensor, kind: str, reading: dict) -> None:
    value, gradient, of_value, of_gradient = truth_and_units(z, y, weight, kind, reading)
    our_value, our_gradient = run(ours, z, y, weight, kind, reading)
    plain_value, plain_gradient = run(plain, z, y, weight, kind, reading)
    tiny = torch.finfo(torch.float32).smallest_normal
    for found, naive, exact, unit in (
        (our_value, plain_value, value, of_value),
        (our_gradient, plain_gradient, gradient, of_gradient),
    ):
        allowed = (naive - exact).abs().nan_to_num(0.0) + UNITS * unit + tiny
        beyond = ~((found - exact).abs() <= allowed)
        row = int(beyond.reshape(ROWS, -1).any(-1).nonzero()[0]) if beyond.any() else 0
        assert not beyond.any(), (
            f"{kind} {reading} of {z[row].tolist()} at {int(y[row])}: {found[row].tolist()} should be "
            f"{exact[row].tolist()}; the plain formula has {naive[row].tolist()}"
        )


@pytest.mark.parametrize("kind", [*LOSSES, *STATISTICS])
@settings(max_examples=settings().max_examples // 5)  # of each of eighteen numbers
@given(
    seed=st.integers(0, 2**20),
    num_classes=st.sampled_from([2, 3, 5, 16, 33]),
    gap=st.sampled_from(GAPS + [-gap for gap in GAPS]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    offset=st.sampled_from([0.0, 0.0, 100.0, -1e4]),
    masked=st.sampled_from([0.0, 0.3, 0.9]),
    weights=st.sampled_from(["ones", "random", "mostly zero"]),
    reading=st.sampled_from(READINGS),
)
def test_any_row(kind, seed, num_classes, gap, spread, offset, masked, weights, reading):
    z, y = rows(seed, num_classes, gap, spread, offset, masked)
    rng = torch.Generator().manual_seed(seed)
    weight = torch.ones(num_classes)
    if weights != "ones" and kind not in ("nll", "focal"):
        weight = torch.rand(num_classes, generator=rng)
        if weights == "mostly zero":
            weight = weight * (torch.rand(num_classes, generator=rng) < 0.3)
    check(z, y, weight, kind, reading)


@pytest.mark.parametrize("kind", [*LOSSES, *STATISTICS])
@pytest.mark.parametrize("gap", GAPS)
def test_a_target_that_dominates(kind, gap):
    z = torch.full((ROWS, 3), 0.25)
    z[:, 0] = 3.2
    z[:, 1:] = 3.2 - gap
    check(z, torch.zeros(ROWS, dtype=torch.long), torch.ones(3), kind, {})


# -- what was wrong -------------------------------------------------------------------------------------


def test_the_z_loss_of_a_target_that_is_all_there_is():
    z = torch.tensor([[3.2, -1e9, -1e9]], requires_grad=True)
    loss = lossmith.cross_entropy(z, torch.tensor([0]), z_loss=1.0)
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss, torch.tensor(10.24))
    torch.testing.assert_close(gradient, torch.tensor([[6.4, 0.0, 0.0]]))


@pytest.mark.parametrize("gap", [10.0, 30.0, 100.0])
def test_a_logsumexp_is_rounded_once_where_the_target_dominates(gap):
    target = torch.linspace(-1.0, 1.0, 201).unsqueeze(1)
    z = torch.cat([target, target - gap, target - gap - 0.3], 1)
    stats = lossmith.token_stats(z, torch.zeros(201, dtype=torch.long))
    found, exact = stats.logsumexp.double(), z.double().logsumexp(-1)
    assert ((found - exact).abs() <= 0.51 * EPS * exact.abs() + 8 * EPS * stats.nll).all()


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("gap", [15.0, 40.0])
def test_the_sum_of_all_losses_keeps_the_targets_own_digits(gap, num_classes):
    """With weight on the target alone the sum is its loss."""
    z = torch.zeros(1, num_classes)
    z[0, 0] = gap
    weight = torch.tensor([1.0, *[0.0] * (num_classes - 1)])
    z.requires_grad_()
    stats = SweepOptions(class_weight=weight).stats(Logits(z), torch.tensor([0]), ignore_index=-100)
    (gradient,) = torch.autograd.grad(stats.total_nll.sum(), z, retain_graph=True)
    assert torch.equal(stats.total_nll, stats.nll)
    assert torch.equal(gradient, torch.autograd.grad(stats.nll.sum(), z)[0])


@pytest.mark.parametrize("ratio", [2.0, 4.0, 8.0, 20.0])
def test_the_gradient_of_a_saturated_cap(ratio):
    cap = 5.0
    z = torch.tensor([[ratio * cap, -ratio * cap, 0.5]], requires_grad=True)
    (gradient,) = torch.autograd.grad(lossmith.token_stats(z, torch.tensor([1]), softcap=cap).nll.sum(), z)
    wide = z.detach().double()
    p = (cap * torch.tanh(wide / cap)).softmax(-1)
    exact = (p - torch.tensor([[0.0, 1.0, 0.0]])) / (wide / cap).cosh() ** 2
    torch.testing.assert_close(gradient.double(), exact, rtol=64 * EPS, atol=0)
