"""Constructors written for the losses of docs/migration.md run here, with only the import changed."""

import contextlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from documented_case import EOS, FULL, PAD, READS, SMALL, TEXT, WIDTH, check_parts, run, small, tensors
from documented_constructors import CONSTRUCTORS

import lossmith

ROOT = Path(__file__).parents[2]
# Blocks that set what they do not switch on, and how that is said.
SAID = {
    "temperature_bounds": "without adaptive_temperature",
    "penalty_weights": "without use_ngram_penalty; .* without use_immediate_repetition_penalty",
    "stronger_penalties": "eos_penalty_weight has no effect without eos_token_id",
    "longer_sequences": "min_sequence_length and eos_penalty_weight have no effect without eos_token_id",
    "anti_repetition_again": "min_sequence_length and eos_penalty_weight have no effect without eos_token_id",
}
ADAPTS = ["deepseek", "standard_training", "anti_repetition", "more_components"]


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_a_constructor_makes_the_parts_that_it_switches_on(name):
    expected, code = CONSTRUCTORS[name]
    has_heads = name in ("mtp", "mtp_again")
    vocab_size = SMALL if has_heads else FULL
    says = pytest.warns(UserWarning, match=SAID[name]) if name in SAID else contextlib.nullcontext()
    with says:
        loss_fn = run(small(code) if has_heads else code, vocab_size=FULL).loss_fn
    reads = READS
    if name == "fewer_future_tokens":  # it names no width: the heads are the model's
        reads = READS | {"mtp_loss": "additional_logits"}
    check_parts(loss_fn, expected, tensors(vocab_size, width=768 if has_heads else WIDTH), reads)
    is_adaptive = isinstance(loss_fn.base.temperature, lossmith.AdaptiveTemperature)
    assert is_adaptive == (name in ADAPTS)


def test_options_arrive():
    def component(name: str, part: str):
        return run(CONSTRUCTORS[name][1]).loss_fn.components[part]

    weighted = component("anti_repetition", "ngram_penalty")
    assert (weighted.weight, weighted.component.ngram_size, weighted.component.window_size) == (0.2, 4, 100)
    assert component("anti_repetition", "immediate_repetition_penalty").component.threshold == 2
    assert component("anti_repetition", "eos_penalty").component.min_length == 30
    assert component("advanced", "focal_loss").component.gamma == 2.0
    assert component("advanced", "contrastive_loss").component.temperature == 0.07
    primary = run(CONSTRUCTORS["adaptive_mtp"][1]).loss_fn.base
    assert (primary.threshold, primary.weight_range) == (0.7, (0.5, 1.5))
    assert run(CONSTRUCTORS["deepseek"][1]).loss_fn.base.label_smoothing == 0.1


# ── the old names ─────────────────────────────────────────────────────────────────────────────────

FROM_DEEPSEEK = """
# Old
from lossmith import DeepSeekLoss
loss_fn = DeepSeekLoss(vocab_size=50257, hidden_size=768)

# New
from lossmith import UnifiedLoss
loss_fn = UnifiedLoss(vocab_size=50257, hidden_size=768, primary_loss_type="deepseek")
"""

FROM_ADAPTIVE_MTP = """
# Old
from lossmith import AdaptiveMTPLoss
loss_fn = AdaptiveMTPLoss(vocab_size=50257)

# New
from lossmith import UnifiedLoss
loss_fn = UnifiedLoss(vocab_size=50257, hidden_size=768, primary_loss_type="adaptive_mtp")
"""

FROM_ANTI_REPETITION = """
# Old
from lossmith import AntiRepetitionLoss
loss_fn = AntiRepetitionLoss(vocab_size, eos_token_id, pad_token_id)

# New
from lossmith import UnifiedLoss
loss_fn = UnifiedLoss(
    vocab_size=vocab_size,
    use_ngram_penalty=True,
    use_immediate_repetition_penalty=True,
    eos_token_id=eos_token_id,
    pad_token_id=pad_token_id
)
"""


@pytest.mark.parametrize(
    ("code", "parts", "total"),
    [
        (small(FROM_DEEPSEEK), [], "total_loss"),
        (small(FROM_ADAPTIVE_MTP), ["confidence_loss"], "loss"),
        (FROM_ANTI_REPETITION, ["ngram_penalty", "immediate_repetition_penalty", "eos_penalty"], 0),
    ],
    ids=["deepseek", "adaptive_mtp", "anti_repetition"],
)
def test_the_old_name_and_the_new_are_one_loss(code, parts, total):
    before, after = code.split("# New\n")
    names = {"vocab_size": SMALL, "eos_token_id": EOS, "pad_token_id": PAD}
    with pytest.warns(DeprecationWarning, match="is UnifiedLoss"):
        old = run(before, **names).loss_fn
    new = run(after, **names).loss_fn
    given = tensors(SMALL)
    check_parts(new, parts, given)
    answers = [loss_fn(given["logits"], torch.tensor([TEXT])) for loss_fn in (old, new)]
    assert torch.equal(answers[0][total], answers[1])  # the old ones answer with a dict or a pair
    with pytest.warns(DeprecationWarning, match="is UnifiedLoss"):
        assert type(run(code, **names).loss_fn) is lossmith.UnifiedLoss


# ── the page ──────────────────────────────────────────────────────────────────────────────────────


def rows(section: str) -> list[list[str]]:
    """The cells of a section's table on the page of UnifiedLoss."""
    page = (ROOT / "docs" / "unified.md").read_text()
    text = re.search(rf"^## {section}\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)[1]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| `.*$", text, re.M)]


def test_the_page_lists_every_argument_with_its_default():
    parameters = inspect.signature(lossmith.UnifiedLoss).parameters
    documented = {name.strip("`"): default for name, default, _ in rows("Arguments of the constructor")}
    assert set(documented) == set(parameters)
    for name, default in documented.items():
        expected = parameters[name].default
        shown = "" if expected is inspect.Parameter.empty else f"`{expected!r}`".replace("'", '"')
        assert default == shown, name
    forward = list(inspect.signature(lossmith.UnifiedLoss.forward).parameters)[1:-1]
    documented = [name.strip("`") for name, *_ in rows("Arguments of the forward")]
    assert documented == [*forward, "segment_ids", "token_weight"]
