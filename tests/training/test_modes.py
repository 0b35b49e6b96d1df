"""Whole runs in every mode: what they show, log and save, and that they resume."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from every_mode import CORRUPTED, LOSSES, MODES
from running import go, rows, weights
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from lossmith.training.config.reading import load_config
from lossmith.training.config.saved_run import save_config
from lossmith.training.errors import UserError
from slow_but import slow_but

ROOT = Path(__file__).parents[2]
OF_A_STEP = {
    "masked": {"perplexity"},
    "classifier": {"accuracy"},
    "scorer": {"mean_absolute_error"},
}
OF_AN_EVALUATION = {
    "masked": {"val_loss", "perplexity", "accuracy", "val_tokens"},
    "classifier": {"val_loss", "accuracy", "f1", "replaced", "val_tokens"},
    "scorer": {"val_loss", "mean_absolute_error", "correlation", "val_sequences"},
}
SHOWN = {
    "masked": ["mode        language_model, masked", "a uniform guess costs log 300 = 5.704", "«right»"],
    "classifier": ["mode        token_classifier", "a uniform guess costs log 2 = 0.693", "«found»"],
    "scorer": ["mode        sequence_scorer", "saying 0.5 of every text costs 0.1", "100%    1.000"],
}
AUTO_CLASSES = {
    "masked": AutoModelForMaskedLM,
    "classifier": AutoModelForTokenClassification,
    "scorer": AutoModelForSequenceClassification,
}


@pytest.mark.parametrize("mode", CORRUPTED)
def test_a_run(mode: str, tiny: list[str], tmp_path: Path):
    out = tmp_path / "run"
    code, shown = go([*tiny, *MODES[mode]])
    assert code == 0
    for words in SHOWN[mode]:
        assert words in shown
    assert "warning" not in shown
    steps = [row for row in rows(out) if "loss" in row]
    common = {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"}
    assert set(steps[0]) == common | OF_A_STEP[mode]
    evaluations = [row for row in rows(out) if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [3, 6]
    assert set(evaluations[0]) == {"step", *OF_AN_EVALUATION[mode]}

    # evaluating again, otherwise batched and with another seed, finds the same
    code, again = go([f"--out_dir={out}", "--eval_only", "--batch_size=3", "--seed=5"])
    assert code == 0
    assert again.splitlines()[-1] in shown

    # and the folder is what the library reads
    model = AUTO_CLASSES[mode].from_pretrained(out / "checkpoint-6")
    tokenizer = AutoTokenizer.from_pretrained(out / "checkpoint-6")
    ids = tokenizer("a token reads", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_a_scorer_says_what_a_judge_has_to_know(tiny: list[str], tmp_path: Path):
    go([*tiny, *MODES["scorer"]])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-6")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint-6")
    assert model.config.cls_token_id == tokenizer.cls_token_id == 2
    assert model.config.max_position_embeddings == 17  # a block and <|cls|>
    assert model.config.num_labels == 1


# Of each mode: steps, learning rate, and a loss half-way from what costs no more than knowing how frequent
# tokens are (3.6), or how many were replaced (0.55, 0.09), to what four seeds reached: 2.32 to 2.68, 0.34 to
# 0.40, 0.013 to 0.025.
LEARNT = {"masked": (300, 5e-3, 3.1), "classifier": (150, 5e-3, 0.48), "scorer": (200, 2e-3, 0.05)}


@pytest.mark.parametrize("mode", slow_but(["masked"], CORRUPTED))
def test_a_run_learns(mode: str, tiny: list[str], tmp_path: Path):
    """How words are spelled, for they come in no order."""
    steps, rate, enough = LEARNT[mode]
    flags = [f"--max_iters={steps}", f"--learning_rate={rate}", "--eval_interval=300", "--weight_decay=0.1"]
    go([*tiny, *MODES[mode], *flags, "--n_embd=32", "--n_layer=2", "--batch_size=32", "--log_interval=50"])
    assert rows(tmp_path / "run")[-1]["val_loss"] < enough


@pytest.mark.parametrize("mode", CORRUPTED)
def test_a_resumed_run_sees_what_it_would_have_seen(mode: str, tiny: list[str], tmp_path: Path):
    out = tmp_path / "run"
    go([*tiny, *MODES[mode], "--gradient_accumulation_steps=2", "--dropout=0.1"])
    expected, logged = weights(out / "checkpoint-6"), rows(out)
    shutil.rmtree(out / "checkpoint-6")
    assert "checkpoint-3" in go([f"--out_dir={out}", "--resume"])[1]
    found = weights(out / "checkpoint-6")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert [row.get("loss") for row in rows(out)] == [row.get("loss") for row in logged]
    assert rows(out)[-1] == logged[-1]


@pytest.mark.parametrize("mode", CORRUPTED)
def test_bfloat16(mode: str, tiny: list[str], tmp_path: Path):
    assert go([*tiny, *MODES[mode], "--dtype=bfloat16"])[0] == 0
    assert {value.dtype for value in weights(tmp_path / "run" / "checkpoint-6").values()} == {torch.float32}


# ── the mode is the checkpoint's ──────────────────────────────────────────────────────────────────


def test_the_mode_is_inherited_and_cannot_change(tmp_path: Path):
    save_config(load_config([f"--out_dir={tmp_path}", "--mode=sequence_scorer"]))
    assert load_config([f"--out_dir={tmp_path}", "--resume"]).mode == "sequence_scorer"
    message = r"mode=token_classifier but the run in .* was trained with mode=sequence_scorer"
    with pytest.raises(UserError, match=message):
        load_config([f"--out_dir={tmp_path}", "--eval_only", "--mode=token_classifier"])
    save_config(load_config([f"--out_dir={tmp_path}", "--objective=masked"]))
    assert load_config([f"--out_dir={tmp_path}", "--resume"]).objective == "masked"
    with pytest.raises(UserError, match=r"objective=causal but the run in .* objective=masked"):
        load_config([f"--out_dir={tmp_path}", "--resume", "--objective=causal"])


def test_a_run_from_before_there_were_modes_is_a_causal_language_model(tmp_path: Path):
    path = save_config(load_config([f"--out_dir={tmp_path}"]))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(row for row in lines if not row.startswith(("mode:", "objective:"))))
    config = load_config([f"--out_dir={tmp_path}", "--resume"])
    assert (config.mode, config.objective) == ("language_model", "causal")
    with pytest.raises(UserError, match=r"mode=sequence_scorer but .* trained with mode=language_model"):
        load_config([f"--out_dir={tmp_path}", "--resume", "--mode=sequence_scorer"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objective=masked", "--mode=token_classifier"], "objective=masked is about a language model"),
        (["--mode=sequence_scorer", "--z_loss=1e-4"], r"z_loss=0\.0001 is an option of cross-entropy"),
        (["--mode=scorer"], "mode='scorer'; expected one of language_model, token_classifier"),
    ],
)
def test_keys_that_do_not_go_together(flags: list[str], message: str):
    with pytest.raises(UserError, match=message):
        load_config(flags)


def test_a_checkpoint_of_another_block_size(tiny: list[str], tmp_path: Path):
    """A scorer's has one position more, for <|cls|>."""
    go([*tiny, *MODES["scorer"]])
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("block_size: 16", "block_size: 17"))
    with pytest.raises(UserError, match=r"max_position_embeddings=17 but .* block_size=17"):
        go([f"--out_dir={tmp_path / 'run'}", "--eval_only"])


