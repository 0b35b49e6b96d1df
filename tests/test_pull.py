"""``LossOutput.pull``: the norm of each part's gradient and its cosine with the whole, against autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lossmith

TARGETS = torch.tensor([[1, 4, -100, 2], [0, 0, 3, -100]])


def naive_parts(logits: Tensor) -> dict[str, Tensor]:
    z, y = logits.reshape(-1, logits.shape[-1]), TARGETS.flatten()
    square = z.logsumexp(-1)[y != -100].square().mean()
    return {"cross_entropy": F.cross_entropy(z, y), "z_loss": 0.3 * square}


def naive_pull(parts: dict[str, Tensor], leaf: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    gradients = {
        name: torch.autograd.grad(part, leaf, retain_graph=True)[0].flatten() for name, part in parts.items()
    }
    whole = torch.stack(list(gradients.values())).sum(0)
    return {name: (g.norm(), F.cosine_similarity(g, whole, 0)) for name, g in gradients.items()}


def assert_same(
    pulls: dict[str, lossmith.Pull], naive: dict[str, tuple[Tensor, Tensor]], tolerance: float
) -> None:
    assert list(pulls) == list(naive)
    for name, (norm, cosine) in naive.items():
        torch.testing.assert_close(pulls[name].norm, norm.to(pulls[name].norm), rtol=tolerance, atol=0)
        torch.testing.assert_close(pulls[name].cosine, cosine.to(pulls[name].cosine), rtol=tolerance, atol=0)


def random_like(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_the_pull_on_logits_is_that_of_naive_autograd(dtype: torch.dtype, tolerance: float):
    logits = random_like(2, 4, 5, dtype=dtype)
    pulls = lossmith.CrossEntropyLoss(z_loss=0.3).evaluate(logits, TARGETS).pull(logits)
    exact = logits.detach().double().requires_grad_()
    assert_same(pulls, naive_pull(naive_parts(exact), exact), tolerance)
    assert not any(value.requires_grad for pull in pulls.values() for value in pull)


@pytest.mark.parametrize("strategy", ["auto", "two_sweep"])
def test_the_pull_on_the_hidden_states_of_a_head(strategy: str):
    """Also where one sweep makes the loss and its gradient together."""
    hidden, weight = random_like(2, 4, 3), random_like(5, 3)
    head = {"hidden_states": hidden, "lm_head_weight": weight, "strategy": strategy}
    output = lossmith.CrossEntropyLoss(z_loss=0.3).evaluate(targets=TARGETS, **head)
    assert_same(output.pull(hidden), naive_pull(naive_parts(hidden @ weight.T), hidden), 1e-6)


def test_parts_of_other_tensors_pull_at_them_and_not_at_the_logits():
    logits, other = random_like(2, 4, 5), random_like(1)
    output = lossmith.CrossEntropyLoss().evaluate(logits, TARGETS, scalars={"other": other.square().sum()})
    pulls = output.pull(logits)
    assert (pulls["other"].norm, pulls["other"].cosine) == (0, 0)
    torch.testing.assert_close(pulls["cross_entropy"].cosine, torch.ones_like(pulls["other"].cosine).double())
    both = output.pull(logits, other)
    torch.testing.assert_close(both["other"].norm, 2 * other.abs().squeeze().detach())
    assert 0 < both["other"].cosine < 1


def test_a_pull_goes_through_the_loss_alone_and_leaves_the_way_back_as_it_was():
    passes = []
    weight = random_like(3, 5)
    logits = random_like(2, 4, 3).detach() @ weight
    weight.register_hook(passes.append)
    output = lossmith.CrossEntropyLoss(z_loss=0.3).evaluate(logits, TARGETS)
    output.pull(logits)
    assert not passes
    output.total.backward()
    assert len(passes) == 1
    again = weight.grad
    weight.grad = None
    lossmith.CrossEntropyLoss(z_loss=0.3).evaluate(
        random_like(2, 4, 3).detach() @ weight, TARGETS
    ).total.backward()
    torch.testing.assert_close(again, weight.grad)


def test_what_has_no_pull_is_refused():
    logits = random_like(2, 4, 5)
    each = lossmith.CrossEntropyLoss(reduction="none").evaluate(logits, TARGETS)
    with pytest.raises(ValueError, match="a loss per token"):
        each.pull(logits)
    with pytest.raises(ValueError, match="got no tensor"):
        lossmith.CrossEntropyLoss().evaluate(logits, TARGETS).pull()
