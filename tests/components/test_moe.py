"""Routers' losses against loops over tokens and experts."""

import pytest
import torch
from moe_case import MASK, B, E, T, batch, composed, gates, part_of

from lossmith import CrossEntropyLoss, MoEBalance, RouterZLoss
from reference_components import balance as naive_balance, top_experts as naive_top

# ── the loss ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("usage", [None, 0.25, [0.5, 0.25, 0.125, 0.125]])
@pytest.mark.parametrize("is_flat", [False, True])
def test_balance_is_its_formula(rng, k, mask, usage, is_flat):
    z = gates(rng, B, T, E)
    pi = usage if isinstance(usage, list) else [1 / E] * E
    flat = z.reshape(-1, E)
    balance = MoEBalance(E, top_k=k, target_expert_usage=usage)
    found = part_of(balance, flat if is_flat else z, attention_mask=mask)
    expected = naive_balance(flat, naive_top(flat, k), pi, mask)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z))


@pytest.mark.parametrize("shape", [(B, T, 2), (B * T, 2), (B, T), (B * T,), (B, T, 1)])
def test_given_indices_count_instead_of_the_top(rng, shape):
    z = gates(rng, B, T, E)
    indices = torch.randint(E, shape, generator=rng)
    found = part_of(MoEBalance(E), z, expert_indices=indices)
    chosen = indices.reshape(B * T, -1).tolist()
    torch.testing.assert_close(found, naive_balance(z.reshape(-1, E), chosen, [1 / E] * E))


@pytest.mark.parametrize("k", [1, 2])
def test_one_at_balance_exactly(k):
    z = torch.eye(E, dtype=torch.float64) + torch.eye(E, dtype=torch.float64).roll(
        1, 0
    )  # each expert in turn
    found = part_of(MoEBalance(E, top_k=k), z)
    assert found == 1 if k == 2 else abs(found - 1) < 1e-15
    even = torch.zeros(E, E)
    indices = (torch.arange(E).unsqueeze(1) + torch.arange(k)) % E
    assert part_of(MoEBalance(E), even, expert_indices=indices) == 1


def test_one_at_a_target_usage_that_is_met():
    usage = [0.5, 0.25, 0.25]
    z = torch.tensor(usage, dtype=torch.float64).log().expand(4, 3)
    indices = torch.tensor([0, 0, 1, 2])
    found = part_of(MoEBalance(3, target_expert_usage=usage), z, expert_indices=indices)
    torch.testing.assert_close(found, torch.tensor(1.0, dtype=torch.float64))


def test_collapse_costs_the_number_of_experts_unclamped():
    z = torch.zeros(6, 64)
    z[:, 3] = 1000.0
    assert part_of(MoEBalance(64), z) == 64


def test_lists_of_layers_are_averaged(rng):
    layers = tuple(gates(rng, B * T, E) for _ in range(3))
    balance = MoEBalance(E, top_k=2)
    alone = [part_of(balance, z, attention_mask=MASK) for z in layers]
    torch.testing.assert_close(part_of(balance, layers, attention_mask=MASK), torch.stack(alone).mean())
    indices = [torch.randint(E, (B * T, 2), generator=rng) for _ in layers]
    alone = [part_of(balance, z, expert_indices=i) for z, i in zip(layers, indices, strict=True)]
    found = part_of(MoEBalance(E, num_layers=3), list(layers), expert_indices=indices)
    torch.testing.assert_close(found, torch.stack(alone).mean())


@pytest.mark.parametrize("component", [MoEBalance(E, top_k=2), RouterZLoss()], ids=["balance", "z"])
def test_padding_changes_nothing_and_gets_nothing(rng, component):
    z = gates(rng, B, T, E)
    found = part_of(component, z, attention_mask=MASK)
    kept = MASK.bool()
    torch.testing.assert_close(found, part_of(component, z[kept]))
    with torch.no_grad():
        garbage = z.masked_fill(~kept.unsqueeze(-1), torch.nan)
    garbage.requires_grad_()
    assert part_of(component, garbage, attention_mask=MASK) == found
    (gradient,) = torch.autograd.grad(part_of(component, garbage, attention_mask=kept), garbage)
    assert (gradient[~kept] == 0).all()
    assert (gradient[kept] != 0).any()
    nothing = part_of(component, garbage, attention_mask=torch.zeros_like(MASK))
    (gradient,) = torch.autograd.grad(nothing, garbage)
    assert nothing == 0
    assert (gradient == 0).all()


