"""What is compiled before a capture leaves everything as it was."""

import torch

import lossmith


def test_a_warm_up_is_a_step_of_a_copy(rng):
    criterion = lossmith.UnifiedLoss(11, use_ngram_penalty=True, adaptive_temperature=True)
    logits = torch.randn(2, 6, 11, generator=rng, requires_grad=True)
    targets, given = (
        torch.randint(11, (2, 6), generator=rng),
        {"input_ids": torch.zeros(2, 6, dtype=torch.long)},
    )
    state = {name: value.clone() for name, value in criterion.state_dict().items()}
    calls = []
    criterion.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    lossmith.warm_up(criterion, logits, targets, **given)
    assert calls == [1]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert logits.grad is None
    assert criterion.get_loss_statistics()["num_batches"] == 0
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_warm_up_goes_back_even_where_gradients_are_off():
    backward = []

    def loss(logits, targets):
        logits.register_hook(lambda _: backward.append(1))
        return lossmith.cross_entropy(logits, targets)

    with torch.no_grad():
        lossmith.warm_up(loss, torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1]))
    assert backward == [1]


def test_without_gradients_it_only_goes_forward():
    lossmith.warm_up(lossmith.cross_entropy, torch.zeros(2, 3), torch.tensor([0, 1]))
