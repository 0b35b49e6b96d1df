"""Routers against loops over tokens and experts; the bias against its rule, over micro-batches and ranks."""

import copy
import os

import pytest
import torch
import torch.multiprocessing

from lossmith import ComposedLoss, CrossEntropyLoss, MoEBalance, RouterZLoss, Weighted

B, T, E, V = 2, 5, 4, 7


def gates(rng, *shape, scale=2.0, dtype=torch.float64) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=rng, dtype=dtype)).requires_grad_()


def composed(component, weight=1.0, **options) -> ComposedLoss:
    return ComposedLoss(CrossEntropyLoss(**options), {"part": Weighted(component, weight)})


def batch(rng, rows=B):
    logits = torch.randn(rows, T, V, generator=rng, dtype=torch.float64, requires_grad=True)
    return logits, torch.randint(V, (rows, T), generator=rng)


def part_of(component, gate_logits, attention_mask=None, **inputs) -> torch.Tensor:
    """The component's part of a composed loss on some logits."""
    rows = torch.zeros(B, T, V, dtype=torch.float64), torch.zeros(B, T, dtype=torch.long)
    criterion = composed(component)
    if attention_mask is not None:  # the routers', while all targets count
        inputs |= {"attention_mask": attention_mask, "mask": torch.ones(B, T).bool()}
    return criterion.evaluate(*rows, gate_logits=gate_logits, **inputs).parts["part"]


def naive_balance(z, indices, pi, mask=None) -> torch.Tensor:
    """sum_e f_e P_e / pi_e of z [N, E] and the experts that each token chose."""
    tokens = [t for t in range(len(z)) if mask is None or mask.reshape(-1)[t]]
    k = len(indices[0])
    loss = torch.zeros((), dtype=torch.float64)
    for e in range(z.shape[-1]):
        f = sum(int(c) == e for t in tokens for c in indices[t]) / (len(tokens) * k)
        p = sum(z[t, e].exp() / sum(z[t, i].exp() for i in range(z.shape[-1])) for t in tokens) / len(tokens)
        loss = loss + f * p / pi[e]
    return loss


def naive_top(z, k) -> list[list[int]]:
    return [sorted(range(z.shape[-1]), key=lambda e: -row[e].item())[:k] for row in z]


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


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


# ── the bias ──────────────────────────────────────────────────────────────────────────────────────


def routed(*counts: int) -> torch.Tensor:
    """[N, E] gate logits of tokens of which so many choose each expert."""
    chosen = torch.tensor([e for e, count in enumerate(counts) for _ in range(count)])
    return torch.nn.functional.one_hot(chosen, len(counts)).float() * 5


def test_the_bias_steps_once_over_two_micro_batches():
    model = torch.nn.Linear(3, V)
    balance = MoEBalance(E, mode="bias", bias_update_rate=0.01)
    criterion = composed(balance)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    targets = torch.zeros(1, 4, dtype=torch.long)
    for counts in ((4, 0, 0, 0), (1, 2, 0, 1)):  # 5 2 0 1 against a mean of 2
        detailed = criterion(
            model(torch.ones(1, 4, 3)), targets, gate_logits=routed(*counts), return_detailed=True
        )
        assert "part" not in detailed
        detailed["total_loss"].backward()
        assert not balance.expert_bias.any()
    optimizer.step()
    expected = torch.tensor([-0.01, 0.0, 0.01, 0.01])
    torch.testing.assert_close(balance.expert_bias, expected)
    optimizer.step()  # nothing came since
    torch.testing.assert_close(balance.expert_bias, expected)
    with torch.no_grad():
        criterion(model(torch.ones(1, 4, 3)), targets, gate_logits=routed(4, 0, 0, 0))
    optimizer.step()  # an evaluation does not count
    torch.testing.assert_close(balance.expert_bias, expected)


