"""The routers' bias against its rule, over micro-batches, layers and ranks."""

import copy

import pytest
import torch
from moe_case import B, E, T, V, composed, gates, part_of

from lossmith import MoEBalance
from ranks import on_two_ranks
from reference_components import balance as naive_balance, top_experts as naive_top


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


def bias_and_losses_of(rank: int) -> tuple[torch.Tensor, dict[str, tuple]]:
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
    return balance.expert_bias, losses


def test_ranks_agree_on_the_bias_and_on_global_usage(tmp_path):
    found = on_two_ranks(bias_and_losses_of, tmp_path)
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
