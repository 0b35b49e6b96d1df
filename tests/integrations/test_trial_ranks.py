"""Ranks come to one conclusion about a model, whatever each of them could see of it."""

import warnings

import pytest
import torch

pytest.importorskip("transformers")

from huggingface_models import batch, make
from special_models import aligned, bart, capped, does, empty, filled, later

import lossmith
from lossmith.integrations.huggingface import attach
from lossmith.integrations.huggingface.attachment import attached_to
from ranks import on_two_ranks


def found(model, inputs) -> dict:
    attached = attached_to(model)
    output = model(**inputs)
    return {
        "loss": output.loss.detach(),
        "has_logits": output.logits is not None,
        "after": repr(attached.fused.after),
        "shift": attached.shift,
    }


def runs_of(rank: int) -> dict[str, dict]:
    warnings.simplefilter("ignore")
    plain = lossmith.CrossEntropyLoss
    runs = {}
    # One rank's model does something else.
    runs["one differs"] = found(attach(does(later if rank else capped), plain()), batch())
    # One rank will get its weights from the other.
    runs["one is empty"] = found(filled(attach(empty() if rank else make("llama"), plain())), batch())
    with torch.device("meta" if rank else "cpu"):
        model = bart()
    attach(model, plain())
    runs["one is empty, labels aligned"] = found(
        model if rank == 0 else with_weights_of(bart(), model), aligned(batch())
    )
    # Neither could be tried before, and in the first batch one does something else.
    model = does(later if rank else capped)
    model.lm_head.weight.ds_id = 0
    attach(model, plain())
    del model.lm_head.weight.ds_id
    attached_to(model).fused.why_not = None
    runs["one differs in the first batch"] = found(model, batch())
    return runs


def with_weights_of(theirs, model):
    model.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    return model.train()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return on_two_ranks(runs_of, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("run", "has_logits"),
    [
        ("one differs", True),
        ("one is empty", False),
        ("one is empty, labels aligned", False),
        ("one differs in the first batch", True),
    ],
)
def test_all_ranks_decide_alike(run, has_logits, ranks):
    for of_rank in ranks:
        assert of_rank[run]["has_logits"] is has_logits
        assert of_rank[run]["shift"] == ("aligned" not in run)
        assert of_rank[run]["after"] == ranks[0][run]["after"]
    if "empty" in run:
        torch.testing.assert_close(ranks[1][run]["loss"], ranks[0][run]["loss"])


def test_the_loss_of_each_is_its_own_models(ranks):
    for run in ("one differs", "one differs in the first batch"):
        for of_rank, what in zip(ranks, (capped, later), strict=True):
            torch.testing.assert_close(of_rank[run]["loss"], does(what)(**batch()).loss)