def step(balance: MoEBalance, gate_logits, **inputs) -> None:
    if "attention_mask" in inputs:  # the routers', while the target counts
        inputs["mask"] = torch.ones(1, 1, dtype=torch.bool)
    part = composed(balance).evaluate(
        torch.zeros(1, 1, V), torch.zeros(1, 1, dtype=torch.long), gate_logits=gate_logits, **inputs
    )
    assert "part" not in part.parts
    balance.on_optimizer_step()


def test_equal_counts_move_nothing():
    for experts in (3, 7, 10):
        balance = MoEBalance(experts, mode="bias", target_expert_usage=1 / experts)
        step(balance, routed(*[3] * experts))
        assert not balance.expert_bias.any()


def test_the_bias_leads_to_the_target_usage():
    balance = MoEBalance(3, mode="bias", target_expert_usage=[0.5, 0.25, 0.25], bias_update_rate=1.0)
    step(balance, routed(3, 3, 2))  # against 4 2 2
    assert balance.expert_bias.tolist() == [1, -1, 0]


def test_the_bias_counts_given_indices_and_no_padding():
    balance = MoEBalance(2, mode="bias", bias_update_rate=1.0)
    indices = torch.tensor([[1], [1], [0]])
    step(balance, torch.zeros(3, 2), expert_indices=indices)
    assert balance.expert_bias.tolist() == [1, -1]
    step(balance, torch.zeros(3, 2), expert_indices=indices, attention_mask=torch.tensor([0, 1, 1]))
    assert balance.expert_bias.tolist() == [1, -1]


def test_select_chooses_with_the_bias_and_weighs_without(rng):
    balance = MoEBalance(E, mode="bias", top_k=2)
    z = gates(rng, B, T, E)
    plain, weights = balance.select(z)
    torch.testing.assert_close(weights, z.softmax(-1).topk(2).values)
    balance.expert_bias[3] = 10.0
    indices, weights = balance.select(z, 1)
    assert (indices == 3).all()
    torch.testing.assert_close(weights, z.softmax(-1)[..., 3:])
    (gradient,) = torch.autograd.grad(weights.sum(), z)
    assert (gradient != 0).any()
    same, _ = MoEBalance(E, top_k=2).select(z)  # without a bias
    assert torch.equal(same, plain)
    half, weights = balance.select(z.bfloat16())
    assert half.shape == (B, T, 2)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(
        MoEBalance(E, scoring="sigmoid", mode="bias").select(z, E)[1].sort().values, z.sigmoid().sort().values
    )


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_bias_evens_out_usage(rng, scoring):
    z = torch.randn(512, E, generator=rng)
    z[:, 0] += 2
    balance = MoEBalance(E, mode="bias", top_k=2, bias_update_rate=0.01, scoring=scoring)

    def largest():
        return balance.select(z)[0].flatten().bincount(minlength=E).max().item() / 1024

    assert largest() > 0.4
    for _ in range(100):
        step(balance, z)
    assert largest() < 0.27


def test_every_layer_has_its_bias():
    balance = MoEBalance(2, mode="bias", bias_update_rate=1.0, num_layers=2)
    step(balance, [routed(3, 1), routed(0, 2)])
    assert balance.expert_bias.tolist() == [[-1, 1], [1, -1]]
    tokens = torch.zeros(1, 2)
    assert [balance.select(tokens, layer=i)[0].item() for i in (0, 1)] == [1, 0]
    for layer in (None, 2, -1):
        with pytest.raises(ValueError, match=r"layer must be in \[0, 2\)"):
            balance.select(tokens, layer=layer)
    with pytest.raises(ValueError, match="layer must be left out"):
        MoEBalance(2, mode="bias").select(tokens, layer=0)
    with pytest.raises(ValueError, match=r"2 layers, but one expert_bias .* pass num_layers=2"):
        step(MoEBalance(2, mode="bias"), [tokens, tokens])


