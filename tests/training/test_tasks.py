"""The model, its loss, and the measures, each against a naive computation."""

import io
import math

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("transformers")

from transformers import TrainerCallback

from lossmith.training.config import load_config
from lossmith.training.corpus import load_corpus
from lossmith.training.data import IGNORED, train_tokenizer
from lossmith.training.keys import TrainConfig
from lossmith.training.model import make_language_model
from lossmith.training.runner import quiet_libraries, show_first_loss
from lossmith.training.tasks import LanguageModel
from lossmith.training.trainer import TaskTrainer, training_arguments


def make_task(config: TrainConfig) -> LanguageModel:
    corpus = load_corpus(config.dataset)
    return LanguageModel(config, corpus, train_tokenizer(corpus, config.vocab_size), num_blocks=1000)


def test_a_fresh_model_is_close_to_a_uniform_guess(tiny: list[str]):
    config = load_config([*tiny, "--n_embd=128", "--n_layer=4"])
    task = make_task(config)
    measures = task.evaluate(task.make_model(), DataLoader(task.held_out, batch_size=4))
    assert abs(measures["loss"] - math.log(300)) < 0.1


def test_the_size_is_what_was_asked_for(tiny: list[str]):
    config = load_config([*tiny, "--n_embd=48", "--n_layer=3", "--dropout=0.25"])
    model = make_language_model(config, end_of_text=0)
    assert len(model.model.layers) == 3
    assert model.lm_head.weight.shape == (300, 48)
    assert model.model.layers[0].self_attn.attention_dropout == 0.25


def test_the_measures_are_those_of_the_text(tiny: list[str]):
    config = load_config([*tiny, "--block_size=300", "--label_smoothing=0.3", "--temperature=2"])
    task = make_task(config)
    model = task.make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # far from uniform, so that weighing batches would show
    text = "".join(load_corpus(config.dataset).held_out)

    # naive: one window after another, plain cross-entropy in double precision
    nll, count = 0.0, 0
    for window in (task.held_out[i] for i in range(len(task.held_out))):  # pyright: ignore[reportArgumentType]
        n = int((window["labels"] != IGNORED).sum())
        logits = model(input_ids=window["input_ids"][None, : n + 1]).logits[0].double()
        nll += cross_entropy(logits[:-1], window["input_ids"][1 : n + 1], reduction="sum").item()
        count += n

    measures = task.evaluate(model, DataLoader(task.held_out, batch_size=3))
    assert measures["tokens"] == count == task.num_held_out_tokens - 1
    assert measures["loss"] == pytest.approx(nll / count, rel=1e-6)
    assert measures["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert measures["bits_per_byte"] == pytest.approx(nll / math.log(2) / len(text.encode()), rel=1e-6)


def test_the_objective_takes_its_options_from_the_keys(tiny: list[str]):
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "focal_gamma": 1.5, "confidence_penalty": 0.2}
    flags = [f"--{name}={value}" for name, value in options.items()]
    task = make_task(load_config([*tiny, *flags, "--temperature=1.5", "--smoothing_mode=exclude_target"]))
    for name, value in {**options, "temperature": 1.5, "smoothing_mode": "exclude_target"}.items():
        assert getattr(task.objective, name) == value


# ── gradients through the Trainer ─────────────────────────────────────────────────────────────────


class UnevenTargets(Dataset):
    """The task's blocks with a different number of targets in each, so that a mean of means shows."""

    def __init__(self, blocks: Dataset):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        example = self.blocks[index]
        example["labels"][: 1 + index % 11] = IGNORED
        return example


class KeepGradients(TrainerCallback):
    """A copy of the gradients just before the optimizer uses them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}


def gradients_of_one_step(tiny: list[str], batch_size: int, accumulation: int) -> dict[str, torch.Tensor]:
    split = [f"--batch_size={batch_size}", f"--gradient_accumulation_steps={accumulation}"]
    config = load_config([*tiny, *split, "--max_iters=1", "--grad_clip=0"])
    with quiet_libraries():
        task = make_task(config)
        task._training = UnevenTargets(task.train_blocks)
        torch.manual_seed(0)
        keep = KeepGradients()
        TaskTrainer(task, task.make_model(), config, training_arguments(config), [keep]).train()
    return keep.gradients


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny: list[str]):
    whole = gradients_of_one_step(tiny, 8, 1)
    halves = gradients_of_one_step(tiny, 4, 2)

    # and both are the gradients of the mean over all targets
    task = make_task(load_config(tiny))
    blocks = UnevenTargets(task.train_blocks)
    torch.manual_seed(0)
    model = task.make_model()
    ids, labels = (torch.stack([blocks[i][name] for i in range(8)]) for name in ("input_ids", "labels"))
    cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()

    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole[name], parameter.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(halves[name], parameter.grad, rtol=1e-4, atol=1e-7)


# ── what is said before training ──────────────────────────────────────────────────────────────────


def test_a_first_loss_far_from_a_uniform_guess_is_pointed_out(tiny: list[str]):
    config = load_config(tiny)
    task = make_task(config)
    model = task.make_model()
    for scale, warned in ((1, False), (500, True)):
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        console = Console(file=io.StringIO())
        show_first_loss(console, task, model, config)
        shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        assert "log 300 = 5.704" in shown
        assert ("warning" in shown) == warned
