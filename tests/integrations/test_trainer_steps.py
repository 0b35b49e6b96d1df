"""The Trainer tells the loss of its steps, whatever its optimizer has in the place of the parameters."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from huggingface_models import make
from huggingface_trainers import arguments, rows

import lossmith
from lossmith.integrations.huggingface import LossTrainer


class OfCopies(torch.optim.SGD):
    """Steps copies, and puts them into the parameters, as optimizers with master weights do."""

    def __init__(self, parameters, **options):
        self.originals = list(parameters)
        super().__init__([p.detach().clone() for p in self.originals], **options)

    @torch.no_grad()
    def step(self, closure=None):
        copies = self.param_groups[0]["params"]
        for copy, original in zip(copies, self.originals, strict=True):
            copy.grad = original.grad
        super().step(closure)
        for copy, original in zip(copies, self.originals, strict=True):
            original.copy_(copy)


@pytest.mark.parametrize("make_optimizer", [OfCopies, torch.optim.SGD])
def test_the_loss_steps_with_the_trainer(make_optimizer, tmp_path):
    model = make("llama")
    optimizer = make_optimizer(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = LossTrainer(
        loss=lossmith.CrossEntropyLoss(temperature=lossmith.AdaptiveTemperature()),
        model=model,
        args=arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2),
        train_dataset=rows(16),
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    assert trainer.loss.temperature.num_steps == 3


def test_a_step_that_was_left_out_is_none(tmp_path, monkeypatch):
    model = make("llama")
    optimizer = OfCopies(model.parameters(), lr=0.1)
    trainer = LossTrainer(
        loss=lossmith.CrossEntropyLoss(temperature=lossmith.AdaptiveTemperature()),
        model=model,
        args=arguments(tmp_path, max_steps=2),
        train_dataset=rows(16),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda _: True))
    trainer.train()
    assert trainer.loss.temperature.num_steps == 0
