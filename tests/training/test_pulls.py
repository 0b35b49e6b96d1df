"""The pull of each part, in the log and on the page, against a plain gradient of the same batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from every_mode import make_task
from running import go, rows, weights

from lossmith.report.figures import pulls
from lossmith.report.reading import read_run, thinned
from lossmith.training.config.reading import load_config
from lossmith.training.errors import UserError

PARTS = ["--loss=unified", "--use_mtp", "--z_loss=1e-3", "--eos_token_id=0", "--seed=3"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def pulls_in(out: Path) -> list[tuple[int, list[str]]]:
    """The steps of the log that have pulls, and the parts in them."""
    found = [
        (row["step"], [k.removeprefix("pull/") for k in row if k.startswith("pull/")]) for row in rows(out)
    ]
    return [(step, names) for step, names in found if names]


def test_they_stand_in_the_line_of_their_step_or_the_next(tiny: list[str], out: Path):
    go([*tiny, *PARTS, "--pull_interval=2", "--gradient_accumulation_steps=2"])
    parts = ["cross_entropy", "z_loss", "mtp_loss", "eos_penalty"]
    found = pulls_in(out)
    assert [step for step, _ in found] == [2, 4, 6]
    logged = [key.removeprefix("loss/") for key in rows(out)[0] if key.startswith("loss/")]
    assert all(names == logged for _, names in found)
    assert {*parts[:3]} <= {*logged}
    row = rows(out)[1]
    assert all(
        row[f"pull/{name}"] >= 0 and -1.0001 <= row[f"pull_cosine/{name}"] <= 1.0001 for name in logged
    )
    assert row["pull/mtp_loss"] > 0
    assert row["pull_cosine/cross_entropy"] > 0.5
    go([*tiny, *PARTS, "--pull_interval=3", "--log_interval=2"])
    assert [step for step, _ in pulls_in(out)] == [4, 6]


def test_measuring_them_changes_nothing(tiny: list[str], tmp_path: Path):
    for num in (0, 1):
        go([*tiny, *PARTS, "--dropout=0.1", f"--pull_interval={num}", f"--out_dir={tmp_path / str(num)}"])
    never, always = (weights(tmp_path / num / "checkpoint-6") for num in "01")
    assert all(torch.equal(value, always[name]) for name, value in never.items())
    assert not pulls_in(tmp_path / "0")


@pytest.mark.parametrize(
    "flags", [[], ["--materialize_logits"], ["--objective=masked"], ["--mode=token_classifier"]]
)
def test_they_are_those_of_a_plain_gradient(flags: list[str], tiny: list[str]):
    own = ["--z_loss=0.1", "--label_smoothing=0.1"]
    task = make_task(load_config([*tiny, *own, *flags]))
    model = task.make_model().train()
    some = [task.train_blocks[k] for k in range(3)]
    batch: dict[str, Any] = {name: torch.stack([each[name] for each in some]) for name in some[0]}
    task.asks_pull = True
    seen = task.seen(model(**batch, denominator=task.count(batch)))
    task.asks_pull = False
    assert task.seen(model(**batch, denominator=task.count(batch))).pulls == {}
    inputs = {"input_ids": batch["input_ids"]}
    is_logits = "--objective=masked" not in flags and bool(flags)
    with torch.no_grad():
        logits = model(**inputs).logits
    if is_logits:
        source = logits.requires_grad_()
        found = source
    else:
        head = model.get_output_embeddings()
        kept: list[torch.Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        model(**inputs)
        hook.remove()
        source = kept[0].detach().requires_grad_()
        found = torch.nn.functional.linear(source, head.weight, head.bias)
    targets = batch["labels"]
    z, y = (found[:, :-1], targets[:, 1:]) if task.shift else (found, targets)  # pyright: ignore
    z, y = z[y != -100], y[y != -100]
    smooth = torch.nn.functional.cross_entropy(z, y, label_smoothing=0.1)
    square = 0.1 * z.logsumexp(-1).square().mean()
    for name, part in {"cross_entropy": smooth, "z_loss": square}.items():
        (gradient,) = torch.autograd.grad(part, source, retain_graph=True)
        torch.testing.assert_close(seen.pulls[name].norm, gradient.norm(), rtol=1e-3, atol=1e-7)


def test_a_single_part_and_a_scorer_have_none(tiny: list[str], out: Path):
    for flags in ([], ["--mode=sequence_scorer"]):
        go([*tiny, *flags, "--pull_interval=1"])
        assert not pulls_in(out)


def test_a_compiled_model_cannot_be_asked(tiny: list[str]):
    with pytest.raises(UserError, match=r"pull_interval=5 goes back .* Leave one of them out"):
        load_config([*tiny, "--compile", "--pull_interval=5"])
    assert load_config([*tiny, "--compile"]).pull_interval == 100


def test_the_page_draws_them_over_the_steps_that_have_them(tiny: list[str], out: Path):
    go([*tiny, *PARTS, "--pull_interval=3"])
    hard, where = pulls(0, read_run(out), ["cross_entropy"])
    assert (hard["title"], where["title"]) == ("Pull", "Direction of the pull")
    assert {trace["meta"]["part"] for trace in hard["data"]} == {*pulls_in(out)[0][1]}
    assert all(trace["connectgaps"] and len(trace["y"]) == 6 for trace in hard["data"])


def test_rows_with_pulls_survive_thinning():
    steps = [
        {"step": k, "loss": 1.0 / k, **({"pull/x": 1.0} if k % 100 == 0 else {})} for k in range(1, 5001)
    ]
    few = thinned(steps, 1000)
    assert len(few) <= 1000
    assert sum("pull/x" in row for row in few) == 50
