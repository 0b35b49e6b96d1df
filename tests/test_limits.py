"""What the losses refuse, and what must not matter to them."""

import pytest
import torch

import lossmith
from cross_entropy_case import V, batch, weights

pytestmark = pytest.mark.usefixtures("arithmetic")


def test_the_upstream_path_cannot_be_differentiated_twice_either():
    logits, targets = batch()
    logits.requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        scale * lossmith.cross_entropy(logits, targets), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(gradient.square().sum(), scale)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own
def test_forward_mode_raises_instead_of_giving_zero():
    logits, targets = batch()
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(
            lambda z: lossmith.cross_entropy(z, targets), (logits.detach(),), (torch.ones_like(logits),)
        )


def test_weights_of_tokens_that_do_not_count_are_not_looked_at():
    logits = torch.randn(4, 5)
    targets = torch.tensor([1, -100, 2, 3])
    mask = torch.tensor([1, 1, 0, 1])
    weight = torch.tensor([1.0, float("nan"), float("inf"), 2.0])
    ours = lossmith.cross_entropy(logits, targets, mask=mask, token_weight=weight)
    finite = lossmith.cross_entropy(logits, targets, mask=mask, token_weight=weight.nan_to_num(0, 0))
    assert torch.equal(ours, finite)


def test_class_weights_of_another_dtype_do_not_change_the_losses():
    logits, targets = batch()
    fp64 = lossmith.cross_entropy(logits, targets, class_weight=weights(V).double(), z_loss=0.1)
    assert fp64.dtype == torch.float32
    assert torch.equal(
        fp64, lossmith.cross_entropy(logits, targets, class_weight=weights(V).float(), z_loss=0.1)
    )


def test_an_impossible_target_of_weight_zero_costs_nothing():
    logits = torch.tensor([[0.0, float("-inf"), 1.0], [0.0, 1.0, 2.0]], requires_grad=True)
    weight = torch.tensor([1.0, 0.0, 1.0])
    loss = lossmith.cross_entropy(logits, torch.tensor([1, 2]), class_weight=weight)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[1:], torch.tensor([2])))
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_statistics_of_logits_that_have_changed_are_refused():
    logits, targets = batch()
    logits = logits.detach().clone()
    _, stats = lossmith.cross_entropy(logits, targets, return_stats=True)
    logits.zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        _ = stats.entropy


def test_a_temperature_is_one_number():
    logits, targets = batch()
    with pytest.raises(ValueError, match="one number"):
        lossmith.token_stats(logits, targets, temperature=torch.ones(targets.shape))