def test_the_bias_is_saved_copied_and_stays_in_full_precision():
    balance = MoEBalance(2, mode="bias", bias_update_rate=0.001)
    balance.expert_bias += 0.5
    assert set(balance.state_dict()) == {"expert_bias"}
    assert not MoEBalance(2, target_expert_usage=[0.75, 0.25]).state_dict()
    copied = copy.deepcopy(composed(balance)).bfloat16().components["part"].component
    assert copied.expert_bias.dtype == torch.float32
    step(copied, routed(1, 0))
    torch.testing.assert_close(copied.expert_bias, torch.tensor([0.499, 0.501]))
    assert balance.expert_bias.tolist() == [0.5, 0.5]
    other = MoEBalance(2, mode="bias")
    other.load_state_dict(copied.state_dict())
    assert torch.equal(other.expert_bias, copied.expert_bias)


# ── over ranks ────────────────────────────────────────────────────────────────────────────────────


def case_of(rank: int) -> torch.Tensor:
    return (routed(3, 1, 0), routed(1, 0, 1))[rank]  # 4 1 1 in all


def worker(rank: int, port: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    balance = MoEBalance(3, mode="bias", bias_update_rate=1.0)
    step_inputs = torch.zeros(1, 1, V), torch.zeros(1, 1, dtype=torch.long)
    for row in case_of(rank).split(2):  # one micro-batch on one rank, two on the other
        composed(balance)(*step_inputs, gate_logits=row)
    weight.grad = torch.ones(1)
    optimizer.step()
    z = case_of(rank).double().requires_grad_()
    losses = {}
    for scope in ("local", "global"):
        loss = part_of(MoEBalance(3, stats_scope=scope), z)
        losses[scope] = loss.detach(), *torch.autograd.grad(loss, z)
    torch.save((balance.expert_bias, losses), f"{out}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # a process group at exit may abort


def test_ranks_agree_on_the_bias_and_on_global_usage(tmp_path):
    port = 29500 + (os.getpid() + 997) % 2000
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for bias, _ in found:
        assert bias.tolist() == [-1, 1, 1]
    whole = torch.cat([case_of(0), case_of(1)]).double().requires_grad_()
    expected = naive_balance(whole, naive_top(whole, 1), [1 / 3] * 3)
    (gradient,) = torch.autograd.grad(expected, whole)
    shares = [len(case_of(rank)) / len(whole) for rank in range(2)]
    losses = [losses["global"] for _, losses in found]
    torch.testing.assert_close(
        sum(s * loss for s, (loss, _) in zip(shares, losses, strict=True)), expected.detach()
    )
    torch.testing.assert_close(torch.cat([s * g for s, (_, g) in zip(shares, losses, strict=True)]), gradient)
    local = sum(s * losses["local"][0] for s, (_, losses) in zip(shares, found, strict=True))
    assert abs(local - expected) > 1e-3


# ── what is refused ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be >= 1"),
        ({"top_k": 5}, "top_k must be >= 1 and <= num_experts=4; got 5"),
        ({"num_layers": 0}, "num_layers must be >= 1"),
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
            {"gate_logits": torch.zeros(3, E), "attention_mask": torch.ones(3)},
            r"got torch.float32. Pass mask.bool",
        ),
        ({"gate_logits": torch.zeros(3, E), "attention_mask": torch.ones(4).bool()}, r"\[3\]; got \[4\]"),
        ({"gate_logits": torch.zeros(2, 3, E), "attention_mask": torch.ones(3, 2).bool()}, r"got \[3, 2\]"),
    ],
)
def test_bad_inputs(inputs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        part_of(MoEBalance(E), **inputs)


def test_the_number_of_layers_and_k_are_checked():
    with pytest.raises(ValueError, match="expected gate_logits of num_layers=2 layers; got 1"):
        part_of(MoEBalance(E, num_layers=2), torch.zeros(3, E))
    with pytest.raises(ValueError, match="k must be >= 1 and <= num_experts=4; got 9"):
        MoEBalance(E).select(torch.zeros(3, E), 9)
    with pytest.raises(TypeError, match=r"top_k must be a whole number; got 1\.5"):
        MoEBalance(E, top_k=1.5)
