"""Language models trained without all logits at once, and with them: `materialize_logits`."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from every_mode import MODES, make_task
from gradients_case import gradients_of_one_step
from running import go, rows

from lossmith.engine.head import sizes
from lossmith.training.config.reading import load_config
from lossmith.training.errors import UserError

ALL_AT_ONCE = "--materialize_logits"
KINDS = {
    "causal": [],
    "causal unified": ["--loss=unified", "--use_mtp", "--use_ngram_penalty", "--ngram_size=1"],
    "masked": ["--objective=masked"],
    "masked nvamp": ["--objective=masked", "--loss=nvamp"],
    "masked modified": [
        "--objective=masked", "--loss=unified", "--use_focal_loss", "--loss_modifiers_enabled",
        "--entropy_modifier_enabled", "--mask_ratio_weight_enabled",
    ],
}  # fmt: skip


class LargestOf(TorchDispatchMode):
    """The number of elements of the largest tensor with a dimension of V."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes, self.elements = num_classes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for found in result if isinstance(result, tuple | list) else [result]:
            if isinstance(found, torch.Tensor) and self.num_classes in found.shape:
                self.elements = max(self.elements, found.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_same(kind: str, tiny: list[str]):
    """In two micro-batches of different numbers of targets."""
    flags = [*tiny, *KINDS[kind]]
    found, expected = (gradients_of_one_step([*flags, *more], 4, 2) for more in ([], [ALL_AT_ONCE]))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mode", ["causal", "masked"])
def test_no_tensor_has_all_logits(mode: str, tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    num_classes, budget_rows = 300, 20  # the weight has 16 rows
    monkeypatch.setitem(sizes.MEMORY_BUDGET, "cpu", budget_rows * num_classes * 4)
    for more in ([], [ALL_AT_ONCE]):
        task = make_task(load_config([*tiny, *MODES[mode], *more]))
        model = task.make_model().train()
        blocks = [task.train_blocks[i] for i in range(8)]
        batch = {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}
        model(**batch)  # looks at one position's logits
        with LargestOf(num_classes) as largest:
            output = model(**batch, denominator=task.count(batch))
            output["loss"].backward()
        all_logits = batch["labels"].numel() * num_classes
        assert largest.elements >= all_logits if more else largest.elements <= budget_rows * num_classes
        assert task.seen(output).observed[1] == task.count(batch)


def test_no_tensor_of_an_evaluation_has_all_logits(tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sizes.MEMORY_BUDGET, "cpu", 20 * 300 * 4)
    found = {}
    for more in ([], [ALL_AT_ONCE]):
        task = make_task(load_config([*tiny, *more]))
        torch.manual_seed(0)
        model = task.make_model()
        batch = {name: torch.stack([task.held_out[i][name] for i in range(4)]) for name in task.held_out[0]}
        with LargestOf(300) as largest:
            measures = task.evaluate(model, [batch])
        found[bool(more)] = measures["loss"], largest.elements
    assert found[False][1] <= 20 * 300 < batch["labels"].numel() * 300 <= found[True][1]
    assert found[False][0] == pytest.approx(found[True][0], rel=1e-5)


def test_evaluation_and_samples_of_a_masked_model_have_logits(tiny: list[str]):
    task = make_task(load_config([*tiny, *MODES["masked"]]))
    model = task.make_model().train()
    batch = {name: value[None] for name, value in task.train_blocks[0].items()}
    in_training = model(**batch)["loss"]
    assert model(input_ids=batch["input_ids"]).logits.shape == (1, 16, 300)
    assert task.sample(model) is not None
    torch.testing.assert_close(model.eval()(**batch)["loss"], in_training)


def test_a_run_may_change_its_mind(tiny: list[str], tmp_path: Path):
    out = tmp_path / "run"
    go(tiny)
    shutil.rmtree(out / "checkpoint-6")
    expected = rows(out)
    assert go([f"--out_dir={out}", "--resume", ALL_AT_ONCE])[0] == 0
    found = [row["loss"] for row in rows(out) if "loss" in row]
    assert found == pytest.approx([row["loss"] for row in expected if "loss" in row], rel=1e-5)


@pytest.mark.parametrize("mode", ["token_classifier", "sequence_scorer"])
def test_where_there_are_few_logits_there_is_no_choice(mode: str):
    with pytest.raises(
        UserError, match=f"is about a language model; mode={mode} .* Leave materialize_logits"
    ):
        load_config([f"--mode={mode}", ALL_AT_ONCE])
