"""Two processes train as one does: in DistributedDataParallel, FSDP2 and the Trainer."""

import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from huggingface_models import D, V, assert_same, batch, gradients, make
from huggingface_trainers import arguments, rows

import lossmith
from lossmith.integrations.huggingface import LossTrainer, attach
from lossmith.integrations.huggingface.attachment import attached_to
from ranks import on_two_ranks

ROWS = (slice(0, 3), slice(3, 8))  # of the two ranks
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
NUM_STEPS = 3


class Counter(lossmith.Component):
    """Counts this rank's tokens, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def scalar(self, inputs, output) -> None:
        self.seen += output.num_tokens


def loss() -> lossmith.UnifiedLoss:
    """With heads, one of which gives way to the model's unembedding, and a temperature that moves."""
    torch.manual_seed(1)
    made = lossmith.UnifiedLoss(
        V,
        D,
        use_mtp=True,
        shared_projection=True,
        use_ngram_penalty=True,
        ngram_size=2,
        adaptive_temperature=True,
    )
    made.components["counter"] = lossmith.Weighted(Counter())
    made.base.temperature.history = torch.zeros(2)
    return made


def train_by_hand(wrap, rows: slice, num_ranks: int) -> dict:
    """Some steps, each with a denominator over everyone's tokens; gradients are averaged over ranks."""
    criterion = loss()
    model = attach(make("llama"), criterion)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(NUM_STEPS):
        everything = batch(8, seed=seed)
        inputs = {name: value[rows] for name, value in everything.items()}
        n = attached_to(model).count(everything["labels"], everything["attention_mask"])
        (num_ranks * wrapped(**inputs, num_items_in_batch=n).loss).backward()
        found = gradients_of(model)
        optimizer.step()
        optimizer.zero_grad()
    buffers = {name: buffer.clone() for name, buffer in criterion.named_buffers()}
    return {"gradients": found, "buffers": buffers, "keys": list(wrapped.state_dict())}


def gradients_of(model) -> dict:
    return {n: whole(g) for n, g in gradients(model).items()}


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def train_with_trainer(folder: str, rows_each: int, micro_batches: int) -> dict:
    args = arguments(
        folder,
        max_steps=NUM_STEPS,
        logging_steps=NUM_STEPS,
        save_strategy="steps",
        save_steps=NUM_STEPS,
        learning_rate=0.1,
        per_device_train_batch_size=rows_each,
        gradient_accumulation_steps=micro_batches,
    )
    trainer = LossTrainer(loss=loss(), model=make("llama"), args=args, train_dataset=rows(24))
    trainer.train()
    log = next(line for line in trainer.state.log_history if "loss" in line)
    return {
        "state": {n: p.detach().clone() for n, p in trainer.model.named_parameters()},
        "buffers": {n: b.clone() for n, b in trainer.loss.named_buffers()},
        "log": {name: value for name, value in log.items() if "loss" in name},
        "world": trainer.args.world_size,
    }


def save_and_load(shard, folder: str) -> dict:
    """The state of a loss whose parameters are sharded, as the Trainer saves it and restores it."""
    trainer = LossTrainer(loss=loss(), model=make("llama"), args=arguments(folder))
    shard(trainer.loss)
    trainer.save_model(folder)
    torch.distributed.barrier()
    with torch.no_grad():
        for parameter in trainer.loss.parameters():
            parameter.zero_()
    trainer.load_loss(folder)
    return {
        "saved": torch.load(f"{folder}/lossmith_loss.pt", weights_only=True),
        "loaded": {name: whole(value).clone() for name, value in trainer.loss.state_dict().items()},
        "is_sharded": any(hasattr(value, "full_tensor") for value in trainer.loss.state_dict().values()),
    }


def runs_of(rank: int, out: str) -> dict[str, dict]:
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    # accelerate wants an address, though the ranks have met already
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_device_mesh("cpu", (2,))

    def shard(model):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return {
        "ddp": train_by_hand(DistributedDataParallel, ROWS[rank], 2),
        "fsdp": train_by_hand(shard, ROWS[rank], 2),
        "trainer": train_with_trainer(f"{out}/trainer", 2, 2),
        "state": save_and_load(lambda made: fully_shard(made, mesh=mesh), f"{out}/state"),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    return on_two_ranks(runs_of, out, str(out))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_have_the_gradients_of_one_process(how, ranks):
    expected = train_by_hand(lambda model: model, slice(0, 8), 1)
    for rank in ranks:
        found = rank[how]
        assert_same(found["gradients"], expected["gradients"], **CLOSE)
        assert any("mtp_loss" in name for name in found["gradients"])
        assert [key.removeprefix("module.") for key in found["keys"]] == expected["keys"]
    check_buffers([rank[how]["buffers"] for rank in ranks], expected["buffers"])


def test_the_trainer_on_two_ranks_makes_the_same_run(ranks, tmp_path):
    expected = train_with_trainer(str(tmp_path), 8, 1)
    for rank in ranks:
        found = rank["trainer"]
        assert (found["world"], expected["world"]) == (2, 1)
        assert_same(found["state"], expected["state"], **CLOSE)
        assert found["log"] == pytest.approx(expected["log"], rel=1e-4)
        assert "loss/mtp_loss" in found["log"]
    check_buffers([rank["trainer"]["buffers"] for rank in ranks], expected["buffers"])


def test_a_sharded_state_is_saved_whole_and_comes_back(ranks):
    expected = dict(loss().state_dict())
    for rank in ranks:
        assert rank["state"]["is_sharded"]
        assert_same(rank["state"]["saved"], expected, rtol=0, atol=0)
        assert_same(rank["state"]["loaded"], expected, rtol=0, atol=0)


def check_buffers(of_ranks: list[dict], expected: dict) -> None:
    """Each rank has counted its own tokens, and all have moved by everyone's."""
    counter = "components.counter.component.seen"
    assert sum(buffers[counter] for buffers in of_ranks) == expected[counter]
    for buffers in of_ranks:
        assert buffers["base.temperature.value"] != 1
        assert_same({**buffers, counter: expected[counter]}, expected, **CLOSE)
