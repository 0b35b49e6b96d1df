"""Which experts a batch used: counts, shares and how far the busiest is above its share."""

import pytest
import torch
from moe_case import B, E, T, V, composed

from lossmith import Component, ComposedLoss, CrossEntropyLoss, LossModifierPipeline, MoEBalance, UnifiedLoss

ROWS = torch.zeros(1, 8, V), torch.zeros(1, 8, dtype=torch.long)


def routed(*counts: int) -> torch.Tensor:
    """[1, N, E] gate logits of tokens of which so many choose each expert."""
    chosen = torch.tensor([e for e, count in enumerate(counts) for _ in range(count)])
    return torch.nn.functional.one_hot(chosen, len(counts)).float().unsqueeze(0) * 5


@pytest.mark.parametrize("mode", ["loss", "bias"])
@pytest.mark.parametrize("is_training", [False, True])
def test_usage_can_be_read(mode, is_training):
    balance = MoEBalance(4, mode=mode)
    with torch.set_grad_enabled(is_training):
        output = composed(balance).evaluate(*ROWS, gate_logits=routed(5, 2, 0, 1))
    assert balance.expert_counts.tolist() == [5, 2, 0, 1]
    assert balance.expert_usage.tolist() == [5 / 8, 2 / 8, 0, 1 / 8]
    assert output.metrics["part/max_violation"] == 5 / 2 - 1
    assert ("part" in output.parts) == (mode == "loss")
    assert balance.expert_counts.sum() == 8


def test_before_the_first_batch_there_is_none():
    balance = MoEBalance(4)
    assert balance.expert_counts is None
    assert balance.expert_usage is None
    assert balance.metrics() == {}


def test_of_several_layers_the_worst_is_told():
    balance = MoEBalance(2)
    output = composed(balance).evaluate(*ROWS, gate_logits=[routed(4, 4), routed(7, 1)])
    assert balance.expert_counts.tolist() == [[4, 4], [7, 1]]
    assert balance.expert_usage.sum(-1).tolist() == [1, 1]
    assert output.metrics["part/max_violation"] == 7 / 4 - 1


def test_it_is_a_violation_of_the_target():
    balance = MoEBalance(2, target_expert_usage=[0.75, 0.25])
    assert composed(balance).evaluate(*ROWS, gate_logits=routed(6, 2)).metrics["part/max_violation"] == 0
    assert composed(balance).evaluate(*ROWS, gate_logits=routed(4, 4)).metrics["part/max_violation"] == 1


def test_padding_and_other_choices():
    balance, mask = MoEBalance(2), torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])
    indices = torch.tensor([[[0, 1]] * 3 + [[1, 1]] + [[0, 0]] * 4])
    metrics = (
        composed(balance)
        .evaluate(*ROWS, gate_logits=routed(4, 4), expert_indices=indices, attention_mask=mask)
        .metrics
    )
    assert balance.expert_counts.tolist() == [3, 5]
    assert metrics["part/max_violation"] == 5 / 4 - 1
    empty = composed(balance).evaluate(
        *ROWS, gate_logits=routed(4, 4), attention_mask=torch.zeros(1, 8).long()
    )
    assert empty.metrics["part/max_violation"] == 0
    assert balance.expert_usage.tolist() == [0, 0]


def test_the_statistics_of_unified_loss_have_the_mean():
    loss_fn = UnifiedLoss(V, use_moe_balancing=True, num_experts=2)
    first, second = (loss_fn.evaluate(*ROWS, gate_logits=routed(*counts)) for counts in ((6, 2), (4, 4)))
    assert first.metrics["moe_balance_loss/max_violation"] == 0.5  # its own, though it is read later
    assert second.metrics["moe_balance_loss/max_violation"] == 0
    assert loss_fn.get_loss_statistics()["moe_balance_loss/max_violation"] == 0.25
    assert loss_fn.components["moe_balance_loss"].component.expert_usage.tolist() == [0.5, 0.5]
    assert set(loss_fn(*ROWS, gate_logits=routed(4, 4), return_detailed=True)) == {
        "main_loss",
        "moe_balance_loss",
        "total_loss",
    }
    around = LossModifierPipeline(base=loss_fn).evaluate(*ROWS, gate_logits=routed(8, 0))
    assert around.metrics["moe_balance_loss/max_violation"] == 1


def test_what_is_off_tells_nothing():
    loss_fn = UnifiedLoss(V, use_moe_balancing=True, num_experts=2)
    loss_fn.components["moe_balance_loss"].weight = 0.0
    assert "moe_balance_loss/max_violation" not in loss_fn.evaluate(*ROWS, gate_logits=routed(4, 4)).metrics


def test_a_component_of_ones_own_tells_what_it_measures():
    class Lengths(Component):
        def metrics(self):
            return {"mean": torch.tensor(3.0), "later": lambda: torch.tensor(4.0)}

    output = ComposedLoss(CrossEntropyLoss(), {"lengths": Lengths()}).evaluate(*ROWS)
    assert (output.metrics["lengths/mean"], output.metrics["lengths/later"]) == (3, 4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("are_given", [False, True])
def test_tokens_whose_router_is_no_number_do_not_count(bad, are_given):
    """They would all seem to choose the first experts, and drive the bias."""
    gates = routed(2, 3, 3)
    gates[:, 5:, 1] = bad
    given = {"expert_indices": gates.topk(1).indices} if are_given else {}
    balance = MoEBalance(3, mode="bias", bias_update_rate=1.0)
    composed(balance).evaluate(*ROWS, gate_logits=gates, **given)
    assert balance.expert_counts.tolist() == [2, 3, 0]
    balance.on_optimizer_step()
    assert balance.expert_bias.tolist() == [-1, -1, 1]
    masked = routed(2, 3, 3)
    masked[..., 0] = -torch.inf  # an expert that is switched off is none the worse
    composed(balance).evaluate(*ROWS, gate_logits=masked)
    assert balance.expert_counts.sum() == 8
    assert composed(MoEBalance(3)).evaluate(*ROWS, gate_logits=gates).total.isnan()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["loss", "bias"])
def test_it_survives_a_compiled_loss(mode):
    torch._dynamo.reset()
    balance = MoEBalance(E, mode=mode, top_k=2)
    criterion = composed(balance)
    rng = torch.Generator().manual_seed(0)
    gates = torch.randn(B, T, E, generator=rng)
    logits, targets = torch.zeros(B, T, V), torch.zeros(B, T, dtype=torch.long)
    compiled = torch.compile(
        lambda z: criterion(logits, targets, gate_logits=z), fullgraph=True, backend="aot_eager"
    )
    compiled(gates)
    found = balance.expert_counts.clone()
    criterion(logits, targets, gate_logits=gates)
    assert torch.equal(found, balance.expert_counts)
    torch._dynamo.reset()