def test_the_mask_of_the_objective_reaches_the_router(rng):
    z, (logits, targets) = gates(rng, B, T, E), batch(rng)
    criterion = composed(MoEBalance(E))
    found = criterion(logits, targets, attention_mask=MASK, gate_logits=z, return_detailed=True)["part"]
    assert found == part_of(MoEBalance(E), z, attention_mask=MASK)
    # a token without a target is routed all the same
    targets[:, :2] = -100
    found = criterion(logits, targets, attention_mask=MASK, gate_logits=z, return_detailed=True)["part"]
    assert found == part_of(MoEBalance(E), z, attention_mask=MASK)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_gradcheck_of_the_balance(rng, scoring, mask):
    indices = torch.randint(E, (B, T, 2), generator=rng)

    def loss(z):
        return part_of(MoEBalance(E, scoring=scoring), z, attention_mask=mask, expert_indices=indices)

    torch.autograd.gradcheck(loss, gates(rng, B, T, E))


def test_sigmoid_scores_are_divided_by_their_sum(rng):
    z = gates(rng, B * T, E)
    found = part_of(MoEBalance(E, scoring="sigmoid", top_k=2), z)
    scores = 1 / (1 + (-z).exp())
    shares = (scores / scores.sum(-1, keepdim=True)).log()  # whose softmax they are
    torch.testing.assert_close(found, naive_balance(shares, naive_top(z, 2), [1 / E] * E))
    assert part_of(MoEBalance(E, scoring="sigmoid"), torch.full((3, E), -200.0)).isfinite()


def test_descent_evens_out_usage(rng):
    """Random tokens through a router that prefers one expert."""
    tokens = torch.randn(256, 8, generator=rng)
    router = torch.nn.Linear(8, E)
    with torch.no_grad():
        router.bias[0] += 4
    balance = MoEBalance(E)

    def share_of_the_first():
        return (router(tokens).argmax(-1) == 0).float().mean().item()

    assert share_of_the_first() > 0.9
    optimizer = torch.optim.Adam(router.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        part_of(balance, router(tokens)).backward()
        optimizer.step()
    assert 0.1 < share_of_the_first() < 0.4


# ── the router's z-loss ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mask", [None, MASK])
def test_router_z_is_its_formula(rng, mask):
    layers = [gates(rng, B, T, E), gates(rng, B * T, E)]
    found = part_of(RouterZLoss(), layers, attention_mask=mask)
    expected = torch.zeros((), dtype=torch.float64)
    for z in layers:
        rows = z.reshape(-1, E)
        tokens = [t for t in range(len(rows)) if mask is None or mask.reshape(-1)[t]]
        expected = expected + sum(rows[t].exp().sum().log() ** 2 for t in tokens) / len(tokens) / len(layers)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, layers), torch.autograd.grad(expected, layers))
    torch.autograd.gradcheck(lambda z: part_of(RouterZLoss(), z, attention_mask=mask), gates(rng, B, T, E))


def test_router_z_is_unclamped():
    assert part_of(RouterZLoss(), torch.tensor([[1e4, 0.0]])) == 1e8


# ── in a composition ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("component", [MoEBalance(E), RouterZLoss(), MoEBalance(E, mode="bias")])
def test_a_weight_of_zero_is_as_good_as_absent(rng, component):
    logits, targets = batch(rng)
    plain = CrossEntropyLoss()(logits, targets)
    without = composed(component, 0.0)(logits, targets)  # nor is the input needed
    assert torch.equal(plain, without)
    assert all(map(torch.equal, torch.autograd.grad(plain, logits), torch.autograd.grad(without, logits)))


@pytest.mark.parametrize("component", [MoEBalance(E), RouterZLoss(), MoEBalance(E, mode="bias")])
def test_a_missing_input_is_named(rng, component):
    with pytest.raises(ValueError, match="needs gate_logits; pass gate_logits="):
        composed(component)(*batch(rng))


def test_micro_batches_take_their_share(rng):
    """The z-loss is a mean: its parts add up. The balance is a statistic of the micro-batch."""
    logits, targets = batch(rng, rows=4)
    z = gates(rng, 4, T, E)
    for component, adds_up in ((RouterZLoss(), True), (MoEBalance(E), False)):
        criterion = composed(component, 0.3)
        whole = criterion.evaluate(logits, targets, gate_logits=z)
        halves = [slice(0, 1), slice(1, 4)]
        split = [
            criterion.evaluate(logits[h], targets[h], gate_logits=z[h], denominator=targets.numel())
            for h in halves
        ]
        alone = [criterion.evaluate(logits[h], targets[h], gate_logits=z[h]).parts["part"] for h in halves]
        torch.testing.assert_close(sum(s.parts["part"] for s in split), alone[0] / 4 + 3 * alone[1] / 4)
        difference = abs(sum(s.total for s in split) - whole.total)
        assert (difference < 1e-12) == adds_up


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gates_are_computed_in_full(rng, dtype):
    z = gates(rng, B, T, E, dtype=dtype)
    for component in (MoEBalance(E, top_k=2), RouterZLoss()):
        found = part_of(component, z)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), part_of(component, z.double()), rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(found, z)
        assert gradient.isfinite().all()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert part_of(component, z) == found


