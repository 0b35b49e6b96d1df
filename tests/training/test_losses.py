"""Runs with every loss: what is trained, what is logged, what is saved and how it is gone on with."""

import functools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from every_mode import make_task
from gradients_case import gradients_of_one_step
from running import go, reseal, rows, weights

import lossmith
from lossmith.components.moe import MoEBalance
from lossmith.objectives import unified_parts
from lossmith.training.config.reading import load_config
from lossmith.training.errors import UserError
from lossmith.training.run.loss_modifiers import add_modifiers
from slow_but import slow_but

MTP = ["--loss=unified", "--use_mtp", "--num_future_tokens=2"]
BALANCED = ["--model=moe", "--loss=unified", "--use_moe_balancing"]
BY_BIAS = [*BALANCED, "--moe_balance_mode=bias"]
RUNS = {
    "nvamp": ["--loss=nvamp"],
    "unified": ["--loss=unified"],
    "mtp": [*MTP, "--use_ngram_penalty", "--eos_token_id=0"],
    "shared": [*MTP, "--shared_projection", "--primary_loss_type=adaptive_mtp", "--mtp_type=adaptive"],
    "token losses": ["--loss=unified", "--use_focal_loss", "--use_auxiliary_loss", "--z_loss=1e-3"],
    "contrastive": ["--loss=unified", "--use_contrastive_loss"],
    "moe": [*BALANCED, "--router_z_loss_weight=0.01"],
    "moe by bias": BY_BIAS,
    "masked nvamp": ["--objective=masked", "--loss=nvamp"],
    "masked unified": [
        "--objective=masked", "--loss=unified", "--use_focal_loss", "--reduction=sequence_mean",
    ],
}  # fmt: skip
MODIFIERS = ["--loss_modifiers_enabled", "--entropy_modifier_enabled", "--target_smoothing_enabled"]


def steps_of(out: Path) -> list[dict]:
    return [row for row in rows(out) if "loss" in row]


def loss_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint / "lossmith_loss.pt", weights_only=True)


# ── what is trained ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("modified", slow_but([True], [False, True]))
@pytest.mark.parametrize("name", RUNS)
def test_every_loss_trains_with_modifiers_and_without(
    name: str, modified: bool, tiny: list[str], tmp_path: Path
):
    """The first loss is the objective's, of the model that every loss begins with."""
    flags = [*tiny, *RUNS[name], *(MODIFIERS if modified else [])]
    assert go(flags)[0] == 0
    found = steps_of(tmp_path / "run")
    assert len(found) == 6
    assert all(math.isfinite(row["loss"]) for row in found)
    parts = {name: value for name, value in found[0].items() if name.startswith("loss/")}
    assert len(parts) != 1
    if parts:
        assert sum(parts.values()) == pytest.approx(found[0]["loss"], rel=1e-5)
    assert any("EntropyModifier" in name for name in found[0]) is modified

    task = make_task(load_config(flags))
    add_modifiers(task, "cpu", "float32")
    torch.manual_seed(1337)
    model = task.make_model()
    batch = {n: torch.stack([task.train_blocks[i][n] for i in range(4)]) for n in ("input_ids", "labels")}
    output = model(**batch, denominator=task.count(batch))
    assert output["loss"].item() == pytest.approx(found[0]["loss"], rel=1e-5)
    seen = task.seen(output)
    total, number = seen.observed.tolist()
    assert math.exp(total / number) == pytest.approx(found[0]["perplexity"], rel=1e-5)


@pytest.mark.slow
def test_every_loss_begins_with_the_same_model(tiny: list[str], tmp_path: Path):
    """And sees the same blocks, so the first perplexity, which is plain, is the same."""
    found = []
    for number, own in enumerate(([], ["--loss=nvamp"], MTP, [*MTP, "--initial_temperature=2"])):
        out = tmp_path / str(number)
        go([*tiny, *own, "--max_iters=1", f"--out_dir={out}"])
        found.append(steps_of(out)[0])
    assert len({round(row["perplexity"], 3) for row in found}) == 1
    assert len({round(row["loss"], 3) for row in found}) == len(found)


