"""What a seed decides: the weights, the order of the data, the heads of a loss, the sample."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from every_mode import MODES, make_task
from running import go, rows, weights

from lossmith.training.config.reading import load_config
from slow_but import slow_but

FIRST = ["--max_iters=1", "--warmup_iters=1"]  # whose learning rate is 0, so the weights are the first


@pytest.mark.parametrize("mode", slow_but(["causal"], MODES))
def test_another_seed_is_another_run(mode: str, tiny: list[str], tmp_path: Path):
    found = []
    for seed in (1, 1, 2):
        out = tmp_path / str(len(found))
        go([*tiny, *MODES[mode], *FIRST, f"--seed={seed}", f"--out_dir={out}"])
        found.append((weights(out / "checkpoint-1"), rows(out)[0]["loss"]))
    (first, loss), (same, same_loss), (other, other_loss) = found
    assert loss == same_loss != other_loss
    assert all(torch.equal(same[name], value) for name, value in first.items())
    drawn = [name for name, value in first.items() if value.dim() > 1]
    assert drawn
    assert not any(torch.equal(other[name], first[name]) for name in drawn)


@pytest.mark.parametrize("mode", MODES)
def test_the_blocks_are_the_seeds(mode: str, tiny: list[str]):
    first, same, other = (
        make_task(load_config([*tiny, *MODES[mode], f"--seed={seed}"])).train_blocks for seed in (1, 1, 2)
    )
    ids = [[blocks[i]["input_ids"] for i in range(20)] for blocks in (first, same, other)]
    assert all(map(torch.equal, ids[0], ids[1]))
    assert not any(map(torch.equal, ids[0], ids[2]))


def test_the_heads_of_a_loss_are_the_seeds(tiny: list[str]):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(states))  # which decides nothing
        task = make_task(load_config([*tiny, "--loss=unified", "--use_mtp", f"--seed={seed}"]))
        states.append(torch.cat([value.flatten().double() for value in task.pipeline.state_dict().values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


# ── the sample ────────────────────────────────────────────────────────────────────────────────────


def test_a_sample_is_the_seeds(tiny: list[str]):
    samples = []
    for seed in (1, 1, 2):
        task = make_task(load_config([*tiny, "--sample_tokens=15", f"--seed={seed}"]))
        torch.manual_seed(0)  # the same model
        model = task.make_model()
        torch.manual_seed(len(samples))  # which decides nothing
        samples.append(task.sample(model).plain)  # pyright: ignore
        assert torch.initial_seed() == len(samples) - 1
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize(("asked", "length"), [(1, 1), (7, 7), (15, 15), (400, 15)])
def test_a_sample_is_as_long_as_was_asked_for(
    asked: int, length: int, tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Beyond a block, less the end of text that it begins with, a model was never trained."""
    task = make_task(load_config([*tiny, f"--sample_tokens={asked}"]))
    model = task.make_model()
    made = []
    generate = model.generate

    def kept(*args: object, **options: object) -> torch.Tensor:
        tokens = generate(*args, **{**options, "suppress_tokens": [0, 1, 2]})  # which would end it early
        made.append(tokens)
        return tokens

    monkeypatch.setattr(model, "generate", kept)
    assert task.sample(model) is not None
    assert made[0].shape == (1, 1 + length)


@pytest.mark.parametrize(("asked", "length"), [(1, 1), (5, 5), (100, 16)])
@pytest.mark.parametrize("mode", ["masked", "classifier"])
def test_a_sample_of_a_block_is_as_long_as_was_asked_for(
    mode: str, asked: int, length: int, tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    task = make_task(load_config([*tiny, *MODES[mode], f"--sample_tokens={asked}"]))
    shown = []
    module = sys.modules[type(task).__module__]
    monkeypatch.setattr(module, "marked_text", lambda tokenizer, tokens, *_: shown.append(tokens))
    task.sample(task.make_model())
    assert [len(tokens) for tokens in shown] == [length]


def test_a_run_shows_its_sample(tiny: list[str]):
    assert "sample" in go([*tiny, "--max_iters=1", "--warmup_iters=0"])[1]
    assert "─ sample ─" not in go([*tiny, "--max_iters=1", "--warmup_iters=0", "--sample_tokens=0"])[1]