def test_a_checkpoint_of_another_mode(tiny: list[str], tmp_path: Path):
    """Its head would be filled with random numbers, without a word."""
    go([*tiny, *MODES["masked"]])
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("objective: masked", "objective: causal"))
    with pytest.raises(UserError, match=r"architectures=\['ModernBertForMaskedLM'\] but .* objective=causal"):
        go([f"--out_dir={tmp_path / 'run'}", "--eval_only"])


def test_a_text_of_one_kind_of_token(tiny: list[str], tmp_path: Path):
    """259 pieces are single bytes and the special tokens."""
    text = tmp_path / "same.txt"
    text.write_text("a" * 4000)
    with pytest.raises(UserError, match="the training text repeats one token"):
        go([*tiny, *MODES["classifier"], f"--dataset={text}", "--vocab_size=259"])


# ── two ranks ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_two_ranks_train_what_one_trains_with_twice_the_batch(tiny: list[str], tmp_path: Path):
    """Each rank takes its share of the blocks; gradients, measures and the log are those of the whole."""
    worker = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [*tiny, "--dropout=0", "--eval_interval=3", "--log_interval=1"]
    done = subprocess.run(
        [*worker, str(Path(__file__).parent / "several_runs.py"), str(tmp_path / "two"), *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    runs = {f"mode {name}": own for name, own in MODES.items()}
    runs |= {f"loss {name}": own for name, own in LOSSES.items()}
    for name, own in runs.items():
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        assert go([*flags, *own, f"--out_dir={one}", "--batch_size=8"])[0] == 0
        mine, theirs = weights(one / "checkpoint-6"), weights(two / "checkpoint-6")
        for name, value in mine.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-6)
        for expected, found in zip(rows(one), rows(two), strict=True):
            for row in (expected, found):
                row.pop("tokens_per_second", None)
                row.pop("moe_balance_loss/max_violation", None)  # of each rank's own tokens
            assert found == pytest.approx(expected, rel=1e-4)
