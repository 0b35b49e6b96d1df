"""The causal language model, its loss and its measures, and the loss of every mode, against naive ones."""

import io
import math

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

pytest.importorskip("transformers")

from every_mode import MODES, make_task
from gradients_case import Uneven, gradients_of_one_step
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lossmith.training.config.reading import load_config
from lossmith.training.data.blocks import IGNORED
from lossmith.training.data.corpus import load_corpus
from lossmith.training.data.tokenizer import END_OF_TEXT
from lossmith.training.run.runner import show_first_loss
from lossmith.training.tasks.causal_language_model import CausalLanguageModel
from lossmith.training.tasks.models import make_language_model


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


@pytest.mark.parametrize("flags", [[], ["--model=moe"]], ids=["llama", "moe"])
def test_what_adds_to_the_residual_stream_is_narrower_the_deeper_the_model(flags: list[str], tiny: list[str]):
    """By 1 / sqrt(2 L), since each of L layers adds to it twice (GPT-2)."""
    config = load_config([*tiny, *flags, "--n_embd=64", "--n_layer=8"])
    torch.manual_seed(0)
    spread = {name: p.std().item() for name, p in make_language_model(config, 0).named_parameters()}
    adding = [name for name in spread if "o_proj" in name or "down_proj" in name]
    others = [name for name in spread if name not in adding and "norm" not in name]
    assert len(adding) == 16
    assert [spread[name] for name in adding] == pytest.approx([0.02 / 4] * 16, rel=0.1)
    assert [spread[name] for name in others] == pytest.approx([0.02] * len(others), rel=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_dropped_in_an_evaluation(mode: str, tiny: list[str]):
    """Whatever the model was doing before."""
    task = make_task(load_config([*tiny, *MODES[mode], "--dropout=0.5", "--n_layer=2"]))
    torch.manual_seed(0)
    model = task.make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that attention matters
    batches = DataLoader(task.held_out, batch_size=4)
    expected = task.evaluate(model.eval(), batches)
    assert task.evaluate(model.train(), batches) == expected
    model.train()
    model.eval = lambda: model  # type: ignore[method-assign]
    assert task.evaluate(model, batches) != expected  # else this would show nothing


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
        assert getattr(task.pipeline.base, name) == value


def test_generation_leaves_out_what_is_no_text(tiny: list[str]):
    """However much the model wants to say it."""
    task = make_task(load_config([*tiny, "--n_embd=32", "--sample_tokens=15"]))
    model = task.make_model()
    with torch.no_grad():
        wanted = torch.randn(32) * 100
        model.lm_head.weight[task.mask] = wanted  # pyright: ignore
        model.lm_head.weight[task.cls] = -wanted  # pyright: ignore  (one of them has the highest logit)
    start = torch.tensor([[task.end_of_text]])
    tokens = model.generate(start, max_new_tokens=15, do_sample=True, pad_token_id=0)  # pyright: ignore
    assert not {task.mask, task.cls} & set(tokens[0].tolist())
    assert model(input_ids=start).logits[0, -1].argmax() in (task.mask, task.cls)
    assert task.sample(model).plain  # pyright: ignore


def test_an_older_run_has_fewer_special_tokens(tiny: list[str]):
    """It is gone on with all the same."""
    config = load_config([*tiny, "--sample_tokens=5"])
    corpus = load_corpus(config.dataset)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus.train, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    task = CausalLanguageModel(config, corpus, tokenizer, num_blocks=3)
    model = task.make_model()
    assert task.sample(model) is not None
    assert math.isfinite(task.evaluate(model, DataLoader(task.held_out, batch_size=4))["loss"])


# ── gradients through the Trainer ─────────────────────────────────────────────────────────────────


def naive_loss(mode: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over all targets of the whole batch."""
    if mode == "scorer":
        return (logits[:, 0].sigmoid() - labels).square().mean()
    if mode == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize("mode", MODES)
def test_accumulated_gradients_are_those_of_the_whole_batch(mode: str, tiny: list[str]):
    flags = [*tiny, *MODES[mode]]
    whole, halves = gradients_of_one_step(flags, 8, 1), gradients_of_one_step(flags, 4, 2)

    # and both are the gradients of the mean over all targets
    task = make_task(load_config(flags))
    blocks = Uneven(task.train_blocks)
    torch.manual_seed(0)
    model = task.make_model()
    ids, labels = (torch.stack([blocks[i][name] for i in range(8)]) for name in ("input_ids", "labels"))
    naive_loss(mode, model(input_ids=ids).logits, labels).backward()

    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole[name], parameter.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(halves[name], parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mode", ["masked", "classifier"])
def test_weights_of_samples_are_accumulated_too(mode: str, tiny: list[str]):
    """Samples weighed by their mask ratio: the loss is divided by samples then, not by tokens."""
    ratio = ["--loss_modifiers_enabled", "--mask_ratio_weight_enabled", "--mask_ratio_weight_power=1"]
    flags = [*tiny, *MODES[mode], *ratio]
    whole, halves = gradients_of_one_step(flags, 8, 1), gradients_of_one_step(flags, 2, 4)

    task = make_task(load_config(flags))
    blocks = Uneven(task.train_blocks)
    torch.manual_seed(0)
    model = task.make_model()
    ids, labels = (torch.stack([blocks[i][name] for i in range(8)]) for name in ("input_ids", "labels"))
    logits = model(input_ids=ids).logits
    loss = torch.zeros(())
    for row in range(8):
        num = int((labels[row] != IGNORED).sum())
        weight = min(len(labels[row]) / num, 10) if num else 0
        summed = cross_entropy(logits[row], labels[row], ignore_index=IGNORED, reduction="sum")
        loss = loss + weight * summed / max(num, 1)
    (loss / int((labels != IGNORED).any(-1).sum())).backward()

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
        show_first_loss(console, task, model)
        shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        assert "log 300 = 5.704" in shown
        assert ("warning" in shown) == warned


@pytest.mark.parametrize("mode", ["causal", "masked", "classifier"])
def test_every_option_of_the_objective_is_shown_when_it_is_on(mode: str, tiny: list[str]):
    on = {"label_smoothing": 0.1, "smoothing_mode": "exclude_target", "z_loss": 1e-4, "focal_gamma": 2.0}
    flags = [f"--{name}={value}" for name, value in on.items()]
    shown = make_task(load_config([*tiny, *MODES[mode], *flags])).describe_loss()
    for name, value in on.items():
        assert f"{name} {value}" in shown
