"""What the Trainer logs beside the loss: the plain nll; in evaluation perplexity, accuracy and the parts."""

import math
import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from huggingface_models import V, make
from huggingface_trainers import arguments, mtp, rows, split
from torch import Tensor

import lossmith
from lossmith.integrations.huggingface import LossTrainer
from ranks import on_two_ranks


def plain(model: torch.nn.Module, data: list[dict]) -> tuple[float, float]:
    """Mean nll and accuracy over the targets of all rows, without lossmith."""
    nll, right, num = 0.0, 0, 0
    for row in data:
        ids, labels = row["input_ids"][None], row["labels"].clone()
        if "attention_mask" in row:
            labels[row["attention_mask"] == 0] = -100
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=row["attention_mask"][None]).logits[0, :-1].double()
        kept = labels[1:] != -100
        z, y = logits[kept], labels[1:][kept]
        nll += torch.nn.functional.cross_entropy(z, y, reduction="sum").item()
        right, num = right + int((z.argmax(-1) == y).sum()), num + len(y)
    return nll / num, right / num


def trainer_of(folder, loss: lossmith.Objective, **options) -> LossTrainer:
    args = arguments(folder, per_device_eval_batch_size=3, logging_steps=1, **split(4), **options)
    return LossTrainer(loss=loss, model=make("llama"), args=args, train_dataset=rows(), eval_dataset=rows())


@pytest.mark.parametrize("metrics", [False, True])
def test_an_evaluation_says_what_the_model_knows(metrics: bool, tmp_path):
    smooth = lossmith.CrossEntropyLoss(label_smoothing=0.2, temperature=1.5, z_loss=0.1)
    trainer = trainer_of(tmp_path, smooth)
    if metrics:  # then the logits are there
        trainer.compute_metrics = lambda found: {"shape": found.predictions.shape[-1]}
    found = trainer.evaluate()
    nll, accuracy = plain(make("llama"), rows())
    assert found["eval_nll"] == pytest.approx(nll, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx(accuracy)
    parts = {name: value for name, value in found.items() if name.startswith("eval_loss/")}
    assert {*parts} == {"eval_loss/cross_entropy", "eval_loss/z_loss"}
    assert sum(parts.values()) == pytest.approx(found["eval_loss"], rel=1e-5)
    assert found.items() <= trainer.state.log_history[-1].items()
    assert found.get("eval_shape") == (V if metrics else None)


def test_training_logs_the_nll_beside_the_loss(tmp_path):
    trainer = trainer_of(tmp_path, lossmith.CrossEntropyLoss(label_smoothing=0.2), max_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["nll"] == pytest.approx(plain(make("llama"), rows())[0], rel=1e-5)
    assert row["nll"] != pytest.approx(row["loss"], rel=1e-3)
    assert "eval_loss/cross_entropy" not in trainer.evaluate()  # a single part is the loss


def test_measuring_does_not_change_the_training(tmp_path):
    found: list[list[Tensor]] = []
    for observes in (True, False):
        trainer = trainer_of(tmp_path, mtp(), max_steps=2)
        if not observes:
            trainer._attached.observe = None
        trainer.train()
        found.append([parameter.detach() for parameter in trainer.model.parameters()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


def test_rows_without_labels_have_no_measures(tmp_path):
    trainer = trainer_of(tmp_path, lossmith.CrossEntropyLoss())
    some = [{name: value for name, value in row.items() if name != "labels"} for row in rows()]
    assert "test_nll" not in trainer.predict(some).metrics


def on_rank(rank: int, folder: str) -> dict[str, float]:
    """What an evaluation by two processes finds, and the nll of a step of theirs."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    loss = lossmith.CrossEntropyLoss(label_smoothing=0.2, z_loss=0.1)
    args = arguments(folder, per_device_eval_batch_size=2, logging_steps=1, per_device_train_batch_size=4)
    trainer = LossTrainer(
        loss=loss, model=make("llama"), args=args, train_dataset=rows(), eval_dataset=rows()
    )
    found = trainer.evaluate()
    trainer.train()
    return {**found, "nll": next(row["nll"] for row in trainer.state.log_history if "nll" in row)}


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(tmp_path):
    nll, accuracy = plain(make("llama"), rows())
    for found in on_two_ranks(on_rank, tmp_path, str(tmp_path)):
        assert found["eval_nll"] == pytest.approx(nll, rel=1e-5)
        assert found["eval_accuracy"] == pytest.approx(accuracy)
        assert found["nll"] == pytest.approx(nll, rel=1e-5)
