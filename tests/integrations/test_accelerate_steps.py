"""accelerate divides by its accumulation steps, and the page on normalisation says what to do."""

import pytest
import torch
from accelerate import Accelerator

import lossmith


@pytest.mark.parametrize("steps", [1, 2])
def test_micro_batches_under_accelerate_are_the_batch(steps, rng):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    plain = torch.nn.Linear(8, 13)
    model = accelerator.prepare(plain)
    x, y = torch.randn(6, 8, generator=rng), torch.randint(13, (6,), generator=rng)
    y[:2] = -100  # the micro-batches have 1 and 3 supervised tokens
    expected = torch.autograd.grad(lossmith.cross_entropy(plain(x), y), plain.weight)
    criterion, num_tokens = lossmith.CrossEntropyLoss(), (y != -100).sum()
    parts = [slice(0, 6)] if steps == 1 else [slice(0, 3), slice(3, 6)]
    for part in parts:
        with accelerator.accumulate(model):
            loss = criterion(model(x[part]), y[part], denominator=num_tokens)
            accelerator.backward(loss * steps)
    torch.testing.assert_close(plain.weight.grad, expected[0])
