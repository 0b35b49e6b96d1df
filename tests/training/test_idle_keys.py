"""A key that is set and changes nothing is said once, with what would let it act."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from running import go

from lossmith.training.config.idle_keys import idle_in_evaluation, without_effect
from lossmith.training.config.keys import TrainConfig
from lossmith.training.config.reading import load_config

UNIFIED = ["--loss=unified"]
NVAMP = ["--loss=nvamp"]
MOE = [*UNIFIED, "--model=moe", "--use_moe_balancing"]
ON = "--loss_modifiers_enabled"
PADDING = ["--target_smoothing_enabled", "--target_smoothing_padding_token=5"]
ADAPTIVE = "primary_loss_type='adaptive_mtp' or mtp_type='adaptive'"
PAIRS = "pairs of samples, which no text here has"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], []),
        (["--smoothing_mode=exclude_target"], [("smoothing_mode", "label_smoothing")]),
        (["--smoothing_mode=exclude_target", "--label_smoothing=0.1"], []),
        (["--wandb_project=mine"], [("wandb_project", "wandb_log")]),
        ([*UNIFIED, "--adaptive_threshold=0.5"], [("adaptive_threshold", ADAPTIVE)]),
        ([*UNIFIED, "--adaptive_weight_range=0,2", "--primary_loss_type=adaptive_mtp"], []),
        ([*UNIFIED, "--adaptive_weight_range=0,2", "--use_mtp", "--mtp_type=adaptive"], []),
        (
            [*UNIFIED, "--adaptive_weight_range=0,2", "--mtp_type=adaptive"],
            [("mtp_type", "use_mtp"), ("adaptive_weight_range", ADAPTIVE)],
        ),
        ([*UNIFIED, "--use_mtp", "--mtp_weight=0"], [("use_mtp", "mtp_weight")]),
        (
            [*UNIFIED, "--use_ngram_penalty", "--ngram_penalty_weight=0"],
            [("use_ngram_penalty", "ngram_penalty_weight")],
        ),
        (
            [*UNIFIED, "--use_auxiliary_loss", "--auxiliary_weight=0"],
            [("use_auxiliary_loss", "auxiliary_weight")],
        ),
        ([*UNIFIED, "--use_focal_loss", "--focal_weight=1"], []),
        ([*UNIFIED, "--use_focal_loss", "--focal_weight=0"], [("use_focal_loss", "focal_weight")]),
        (
            [*UNIFIED, "--use_focal_loss", "--focal_weight=0", "--focal_mode=replace"],
            [("focal_weight", "focal_mode='add'")],
        ),
        (
            [*UNIFIED, "--use_focal_loss", "--focal_weight=1", "--focal_mode=replace"],
            [("focal_weight", "focal_mode='add'")],
        ),
        ([*UNIFIED, "--focal_weight=1"], [("focal_weight", "use_focal_loss")]),
        ([*MOE, "--gradient_balance_weight=1"], []),
        (
            [*MOE, "--gradient_balance_weight=1", "--moe_balance_mode=bias"],
            [("gradient_balance_weight", "moe_balance_mode='loss'")],
        ),
        (
            [*UNIFIED, "--use_contrastive_loss", "--contrastive_temperature=1"],
            [("contrastive_temperature", PAIRS)],
        ),
        (
            [*UNIFIED, "--use_mtp", "--num_future_tokens=20", "--block_size=16"],
            [("num_future_tokens above 14", "block_size=22")],
        ),
        ([*UNIFIED, "--use_mtp", "--num_future_tokens=14", "--block_size=16"], []),
        (["--sample_tokens=200"], [("sample_tokens above 127", "block_size=201")]),
        (["--sample_tokens=127"], []),
        (["--sample_tokens=128", "--objective=masked"], []),
        (["--sample_tokens=200", "--mode=sequence_scorer"], []),
        (["--block_size=16"], []),  # the default of sample_tokens is nobody's wish
        ([*NVAMP, "--nvamp_top_k=2", "--nvamp_gamma=0"], [("nvamp_top_k", "nvamp_gamma")]),
        ([*NVAMP, "--nvamp_top_k=2"], []),
        (
            [*NVAMP, "--nvamp_legacy", "--nvamp_eps=1", "--nvamp_alpha=0"],
            [("nvamp_eps", "nvamp_alpha"), ("nvamp_legacy", "nvamp_alpha")],
        ),
        (["--entropy_modifier_enabled"], [("entropy_modifier_enabled", f"{ON[2:]}=True")]),
        (["--entropy_modifier_weight=2"], [("entropy_modifier_weight", "entropy_modifier_enabled")]),
        (
            [ON, "--entropy_modifier_enabled", "--entropy_modifier_weight=2", "--judge_weight_exponent=2"],
            [("judge_weight_exponent", "judge_weight_modifier_enabled")],
        ),
        (
            [ON, *PADDING, "--target_smoothing_exclude_padding=0"],
            [("target_smoothing_padding_token", "target_smoothing_exclude_padding")],
        ),
    ],
)  # fmt: skip
def test_keys_that_change_nothing(flags: list[str], expected: list[tuple[str, str]]):
    assert without_effect(load_config(flags)) == expected


def test_the_master_switch_alone_says_what_to_write(tiny: list[str]):
    shown = go([*tiny, ON, "--max_iters=1"])[1]
    said = [line for line in shown.splitlines() if line.startswith("warning: loss_modifiers_enabled")]
    assert len(said) == 1
    assert "has no effect without a modifier: entropy_modifier_enabled, target_smoothing_enabled, " in said[0]
    assert "warning: loss" not in go([*tiny, ON, "--entropy_modifier_enabled", "--max_iters=1"])[1]


def test_every_modifier_that_waits_for_the_master_switch_is_named(tiny: list[str]):
    flags = ["--entropy_modifier_enabled", "--target_smoothing_enabled", "--max_iters=1"]
    shown = go([*tiny, *flags])[1]
    names = "entropy_modifier_enabled, target_smoothing_enabled"
    assert f"warning: {names} have no effect without loss_modifiers_enabled=True." in shown


def test_what_waits_for_the_same_thing_is_one_line(tiny: list[str]):
    shown = go([*tiny, *UNIFIED, "--mtp_weight=1", "--mtp_type=adaptive", "--max_iters=1"])[1]
    assert shown.count("has no effect") == 0
    assert "warning: mtp_weight, mtp_type have no effect without use_mtp.\n" in shown


def test_nothing_in_the_examples_is_idle():
    for path in sorted((Path(__file__).parents[2] / "config").glob("*.py")):
        assert without_effect(load_config([str(path)])) == [], path.name


def test_what_an_evaluation_does_not_read_is_said(tiny: list[str], tmp_path: Path):
    go(tiny)
    out = [f"--out_dir={tmp_path / 'run'}", "--eval_only"]
    assert "warning" not in go([*out, "--batch_size=2", "--dtype=bfloat16"])[1]
    shown = go([*out, "--max_iters=9", "--eval_iters=2", "--z_loss=1", "--max_iters=6"])[1]
    assert "warning: eval_iters, z_loss have no effect with eval_only." in shown


def test_what_an_evaluation_reads():
    plain = TrainConfig()
    assert idle_in_evaluation(plain, plain) == []
    for name in ("learning_rate", "seed", "compile", "use_mtp", "nvamp_alpha", "tensorboard_log", "loss"):
        other = TrainConfig(**{name: "nvamp" if name == "loss" else not getattr(plain, name)})
        assert idle_in_evaluation(other, plain) == [name]
    for name in ("dataset", "batch_size", "device", "dtype", "moe_balance_mode", "out_dir", "eval_only"):
        assert idle_in_evaluation(TrainConfig(**{name: "x"}), plain) == []
