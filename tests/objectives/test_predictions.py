"""A linear head in place of logits: what its tensors would be by name."""

import pytest
import torch

import lossmith
from lossmith.engine.head.linear_head import LinearHead
from lossmith.engine.predictions import Logits

N, D, V = 6, 4, 7


def objectives():
    return {
        "terms": lossmith.CrossEntropyLoss(label_smoothing=0.1, z_loss=0.1),
        "components": lossmith.UnifiedLoss(V, use_ngram_penalty=True, ngram_size=1),
        "pipeline": lossmith.LossModifierPipeline([lossmith.EntropyModifier({})]),
        "custom": lossmith.LossModifierPipeline([Doubled()]),
    }


class Doubled(lossmith.BaseLossModifier):
    def modify_loss(self, logits, targets, loss, **kwargs):
        return loss * logits.logsumexp(-1).mean()


@pytest.mark.parametrize("kind", objectives())
def test_a_head_is_taken_like_its_tensors_by_name(kind):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 3, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    bias, targets = torch.randn(V, requires_grad=True), torch.randint(V, (2, 3))
    loss = objectives()[kind]
    expected = loss.evaluate(
        None,
        targets,
        hidden_states=hidden,
        lm_head_weight=weight,
        lm_head_bias=bias,
        lm_head_softcap=2.0,
        memory_budget=64,
    )
    head = LinearHead(hidden, weight, bias, softcap=2.0, memory_budget=64)
    for found in (loss.evaluate(head, targets), loss.evaluate(Logits(head.logits()), targets)):
        torch.testing.assert_close(found.total, expected.total)
        assert list(found.parts) == list(expected.parts)
        leaves = (hidden, weight, bias)
        gradients = torch.autograd.grad(found.total, leaves, retain_graph=True)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.total, leaves, retain_graph=True))


@pytest.mark.parametrize("scale", [1.0, 0.25, torch.tensor(3.0)])
def test_a_head_with_a_scale_has_its_bias_scaled_too(scale):
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D), torch.randn(V, requires_grad=True)
    targets = torch.randint(V, (N,))
    expected = torch.nn.functional.cross_entropy(scale * (hidden @ weight.t() + bias), targets)
    head = {"hidden_states": hidden, "lm_head_weight": weight, "lm_head_bias": bias, "lm_head_scale": scale}
    found = lossmith.CrossEntropyLoss()(targets=targets, **head)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, bias), torch.autograd.grad(expected, bias))


def test_a_head_is_not_named_twice():
    head = LinearHead(torch.randn(N, D), torch.randn(V, D))
    with pytest.raises(TypeError, match="pass either logits or hidden_states"):
        lossmith.CrossEntropyLoss().evaluate(head, torch.zeros(N).long(), hidden_states=head.hidden)


def test_a_scorer_has_no_head():
    head = LinearHead(torch.randn(N, D), torch.randn(1, D))
    pipeline = lossmith.LossModifierPipeline(model_mode="SEQUENCE_SCORER")
    with pytest.raises(TypeError, match=r"predictions \[B\] are missing"):
        pipeline.evaluate(head, torch.rand(N))


def test_what_an_objective_would_use_now():
    loss = lossmith.UnifiedLoss(V, D, use_mtp=True)
    assert {"hidden_states", "lm_head_weight"} < loss.wanted_inputs < set(loss.input_names)
    loss.components["mtp_loss"].weight = 0.0
    assert loss.wanted_inputs == set()
    assert lossmith.LossModifierPipeline(base=loss).wanted_inputs == set()
    assert lossmith.UnifiedLoss(V, primary_loss_type="adaptive_mtp").wanted_inputs == {"confidence_scores"}


def test_a_component_switched_on_later_has_its_inputs(rng):
    balance = lossmith.Weighted(lossmith.MoEBalance(num_experts=4, top_k=2), 0.0)
    criterion = lossmith.ComposedLoss(lossmith.CrossEntropyLoss(), {"balance": balance})
    given = (torch.randn(2, 3, V, generator=rng), torch.zeros(2, 3).long())
    gates = torch.randn(2, 3, 4, generator=rng)
    assert set(criterion.evaluate(*given, gate_logits=gates).parts) == {"cross_entropy"}
    balance.weight = 0.5
    output = criterion.evaluate(*given, gate_logits=gates)
    assert output.parts["balance"] > 0
    with pytest.raises(ValueError, match="needs gate_logits"):
        criterion.evaluate(*given)


def test_how_tokens_are_averaged_now():
    modifier = lossmith.MaskRatioWeightModifier({})
    pipeline = lossmith.LossModifierPipeline([modifier])
    assert pipeline.resolved_reduction == "sequence_mean"
    with pipeline.temporarily_disabled():
        assert pipeline.resolved_reduction == "mean"
    modifier.enabled = False
    assert pipeline.resolved_reduction == "mean"
    around = lossmith.ComposedLoss(lossmith.CrossEntropyLoss(reduction="sum"))
    assert around.resolved_reduction == "sum"
