"""The modes that see both ways: what they are given, and their measures against naive ones."""

import math
import re

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

pytest.importorskip("transformers")

from every_mode import CORRUPTED, MODES, make_task

from lossmith.training.config.reading import load_config
from lossmith.training.data.blocks import IGNORED, WholeBlocks
from lossmith.training.data.tokenizer import CLS, MASK, SPECIAL_TOKENS
from lossmith.training.tasks.task import Task


def task_of(mode: str, tiny: list[str], *flags: str) -> Task:
    return make_task(load_config([*tiny, *MODES[mode], *flags]))


def stacked(examples) -> dict[str, torch.Tensor]:
    examples = list(examples)
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def everything(task: Task) -> dict[str, torch.Tensor]:
    return stacked(task.held_out[i] for i in range(len(task.held_out)))  # pyright: ignore


# ── what they are given ───────────────────────────────────────────────────────────────────────────


def pairs(task: Task, num: int = 500):
    """Blocks of the training text as they were and as they are trained on."""
    for i in range(num):
        yield task.train_blocks.blocks[i]["input_ids"], task.train_blocks[i]  # pyright: ignore


@pytest.mark.parametrize("length", [2, 7, 8, 9, 15, 16, 50])
def test_whole_blocks_hold_every_token_and_need_no_padding(length: int):
    blocks = WholeBlocks(torch.arange(length), 8)
    found = [blocks[i]["input_ids"] for i in range(len(blocks))]
    assert all(len(block) == min(8, length) for block in found)
    assert sorted({int(token) for block in found for token in block}) == list(range(length))
    assert len(found) == math.ceil(length / 8)
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_masked_blocks(tiny: list[str]):
    task = task_of("masked", tiny)
    shares = []
    for block, example in pairs(task):
        masked = example["labels"] != IGNORED
        assert torch.equal(example["labels"][masked], block[masked])
        assert (example["input_ids"][masked] == task.tokenizer.mask_token_id).all()
        assert torch.equal(example["input_ids"][~masked], block[~masked])
        shares.append(float(masked.float().mean()))
    assert (min(shares), max(shares)) == (1 / 16, 1)
    assert abs(sum(shares) / len(shares) - 0.53) < 0.04  # uniform on 1/16 ... 16/16


def test_blocks_with_replaced_tokens(tiny: list[str]):
    task = task_of("classifier", tiny)
    shares = []
    for block, example in pairs(task):
        assert torch.equal(example["labels"] == 1, example["input_ids"] != block)
        replaced = example["input_ids"][example["labels"] == 1]
        assert not set(replaced.tolist()) & {task.end_of_text, task.mask, task.cls}
        shares.append(float(example["labels"].float().mean()))
    assert min(shares) == 0
    assert max(shares) == 0.5
    assert abs(sum(shares) / len(shares) - 0.25) < 0.02


def test_scored_sequences(tiny: list[str]):
    task = task_of("scorer", tiny)
    shares = []
    for block, example in pairs(task):
        assert example["input_ids"][0] == task.tokenizer.cls_token_id
        x = float((example["input_ids"][1:] != block).double().mean())
        assert float(example["labels"]) == pytest.approx(x**4 - 2 * x**3 + 2 * x, abs=1e-6)
        shares.append(x)
    assert (min(shares), max(shares)) == (0, 1)
    assert abs(sum(shares) / len(shares) - 0.5) < 0.04