def test_the_unified_loss_with_nothing_on_is_cross_entropy(tiny: list[str], tmp_path: Path):
    for number, own in enumerate(([], ["--loss=unified"])):
        go([*tiny, *own, f"--out_dir={tmp_path / str(number)}"])
    plain, unified = (weights(tmp_path / name / "checkpoint-6") for name in "01")
    assert all(torch.equal(unified[name], value) for name, value in plain.items())
    assert not any(name.startswith("loss/") for row in rows(tmp_path / "1") for name in row)
    assert not (tmp_path / "1" / "checkpoint-6" / "lossmith_loss.pt").exists()


@pytest.mark.parametrize("name", ["mtp", "shared", "token losses", "masked unified"])
def test_gradients_do_not_depend_on_how_a_batch_is_split(name: str, tiny: list[str]):
    flags = [*tiny, *RUNS[name]]
    whole, halves = gradients_of_one_step(flags, 8, 1), gradients_of_one_step(flags, 2, 4)
    assert whole.keys() == halves.keys()
    for parameter, gradient in whole.items():
        torch.testing.assert_close(halves[parameter], gradient, rtol=1e-4, atol=1e-7)


def test_evaluation_is_plain_whatever_the_loss(tiny: list[str], tmp_path: Path):
    out = tmp_path / "run"
    go([*tiny, *RUNS["mtp"], "--ngram_penalty_weight=5", "--initial_temperature=2"])
    code, shown = go([f"--out_dir={out}", "--eval_only"])
    assert code == 0
    plain = tmp_path / "plain"
    shutil.copytree(out, plain)
    config = (plain / "config.yaml").read_text().replace("loss: unified", "loss: cross_entropy")
    kept = [
        line
        for line in config.splitlines()
        if not line.startswith(("use_", "num_future", "ngram_", "eos_", "initial_t"))
    ]
    (plain / "config.yaml").write_text("\n".join(kept))
    again = go([f"--out_dir={plain}", "--eval_only"])[1]
    assert "validation loss" in again.splitlines()[2]
    assert again.splitlines()[2] == shown.splitlines()[2]


# ── experts ───────────────────────────────────────────────────────────────────────────────────────


def gradient_of_routers(flags: list[str]) -> torch.Tensor:
    task = make_task(load_config(flags))
    torch.manual_seed(0)
    model = task.make_model()
    batch = {n: torch.stack([task.train_blocks[i][n] for i in range(4)]) for n in ("input_ids", "labels")}
    model(**batch).loss.backward()
    return model.model.layers[0].mlp.gate.weight.grad  # pyright: ignore


def test_routers_are_balanced(tiny: list[str], tmp_path: Path):
    go([*tiny, *BALANCED, "--gradient_balance_weight=0.5"])
    found = [row["loss/moe_balance_loss"] for row in steps_of(tmp_path / "run")]
    assert found == pytest.approx([0.5] * 6, rel=0.1)  # near balance, where it is 1
    flags = [*tiny, *BALANCED]
    weak, strong, none = (
        gradient_of_routers([*flags, f"--gradient_balance_weight={weight}"]) for weight in (1, 2, 0)
    )
    assert (weak - none).abs().max() > 1e-6
    torch.testing.assert_close(strong - none, 2 * (weak - none), rtol=1e-3, atol=1e-7)


def test_the_models_own_balance_is_not_added(tiny: list[str], tmp_path: Path):
    go([*tiny, "--model=moe"])
    row = steps_of(tmp_path / "run")[0]
    assert row["loss"] == pytest.approx(math.log(row["perplexity"]), rel=1e-5)


