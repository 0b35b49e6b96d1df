"""The loss inside the forward: the model itself sees no labels, and is otherwise as it was."""

import inspect

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from every_mode import MODES, make_task

from lossmith.training.config.reading import load_config
from lossmith.training.tasks.loss_in_forward import with_loss


class Recording(nn.Module):
    """A model that remembers what it was called with."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, input_ids=None, labels=None, **more):
        self.got = {"labels": labels, **more}
        return type("Output", (), {"logits": self.layer(input_ids)})()


def test_labels_reach_the_loss_and_not_the_model():
    model = Recording()
    keys = list(model.state_dict())
    seen = {}

    def loss(predictions, labels, inputs, num_items):
        seen.update(labels=labels, inputs=inputs, num_items=num_items)
        return {"loss": predictions["logits"].sum()}

    wrapped = with_loss(model, loss)  # type: ignore[arg-type]
    ids, labels = torch.ones(4, 2), torch.arange(4)
    output = wrapped(input_ids=ids, attention_mask=1, labels=labels, denominator=7, num_items_in_batch=8)
    assert model.got == {"labels": None, "attention_mask": 1}
    assert (seen["labels"] is labels, seen["num_items"]) == (True, 7)
    assert seen["inputs"] == {"input_ids": ids, "attention_mask": 1}
    assert torch.equal(output["loss"], model.layer(ids).sum())
    assert torch.equal(wrapped(ids).logits, model.layer(ids))
    assert list(model.state_dict()) == keys
    assert "attention_mask" not in inspect.signature(wrapped.forward).parameters  # as before


@pytest.mark.parametrize("mode", MODES)
def test_a_model_of_every_mode_saves_what_it_is(mode: str, tiny: list[str], tmp_path):
    task = make_task(load_config([*tiny, *MODES[mode]]))
    model = task.make_model()
    model.save_pretrained(tmp_path)
    again = task.load_model(tmp_path)
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    batch = {name: value[None] for name, value in task.train_blocks[0].items()}
    for each in (model, again):
        each.eval()
    # Not to the last bit: the weights lie elsewhere in memory.
    torch.testing.assert_close(model(**batch)["loss"], again(**batch)["loss"])