@pytest.mark.parametrize("mode", CORRUPTED)
def test_the_held_out_blocks_are_the_same_in_every_run(mode: str, tiny: list[str]):
    first, second = (everything(task_of(mode, tiny, f"--seed={seed}")) for seed in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    of_training = [task_of(mode, tiny, f"--seed={seed}").train_blocks for seed in (1, 1, 2)]
    same, again, other = (stacked(blocks[i] for i in range(20)) for blocks in of_training)
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.equal(same["input_ids"], other["input_ids"])


@pytest.mark.parametrize("mode", MODES)
def test_every_tokenizer_has_the_same_special_tokens(mode: str, tiny: list[str]):
    task = task_of(mode, tiny)
    assert task.tokenizer.convert_ids_to_tokens([0, 1, 2]) == list(SPECIAL_TOKENS)
    assert (task.tokenizer.mask_token, task.tokenizer.cls_token) == (MASK, CLS)
    assert task.build_model().config.vocab_size == len(task.tokenizer) == 300


# ── measures ──────────────────────────────────────────────────────────────────────────────────────


def naive_measures(mode: str, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """The measures over all held-out examples at once, in double precision."""
    logits = logits.double()
    if mode == "scorer":
        scores, targets = logits[:, 0].sigmoid(), labels.double()
        return {
            "loss": float((scores - targets).square().mean()),
            "mean_absolute_error": float((scores - targets).abs().mean()),
            "correlation": float(torch.corrcoef(torch.stack([scores, targets]))[0, 1]),
            "sequences": len(labels),
        }
    loss = float(cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED))
    chosen = logits.argmax(-1)
    counts = labels != IGNORED
    found = {"loss": loss, "accuracy": float((chosen == labels)[counts].double().mean())}
    found["tokens"] = int(counts.sum())
    if mode == "masked":
        return {**found, "perplexity": math.exp(loss)}
    true_positives = int(((chosen == 1) & (labels == 1)).sum())
    precision = true_positives / int((chosen == 1).sum())
    recall = true_positives / int((labels == 1).sum())
    f1 = 2 * precision * recall / (precision + recall)
    return {**found, "f1": f1, "replaced": float((labels == 1).double().mean())}


@pytest.mark.parametrize("mode", CORRUPTED)
def test_the_measures(mode: str, tiny: list[str]):
    task = task_of(mode, tiny)
    torch.manual_seed(0)
    model = task.make_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # so that it has opinions
    data = everything(task)
    with torch.no_grad():
        logits = model(input_ids=data["input_ids"]).logits
    expected = naive_measures(mode, logits, data["labels"])
    for batch_size in (1, 3, 1000):
        found = task.evaluate(model, DataLoader(task.held_out, batch_size=batch_size))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # the sums of two ranks
    halves: list[list[float]] = []
    for start in (0, 1):
        share = Subset(task.held_out, range(start, len(data["labels"]), 2))
        task.evaluate(model, DataLoader(share, batch_size=3), lambda sums: halves.append(sums) or sums)
    assert task.measures([a + b for a, b in zip(*halves, strict=True)]) == pytest.approx(
        found,
        rel=1e-6,
        abs=1e-7,  # a correlation may be next to 0
    )


def test_the_correlation_of_a_constant_is_no_number(tiny: list[str]):
    task = task_of("scorer", tiny)
    model = task.make_model()
    with torch.no_grad():
        model.classifier.weight.zero_()  # pyright: ignore
    measures = task.evaluate(model, DataLoader(task.held_out, batch_size=3))
    assert math.isnan(measures["correlation"])
    assert measures["mean_absolute_error"] > 0.1


@pytest.mark.parametrize("mode", CORRUPTED)
def test_a_fresh_model_costs_what_knowing_nothing_costs(mode: str, tiny: list[str]):
    task = task_of(mode, tiny, "--n_embd=128", "--n_layer=4", "--block_size=32")
    torch.manual_seed(0)
    measures = task.evaluate(task.make_model(), DataLoader(task.held_out, batch_size=8))
    nothing = task.knowing_nothing()
    assert abs(measures["loss"] - nothing.loss) < nothing.margin


def test_knowing_nothing_of_a_score(tiny: list[str]):
    """The mean of (y(x) - .5)^2 over all numbers of replaced tokens."""
    expected = sum(((n / 16) ** 4 - 2 * (n / 16) ** 3 + 2 * n / 16 - 0.5) ** 2 for n in range(17)) / 17
    nothing = task_of("scorer", tiny).knowing_nothing()
    assert nothing.loss == pytest.approx(expected)
    assert nothing.said == f"saying 0.5 of every text costs {expected:.3f}"


def test_the_size_is_what_was_asked_for_and_three_layers_in_four_are_local(tiny: list[str]):
    task = task_of("masked", tiny, "--n_embd=48", "--n_layer=6", "--dropout=0.25")
    model = task.make_model()
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.attention_dropout) == (6, 48, 0.25)
    assert [kind[:4] for kind in config.layer_types] == ["slid", "slid", "slid", "full", "slid", "full"]
    # a local layer sees two tokens to either side
    del model.model.layers[1:]  # pyright: ignore
    hidden = torch.randn(1, 16, 48, requires_grad=True)
    model.eval().model(inputs_embeds=hidden).last_hidden_state[0, 8].sum().backward()  # pyright: ignore
    assert hidden.grad[0].abs().sum(-1).nonzero().flatten().tolist() == [6, 7, 8, 9, 10]  # pyright: ignore


# ── what is shown at the end ──────────────────────────────────────────────────────────────────────


def test_marks_of_filled_in_tokens(tiny: list[str]):
    task = task_of("masked", tiny, "--sample_tokens=10")
    shown = task.sample(task.make_model())
    assert "‹" in shown.plain  # pyright: ignore
    legend = shown.plain.splitlines()[-1].split()  # pyright: ignore
    assert legend[0::2] == ["«right»", "‹wrong›"]
    assert sum(map(int, legend[1::2])) == 3  # of ten


def test_marks_of_replaced_tokens(tiny: list[str]):
    task = task_of("classifier", tiny, "--sample_tokens=12")
    model = task.make_model()
    for bias, expected in ((9.0, "found"), (-9.0, "missed")):
        with torch.no_grad():
            model.classifier.weight.zero_()  # pyright: ignore
            model.classifier.bias.copy_(torch.tensor([0.0, bias]))  # pyright: ignore
        legend = task.sample(model).plain.splitlines()[-1]  # pyright: ignore
        numbers = [int(number) for number in re.findall(r"\d+", legend)]
        counts = dict(zip(("found", "missed", "false alarm"), numbers, strict=True))
        assert counts[expected] > 0
        assert counts["missed" if expected == "found" else "found"] == 0


@pytest.mark.parametrize("mode", CORRUPTED)
def test_no_sample_when_none_is_asked_for(mode: str, tiny: list[str]):
    task = task_of(mode, tiny, "--sample_tokens=0")
    assert task.sample(task.make_model()) is None
