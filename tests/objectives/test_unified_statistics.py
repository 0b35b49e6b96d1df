"""The statistics of UnifiedLoss: what one bad batch leaves in them."""

import pytest
import torch
from unified_case import E, V, inputs

from lossmith import UnifiedLoss


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_batch_that_is_no_number_is_counted_apart(bad):
    given = inputs()
    logits, targets, gates = (given[name] for name in ("logits", "targets", "gate_logits"))
    loss_fn = UnifiedLoss(V, use_ngram_penalty=True, use_moe_balancing=True, num_experts=E)
    loss_fn(logits, targets, gate_logits=gates)
    expected = loss_fn.get_loss_statistics()
    broken = logits.detach().clone()
    broken[0, 0, targets[0, 0]] = bad if bad != bad else -bad
    assert not loss_fn(broken, targets, gate_logits=gates).isfinite()
    assert not loss_fn(logits, targets, gate_logits=gates * torch.nan).isfinite()
    assert loss_fn.get_loss_statistics() == {**expected, "num_nonfinite": 2}
    assert (expected["num_batches"], expected["num_nonfinite"]) == (1, 0)
    loss_fn(logits * 2, targets, gate_logits=gates)
    statistics = loss_fn.get_loss_statistics()
    doubled = loss_fn(logits * 2, targets, gate_logits=gates).item()
    assert statistics["total_loss"] == pytest.approx((expected["total_loss"] + doubled) / 2)
    assert statistics["num_batches"] == 2


def test_where_every_batch_is_bad_there_is_no_mean():
    given = inputs()
    loss_fn = UnifiedLoss(V)
    loss_fn(given["logits"] * torch.nan, given["targets"])
    statistics = loss_fn.get_loss_statistics()
    assert (statistics["num_batches"], statistics["num_nonfinite"]) == (0, 1)
    assert statistics["total_loss"] != statistics["total_loss"]  # NaN: a mean of nothing
    loss_fn.reset_statistics()
    loss_fn(given["logits"], given["targets"])
    assert loss_fn.get_loss_statistics()["num_nonfinite"] == 0


def test_a_part_that_came_later_is_a_mean_over_all_batches():
    given = inputs()
    loss_fn = UnifiedLoss(V, use_ngram_penalty=True)
    part = loss_fn(given["logits"], given["targets"], return_detailed=True)["ngram_penalty"]
    loss_fn.components["ngram_penalty"].weight = 0.0
    loss_fn(given["logits"], given["targets"])
    assert loss_fn.get_loss_statistics()["ngram_penalty"] == pytest.approx(part.item() / 2)


def test_an_evaluation_in_inference_mode_may_come_first():
    loss_fn = UnifiedLoss(5)
    logits, targets = torch.randn(2, 3, 5), torch.zeros(2, 3).long()
    with torch.inference_mode():
        loss_fn(logits, targets)
    loss_fn(logits.clone().requires_grad_(), targets).backward()
    assert loss_fn.get_loss_statistics()["num_batches"] == 2
