"""NVAMPLoss(legacy=True) against the value of the published package, called as the package was called."""

import pytest
import torch
from torch.nn import functional

from lossmith import CrossEntropyLoss, LossModifierPipeline, NVAMPLoss, linear_token_stats

IGNORE, V = -100, 7


def published(logits, labels, alpha=1.0, beta=0.02, gamma=0.001, eps=1e-6, num_items_in_batch=None):
    """It takes unshifted labels and shifts them; ignored positions are tokens whose loss is 0."""
    ell = functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]),
        labels[:, 1:].reshape(-1),
        ignore_index=IGNORE,
        reduction="none",
    )
    ce = ell.sum() / (len(ell) if num_items_in_batch is None else num_items_in_batch)
    deviation = (ell - ell.mean()).abs() / (ell.var(unbiased=False) + eps).sqrt()
    return alpha * deviation.mean().detach() * ce + beta * ce + gamma * ell.max()


def batch(seed=0, ignored=0.0, shape=(3, 6)):
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*shape, V, generator=rng, dtype=torch.float64)
    labels = torch.randint(V, shape, generator=rng)
    labels[torch.rand(shape, generator=rng) < ignored] = IGNORE
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_items_in_batch", [None, 40])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.5, "beta": 2.0, "gamma": 0.7}, {"eps": 0.5}], ids=str)
def test_it_is_the_published_value_with_the_gradient_of_its_formula(options, num_items_in_batch, ignored):
    logits, labels = batch(ignored=ignored)
    more = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
    loss = NVAMPLoss(legacy=True, **options)(logits, labels, **more)
    expected = published(logits, labels, **options, **more)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_it_takes_its_arguments_by_the_names_of_the_package():
    logits, labels = batch(ignored=0.3)
    criterion = NVAMPLoss(1.0, 0.02, 0.001, 1e-6, IGNORE, legacy=True)
    torch.testing.assert_close(criterion(logits=logits, labels=labels), published(logits, labels))
    torch.testing.assert_close(criterion.evaluate(logits, labels=labels).total, published(logits, labels))
    with pytest.raises(TypeError, match="labels is another name of targets; pass one of them"):
        criterion(logits, labels, labels=labels)


def test_without_legacy_labels_name_the_right_call():
    logits, labels = batch()
    message = r"labels.*pass targets=labels to NVAMPLoss\(shift=True\).*NVAMPLoss\(legacy=True\)"
    with pytest.raises(TypeError, match=message):
        NVAMPLoss()(logits=logits, labels=labels)
    with pytest.raises(TypeError, match=r"'labels'.*Did you mean 'targets'"):
        LossModifierPipeline(base=NVAMPLoss())(logits=logits, labels=labels)


def test_it_shifts_unless_it_is_told_not_to():
    logits, labels = batch()
    assert NVAMPLoss(legacy=True).shift is True
    assert NVAMPLoss().shift is None  # which is False outside of an integration
    aligned = NVAMPLoss(legacy=True, shift=False)(logits[:, :-1], labels[:, 1:])
    torch.testing.assert_close(aligned, published(logits, labels))
    assert NVAMPLoss(legacy=True).count(labels) == 15


def test_a_mask_ignores_as_ignore_index_does():
    logits, labels = batch()
    mask = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    expected = published(logits, labels.masked_fill(~mask, IGNORE))
    torch.testing.assert_close(NVAMPLoss(legacy=True)(logits, labels, mask=mask), expected)


def test_of_a_head_and_in_a_pipeline():
    logits, labels = batch(ignored=0.3)
    hidden = torch.randn(3, 6, 4, dtype=torch.float64)
    weight = torch.randn(V, 4, dtype=torch.float64)
    expected = published(hidden @ weight.t(), labels)
    head = {"hidden_states": hidden, "lm_head_weight": weight}
    torch.testing.assert_close(NVAMPLoss(legacy=True)(targets=labels, **head), expected)
    assert linear_token_stats(hidden, weight, labels).nll.shape == labels.shape
    pipeline = LossModifierPipeline(base=NVAMPLoss(legacy=True))
    torch.testing.assert_close(pipeline(logits, labels), published(logits, labels))


def test_the_sum_is_of_the_tokens():
    logits, labels = batch(ignored=0.3)
    parts = NVAMPLoss(0.0, 1.0, 0.0, legacy=True, reduction="sum").evaluate(logits, labels).parts
    expected = CrossEntropyLoss(reduction="sum", shift=True)(logits, labels)
    torch.testing.assert_close(parts["cross_entropy"], expected)