def test_the_model_has_the_experts_that_were_asked_for(tiny: list[str], tmp_path: Path):
    shown = go([*tiny, "--model=moe", "--num_experts=3", "--moe_top_k=1", "--n_layer=2"])[1]
    assert "2 layers, 2 heads, width 16, 3 experts with 1 a token: " in shown
    saved = weights(tmp_path / "run" / "checkpoint-6")
    assert saved["model.layers.1.block_sparse_moe.gate.weight"].shape == (3, 16)
    code, shown = go([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=8"])
    assert code == 0
    with pytest.raises(UserError, match=r"num_experts=4 but the run in .* was trained with num_experts=3"):
        go([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=9", "--num_experts=4"])
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("num_experts: 3", "num_experts: 5"))
    with pytest.raises(UserError, match=r"says num_local_experts=3 but .* says num_experts=5"):
        go([f"--out_dir={tmp_path / 'run'}", "--eval_only"])


def test_a_new_mixture_of_experts_knows_nothing(tiny: list[str]):
    shown = go([*tiny, "--model=moe", "--n_embd=128", "--n_layer=4", "--warmup_iters=1", "--max_iters=2"])[1]
    assert "The initial loss is" in shown
    assert "warning" not in shown


def test_a_bias_moves_the_choice_of_experts(tiny: list[str]):
    task = make_task(load_config([*tiny, *BY_BIAS, "--n_layer=2"]))
    model = task.make_model()
    (balance,) = (part for part in task.pipeline.modules() if isinstance(part, MoEBalance))
    assert balance.expert_bias is not None
    assert balance.expert_bias.shape == (2, 4)
    layer: Any = model.model.layers[1].mlp  # pyright: ignore
    hidden = torch.randn(5, 16)
    before = layer.gate(hidden)
    balance.expert_bias[1] = torch.tensor([-9.0, 9.0, -9.0, 9.0])
    gate_logits, weight, chosen = layer.gate(hidden)
    assert torch.equal(chosen.sort(-1).values, torch.tensor([[1, 3]]).expand(5, 2))
    assert torch.equal(gate_logits, before[0])
    torch.testing.assert_close(weight.sum(-1), torch.ones(5))
    expected = gate_logits.softmax(-1).gather(-1, chosen)
    torch.testing.assert_close(weight, expected / expected.sum(-1, keepdim=True))


def test_a_bias_of_nothing_changes_nothing(tiny: list[str], tmp_path: Path):
    """In the first optimizer step: the hook that chooses is the model's own choice at a bias of 0."""
    plain, biased, untrained = tmp_path / "plain", tmp_path / "biased", tmp_path / "untrained"
    one_step = ["--max_iters=1", "--warmup_iters=0"]  # else the first step's learning rate is 0
    go([*tiny, "--model=moe", *one_step, f"--out_dir={plain}"])
    go([*tiny, *BY_BIAS, *one_step, f"--out_dir={biased}"])
    go([*tiny, "--model=moe", "--max_iters=1", "--warmup_iters=1", f"--out_dir={untrained}"])
    theirs, ours, before = (weights(out / "checkpoint-1") for out in (plain, biased, untrained))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-7)
        assert (value - before[name]).abs().max() > 1e-3, name


def test_a_run_balanced_by_bias_is_evaluated_with_it(tiny: list[str], tmp_path: Path):
    out = tmp_path / "run"
    go([*tiny, *BY_BIAS])
    state = loss_state(out / "checkpoint-6")
    (bias,) = (value for name, value in state.items() if name.endswith("expert_bias"))
    assert bias.abs().max() > 0
    last = [row for row in rows(out) if "val_loss" in row][-1]
    assert f"validation loss {last['val_loss']:.3f}" in go([f"--out_dir={out}", "--eval_only"])[1]
    torch.save({name: torch.full_like(v, 5) * torch.tensor([1, -1, 1, -1]) for name, v in state.items()},
               out / "checkpoint-6" / "lossmith_loss.pt")  # fmt: skip
    reseal(out / "checkpoint-6")
    other = go([f"--out_dir={out}", "--eval_only"])[1]
    assert f"perplexity {last['perplexity']:,.1f}" not in other


# ── what is saved ─────────────────────────────────────────────────────────────────────────────────


def test_heads_learn_and_are_saved(tiny: list[str], tmp_path: Path):
    out = tmp_path / "run"
    shown = go([*tiny, *MTP])[1]
    assert "num_future_tokens 2: 9,600 parameters" in shown  # of the loss alone
    task = make_task(load_config([*tiny, *MTP]))
    begun = task.pipeline.state_dict()
    first, last = loss_state(out / "checkpoint-3"), loss_state(out / "checkpoint-6")
    heads = [name for name in begun if ".heads." in name]
    assert len(heads) == 2
    assert begun.keys() == first.keys() == last.keys()
    for name in heads:
        assert not torch.equal(first[name], begun[name])
        assert not torch.equal(last[name], first[name])
    assert not any("loss" in name or "heads" in name for name in weights(out / "checkpoint-6"))
    optimizer = torch.load(out / "checkpoint-6" / "optimizer.pt", weights_only=True)
    num_parameters = len(list(task.make_model().parameters()))  # with the loss's
    assert len(optimizer["state"]) == num_parameters == len(weights(out / "checkpoint-6")) + 2
    assert all(row["loss/mtp_loss"] > 0 for row in steps_of(out))


def test_parts_reach_tensorboard(tiny: list[str], tmp_path: Path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    go([*tiny, *MTP, "--tensorboard_log"])
    events = accumulators.EventAccumulator(str(out / "tensorboard")).Reload()
    written = {event.step: event.value for event in events.Scalars("loss/mtp_loss")}
    assert written == pytest.approx({row["step"]: row["loss/mtp_loss"] for row in steps_of(out)}, rel=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        [*MTP, "--adaptive_temperature", "--use_ngram_penalty", "--gradient_accumulation_steps=2"],
        ["--objective=masked", "--loss=unified", "--adaptive_temperature"],
        [*BY_BIAS, "--adaptive_temperature"],
    ],
    ids=["causal", "masked", "moe"],
)
def test_a_resumed_run_is_the_same_to_the_last_bit(
    flags: list[str], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # moves from the second step on
    soon = functools.partial(lossmith.AdaptiveTemperature, window=2, low=0.0, high=0.0)
    monkeypatch.setattr(unified_parts, "AdaptiveTemperature", soon)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    flags = [*tiny, *flags, "--dropout=0.1", "--max_iters=7", "--eval_interval=4", "--min_lr=0"]
    go([*flags, f"--out_dir={straight}"])
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoint-7")
    go([f"--out_dir={stopped}", "--resume"])
    for read in (weights, loss_state):
        theirs, ours = read(straight / "checkpoint-7"), read(stopped / "checkpoint-7")
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    state = loss_state(straight / "checkpoint-7")
    (temperature,) = (value for name, value in state.items() if name.endswith("temperature.value"))
    assert temperature != 1
    expected, found = steps_of(straight), steps_of(stopped)
    assert len(found) == len(expected) == 7
    for mine, theirs in zip(found, expected, strict=True):
        assert {**mine, "tokens_per_second": 0} == {**theirs, "tokens_per_second": 0}


@pytest.mark.parametrize(
    "change", ["--num_future_tokens=3", "--use_mtp=False", "--shared_projection", "--adaptive_temperature"]
)
def test_the_heads_of_a_run_cannot_change(change: str, tiny: list[str], tmp_path: Path):
    go([*tiny, *MTP])
    message = r"the loss of .*checkpoint-6 has other heads or another state than this one: .* cannot change"
    with pytest.raises(UserError, match=message):
        go([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=9", change])
    assert go([f"--out_dir={tmp_path / 'run'}", "--eval_only"])[0] == 0


def test_what_is_no_state_may_change(tiny: list[str], tmp_path: Path):
    go([*tiny, *MTP])
    assert go([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=9", "--mtp_weight=0.5"])[0] == 0
    found = steps_of(tmp_path / "run")
    assert found[7]["loss/mtp_loss"] > 3 * found[2]["loss/mtp_loss"]


def test_a_damaged_or_missing_state_of_the_loss(tiny: list[str], tmp_path: Path):
    go([*tiny, *MTP])
    path = tmp_path / "run" / "checkpoint-6" / "lossmith_loss.pt"
    again = [f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=9"]
    path.write_bytes(path.read_bytes()[:100])
    reseal(path.parent)
    with pytest.raises(UserError, match=r"lossmith_loss\.pt is damaged; expected the state of the loss"):
        go(again)
    path.unlink()
    reseal(path.parent)
    with pytest.raises(UserError, match="has other heads or another state than this one"):
        go(again)


# ── the judge ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["token_classifier", "sequence_scorer"])
def test_a_judge_is_not_loaded_where_it_does_not_act(mode: str, tiny: list[str]):
    on = ["--loss_modifiers_enabled", "--judge_weight_modifier_enabled", "--judge_weight_checkpoint=/nowhere"]
    code, shown = go([*tiny, f"--mode={mode}", *on])
    assert code == 0
    assert f"Not for mode={mode}, so without effect: SequenceScoringJudgeWeightModifier" in shown
    with pytest.raises(UserError, match="/nowhere does not exist"):
        go([*tiny, *on])