def test_one_expert_and_one_token():
    z = torch.zeros(1, 1, requires_grad=True)
    assert part_of(MoEBalance(1), z) == 1
    assert part_of(RouterZLoss(), z) == 0
    part_of(RouterZLoss(), z).backward()
    assert z.grad.isfinite().all()
    assert part_of(MoEBalance(2, top_k=2), torch.zeros(1, 2)) == 1
    no_token = torch.zeros(0, E, requires_grad=True)
    for component in (MoEBalance(E, top_k=2), RouterZLoss()):
        assert part_of(component, no_token) == 0
    assert part_of(MoEBalance(E), no_token, expert_indices=torch.zeros(0, 2, dtype=torch.long)) == 0


# ── what is refused ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be a whole number >= 1"),
        ({"top_k": 5}, "top_k must be >= 1 and <= num_experts=4; got 5"),
        ({"num_layers": 0}, "num_layers must be a whole number >= 1"),
        ({"mode": "gradient"}, "mode must be one of 'loss', 'bias'; got 'gradient'"),
        ({"stats_scope": "all"}, "stats_scope must be one of"),
        ({"scoring": "relu"}, "scoring must be one of"),
        ({"bias_update_rate": -1.0}, "bias_update_rate must be a number >= 0"),
        ({"bias_update_rate": float("nan")}, "bias_update_rate must be a number >= 0"),
        (
            {"target_expert_usage": 0.125},
            r"sum to 1 over num_experts=4; got 0.125, a sum of 0.5. Leave it out",
        ),
        ({"target_expert_usage": [0.5, 0.5]}, "one share or num_experts=4; got 2"),
        ({"target_expert_usage": [1.0, 0.0, 0.0, 0.0]}, "shares > 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MoEBalance(**{"num_experts": E, **options})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"gate_logits": []}, "at least one layer; got an empty list"),
        ({"gate_logits": [None]}, "floating-point tensors .* got NoneType"),
        ({"gate_logits": torch.zeros(3, E, dtype=torch.long)}, "floating-point tensors .* got torch.int64"),
        ({"gate_logits": torch.zeros(3, E + 1)}, r"E = num_experts=4; got \[3, 5\]"),
        ({"gate_logits": torch.tensor(1.0)}, r"E = num_experts=4; got \[\]"),
        ({"gate_logits": torch.zeros(2, 2, 3, E)}, "Pass several layers as a list"),
        ({"gate_logits": torch.zeros(3, E), "expert_indices": torch.zeros(2, 2).long()}, "for the 3 tokens"),
        ({"gate_logits": torch.zeros(3, E), "expert_indices": torch.zeros(3, 2)}, "integer tensors"),
        (
            {"gate_logits": torch.zeros(3, E), "expert_indices": torch.tensor([0, 1, 4])},
            r"in \[0, 4\).*got 4",
        ),
        (
            {"gate_logits": [torch.zeros(3, E)] * 2, "expert_indices": torch.zeros(3, 2).long()},
            "as many layers",
        ),
        (
            {"gate_logits": torch.zeros(3, E), "attention_mask": torch.full((3,), 0.5)},
            r"attention_mask must be 0 or 1 .*; got 0\.5 at position \(0,\)",
        ),
        (
            {"gate_logits": torch.zeros(3, E), "attention_mask": [1, 1, 1]},
            r"attention_mask must be a tensor.*got list",
        ),
        ({"gate_logits": torch.zeros(3, E), "attention_mask": torch.ones(4).bool()}, r"\[3\]; got \[4\]"),
        ({"gate_logits": torch.zeros(2, 3, E), "attention_mask": torch.ones(3, 2).bool()}, r"got \[3, 2\]"),
    ],
)
def test_bad_inputs(inputs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        part_of(MoEBalance(E), **inputs)


def test_a_mask_of_floats_masks_padding(rng):
    z = gates(rng, B, T, E)
    expected = part_of(MoEBalance(E), z, MASK)
    assert torch.equal(part_of(MoEBalance(E), z, MASK.float()), expected)


def test_the_number_of_layers_and_k_are_checked():
    with pytest.raises(ValueError, match="expected gate_logits of num_layers=2 layers; got 1"):
        part_of(MoEBalance(E, num_layers=2), torch.zeros(3, E))
    with pytest.raises(ValueError, match="k must be >= 1 and <= num_experts=4; got 9"):
        MoEBalance(E).select(torch.zeros(3, E), 9)
    with pytest.raises(TypeError, match=r"top_k must be a whole number >= 1 or None; got 1\.5"):
        MoEBalance(E, top_k=1.5)
