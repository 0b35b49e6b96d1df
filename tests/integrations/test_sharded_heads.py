"""Heads that FSDP2 has sharded: gathered once a micro-batch, and all ranks leave them out, or none."""

import os
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from huggingface_models import D, V, assert_same, batch, make
from special_models import capped, does, later

import lossmith
from lossmith.integrations.huggingface import attach
from lossmith.integrations.huggingface.attachment import attached_to
from ranks import on_two_ranks

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
SPLITTABLE = {"num_key_value_heads": 2}  # a head for each rank
ROWS = (slice(0, 3), slice(3, 8))  # of the two ranks
LOSSES = {
    "one sweep": lossmith.CrossEntropyLoss,
    "two sweeps": lambda: lossmith.NVAMPLoss(alpha=0.0, beta=1.0, gamma=0.0),
}


class Gathered(TorchDispatchMode):
    """How often as many numbers as the head has were gathered."""

    times = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "c10d::_allgather_base_":  # FSDP's, into its first argument
            self.times += args[0].numel() == V * D
        return func(*args, **(kwargs or {}))


def sharded(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for part in (*model.model.layers, model.lm_head, model):
        fully_shard(part, mesh=mesh)
    return model


def trained(model, rank: int | None) -> dict:
    """Gradients of two micro-batches, a rank's or everyone's."""
    found = {"gathered": [], "logits": False}
    batches = [batch(8, seed=seed) for seed in range(2)]
    attached = attached_to(model)
    n = sum(attached.count(b["labels"], b["attention_mask"]) for b in batches)
    for everything in batches:
        inputs = {
            name: value[slice(None) if rank is None else ROWS[rank]] for name, value in everything.items()
        }
        with Gathered() as seen:
            output = model(**inputs, num_items_in_batch=n)
            (output.loss * (1 if rank is None else 2)).backward()
        found["gathered"].append(seen.times)
        found["logits"] |= output.logits is not None
    whole = {name: p.grad for name, p in model.named_parameters()}
    found["gradients"] = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in whole.items()}
    return found


def split_by_class(folder: str) -> dict:
    """A model that transformers splits over the ranks, which all have the same batch."""
    from transformers import AutoModelForCausalLM

    if torch.distributed.get_rank() == 0:
        make("llama", **SPLITTABLE).save_pretrained(folder)
    torch.distributed.barrier()
    os.environ |= {"RANK": str(torch.distributed.get_rank()), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").train()
    assert model.lm_head.weight.placements[0].is_shard(0)
    return trained(attach(model, lossmith.CrossEntropyLoss()), None)


def runs_of(rank: int, folder: str) -> dict[str, dict]:
    from torch.distributed.device_mesh import init_device_mesh

    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (2,))
    runs = {}
    for name, loss in LOSSES.items():
        model = sharded(attach(make("llama").double().train(), loss()), mesh)
        runs[f"attached first, {name}"] = trained(model, rank)
        model = attach(sharded(make("llama").double().train(), mesh), loss())
        runs[f"sharded first, {name}"] = trained(model, rank)
    # One rank asks for the logits; one has another head; the first batch shows that one does something else.
    asks = True if rank else None
    model = attach(make("llama").train(), lossmith.CrossEntropyLoss(), materialize_logits=asks)
    runs["one asks for logits"] = trained(sharded(model, mesh), rank)
    runs["one asks for logits"]["why"] = attached_to(model).fused.why_not
    model = make("llama").train()
    if rank == 0:
        model.lm_head.forward = model.lm_head.forward
    model = attach(model, lossmith.CrossEntropyLoss())
    runs["one head is unusual"] = trained(sharded(model, mesh), rank)
    runs["one head is unusual"]["why"] = attached_to(model).fused.why_not
    model = does(later if rank else capped)
    del model.factor  # FSDP2 takes no scalars
    model = attach(sharded(model, mesh), lossmith.CrossEntropyLoss())
    runs["the first batch differs"] = trained(model, rank)
    runs["the first batch differs"]["why"] = attached_to(model).fused.why_not
    runs["split by class"] = split_by_class(folder)
    return runs


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    return on_two_ranks(runs_of, folder, str(folder / "model"))


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("first", ["attached", "sharded"])
def test_a_head_by_itself_is_gathered_once_and_trained_exactly(first, loss, ranks):
    expected = trained(attach(make("llama").double().train(), LOSSES[loss]()), None)
    for rank in ranks:
        found = rank[f"{first} first, {loss}"]
        assert_same(found["gradients"], expected["gradients"], **CLOSE)
        assert found["gathered"][-1] == 1
        assert not found["logits"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "why"),
    [
        ("one asks for logits", "it was asked to"),
        ("one head is unusual", "its head has a forward of its own"),
        ("the first batch differs", "it makes something else of its logits than is known of it"),
    ],
)
def test_ranks_that_would_disagree_all_make_logits(run, why, ranks):
    for rank in ranks:
        assert rank[run]["logits"]
        assert rank[run]["why"].removeprefix("on another rank, ") == why


@pytest.mark.slow
def test_a_model_that_transformers_splits_by_class_is_trained_exactly_without_logits(ranks):
    expected = trained(attach(make("llama", **SPLITTABLE).train(), lossmith.CrossEntropyLoss()), None)
    for rank in ranks:
        found = rank["split by class"]
        assert_same(found["gradients"], expected["gradients"], rtol=1e-4, atol=1e-6)
        assert not found["logits"]


def test_what_is_read_outside_is_refused_with_the_remedy():
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id = 0  # as under ZeRO-3
    hidden, labels = torch.zeros(4, D), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"got \[0\]\. ZeRO-3 has it whole only inside the forward"):
        lossmith.linear_cross_entropy(hidden, weight, labels)
