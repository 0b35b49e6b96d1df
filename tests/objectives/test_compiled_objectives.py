"""Objectives under ``torch.compile(fullgraph=True)``: nothing that they look at breaks the graph."""

import pytest
import torch
from unified_case import D, E, V, inputs

from lossmith import NVAMPLoss, UnifiedLoss

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 7), reason="PyTorch 2.6 cannot trace an objective")
CASES = {
    "legacy": (lambda: NVAMPLoss(legacy=True), ()),
    "everything": (
        lambda: UnifiedLoss(
            V,
            D,
            adaptive_temperature=True,
            use_mtp=True,
            use_ngram_penalty=True,
            eos_token_id=2,
            use_moe_balancing=True,
            num_experts=E,
            use_diversity_loss=True,
        ),
        ("hidden_states", "gate_logits", "expert_outputs"),
    ),
    "confidence": (lambda: UnifiedLoss(V, primary_loss_type="adaptive_mtp"), ("hidden_states",)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_objective_is_the_same(name):
    torch._dynamo.reset()
    make, wanted = CASES[name]
    given = {key: value for key, value in inputs().items() if key in ("logits", "targets", *wanted)}
    criterion = make().double()
    compiled = torch.compile(lambda given: criterion(**given), fullgraph=True, backend="aot_eager")
    found = compiled(given)
    (gradient,) = torch.autograd.grad(found, given["logits"])
    if name == "confidence":  # which says in eager mode that it does not read them
        del given["hidden_states"]
    expected = criterion(**given)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, given["logits"])[0])
    torch._dynamo.reset()
