"""The keys of the losses: all of what the constructors take, and mistakes in them."""

import inspect
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from running import go

from lossmith.training.config import objective
from lossmith.training.config.idle_keys import without_effect
from lossmith.training.config.keys import SPECS, TrainConfig
from lossmith.training.config.loss_keys import CONSTRUCTORS, DECIDED, LOSS_KEYS, OPTIONS, SHARED
from lossmith.training.config.objective import make_objective
from lossmith.training.config.reading import (
    TYPES,
    load_config,
    read_config_file,
    read_flags,
    read_saved_config,
    resolve,
)
from lossmith.training.config.saved_run import save_config
from lossmith.training.errors import UserError

UNIFIED = ["--loss=unified"]
MOE = ["--loss=unified", "--model=moe"]
MASKED = ["--loss=unified", "--objective=masked"]
DIVERSITY = ("diversity_weight", "use_diversity_loss")
# Where the trainer has a default of its own.
OWN_DEFAULTS = {("unified", "focal_gamma")}


def changed(name: str) -> Any:
    """A value of a key that is not its default."""
    spec, kind = SPECS[name], TYPES[name]
    if spec.choices:
        return next(choice for choice in spec.choices if choice != spec.default)
    if spec.default is None:
        return 3 if kind == (int | None) else (0.5, 0.25, 0.25)
    if isinstance(spec.default, tuple):
        return (0.25, 3.0)
    return not spec.default if isinstance(spec.default, bool) else spec.default + type(spec.default)(1)


@pytest.mark.parametrize("loss", CONSTRUCTORS)
def test_everything_that_a_constructor_takes_is_a_key(loss: str):
    parameters = inspect.signature(CONSTRUCTORS[loss]).parameters
    assert set(OPTIONS[loss].values()) == set(parameters) - set(DECIDED)
    assert set(OPTIONS[loss]) <= set(SPECS)
    for name, option in OPTIONS[loss].items():
        if (loss, name) not in OWN_DEFAULTS:
            assert SPECS[name].default == parameters[option].default
            assert type(SPECS[name].default) is type(parameters[option].default)


def test_what_the_trainer_decides_is_taken_by_some_constructor():
    taken = {name for loss in CONSTRUCTORS.values() for name in inspect.signature(loss).parameters}
    assert set(DECIDED) <= taken
    assert SHARED - {"loss"} <= set(LOSS_KEYS)


@pytest.mark.parametrize(
    ("loss", "name"), [(loss, name) for loss, options in OPTIONS.items() for name in options]
)
def test_every_key_reaches_the_constructor(loss: str, name: str, monkeypatch: pytest.MonkeyPatch):
    given = {}
    monkeypatch.setitem(objective.CONSTRUCTORS, loss, lambda **options: given.update(options))
    value = changed(name)
    make_objective(TrainConfig(loss=loss, model="moe", **{name: value}), shift=True)
    assert given[OPTIONS[loss][name]] == value
    assert given["shift"] is True
    others = {option: SPECS[key].default for key, option in OPTIONS[loss].items() if key != name}
    of_the_model = {"num_experts": 4, "moe_top_k": 2}
    for option in given.keys() & others.keys():
        assert given[option] == of_the_model.get(option, others[option])


def test_what_the_model_is_reaches_the_constructor(monkeypatch: pytest.MonkeyPatch):
    given = {}
    monkeypatch.setitem(objective.CONSTRUCTORS, "unified", lambda **options: given.update(options))
    make_objective(load_config([*UNIFIED, "--n_embd=64", "--vocab_size=300"]), shift=False)
    assert (given["hidden_size"], given["vocab_size"], given["shift"]) == (64, 300, False)
    assert given["num_experts"] is given["moe_top_k"] is None
    assert "focal_gamma" not in given
    by_bias = ["--use_moe_balancing", "--moe_balance_mode=bias", "--n_layer=3"]
    make_objective(load_config([*MOE, *by_bias, "--num_experts=8"]), shift=True)
    assert (given["num_experts"], given["moe_top_k"], given["moe_num_layers"]) == (8, 2, 3)


@pytest.mark.parametrize("name", LOSS_KEYS)
def test_every_key_is_read_as_a_flag_and_comes_back(name: str, tmp_path: Path):
    value = changed(name)
    texts = [str(value), ",".join(map(str, value))] if isinstance(value, tuple) else [str(value)]
    for text in texts:
        config = resolve(read_flags([f"--out_dir={tmp_path}", f"--{name}={text}"])[1])
        found = getattr(config, name)
        assert (found, type(found)) == (value, type(value))
        save_config(config)
        again = getattr(resolve(read_saved_config(config)), name)
        assert (again, type(again)) == (value, type(value))
    file = tmp_path / "run.py"
    file.write_text(f"{name} = {value!r}\n")
    assert getattr(resolve(read_config_file(file)), name) == value


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--temperature_bounds=0.5,2", (0.5, 2.0)),
        ("--temperature_bounds=[1, 1.5]", (1.0, 1.5)),
        ("--moe_top_k=None", None),
        ("--moe_top_k=2.0", 2),
        ("--eos_token_id=0", 0),
        ("--target_expert_usage=0.25", 0.25),
        ("--target_expert_usage=1", 1.0),
        ("--target_expert_usage=0.5,0.3,0.1,0.1", (0.5, 0.3, 0.1, 0.1)),
        ("--target_expert_usage=None", None),
    ],
)
def test_values_of_several_kinds(flag: str, value: Any, tmp_path: Path):
    name = flag[2:].split("=")[0]
    found = getattr(resolve(read_flags([flag])[1]), name)
    assert (found, type(found)) == (value, type(value))
    file = tmp_path / "run.py"
    file.write_text(f"loss = 'unified'\nmodel = 'moe'\n{name} = {value!r}\n")
    assert getattr(load_config([str(file)]), name) == value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        # another loss's
        (["--use_mtp"], r"use_mtp=True is a key of loss=unified, but loss=cross_entropy\. Leave use_mtp out"),
        (["--nvamp_alpha=2"], r"nvamp_alpha=2\.0 is a key of loss=nvamp, .* or pass --loss=nvamp"),
        (["--loss=nvamp", "--z_loss=1"], "z_loss=1.0 is a key of loss=cross_entropy or loss=unified, but"),
        ([*UNIFIED, "--temperature=2"], "temperature=2.0 is a key of loss=cross_entropy or loss=nvamp"),
        ([*UNIFIED, "--confidence_penalty=2"], "is a key of loss=cross_entropy, but loss=unified"),
        ([*UNIFIED, "--smoothing_mode=exclude_target"], "smoothing_mode=exclude_target is a key of"),
        # another mode's
        (["--mode=token_classifier", "--loss=nvamp"], "loss=nvamp is about a language model, but mode=token"),
        (["--mode=sequence_scorer", "--loss=unified"], "loss=unified is about a language model, but mode="),
        (["--mode=sequence_scorer", "--use_mtp"], "use_mtp=True is about a language model"),
        (["--mode=sequence_scorer", "--reduction=sequence_mean"], "is an option of cross-entropy"),
        (["--mode=token_classifier", "--model=moe"], "model=moe is a causal language model, but mode=token"),
        (["--objective=masked", "--model=moe"], "model=moe is a causal .* objective=masked. Leave model out"),
        ([*MASKED, "--use_mtp"], "use_mtp=True reads the hidden states of a causal model, but"),
        ([*MASKED, "--use_contrastive_loss"], "use_contrastive_loss=True reads the hidden states"),
        ([*MASKED, "--use_ngram_penalty"], "is about what comes after what, but objective=masked sees both"),
        ([*MASKED, "--use_immediate_repetition_penalty"], "is about what comes after what"),
        ([*MASKED, "--eos_token_id=0"], "eos_token_id=0 is about what comes after what"),
        # another model's
        (["--num_experts=8"], "num_experts=8 is about a mixture of experts: pass --model=moe"),
        ([*UNIFIED, "--use_moe_balancing"], "use_moe_balancing=True is about a mixture of experts"),
        ([*UNIFIED, "--router_z_loss_weight=1"], "is about a mixture of experts"),
        ([*UNIFIED, "--moe_top_k=1"], "is about a mixture of experts"),
        ([*MOE, "--use_diversity_loss"], "reads the output of every expert, which no model of the trainer"),
        ([*UNIFIED, "--use_diversity_loss"], "reads the output of every expert"),
        ([*MOE, "--moe_top_k=5"], r"moe_top_k=5 is above num_experts=4; .* Try --num_experts=10"),
        ([*MOE, "--moe_num_layers=3"], "moe_num_layers=3, but every layer has experts and n_layer=4"),
        # what does not go together
        ([*UNIFIED, "--eos_token_id=2048"], "eos_token_id=2048 is no token of vocab_size=2048"),
        ([*UNIFIED, "--pad_token_id=9999"], "pad_token_id=9999 is no token"),
        ([*UNIFIED, "--primary_loss_type=standard", "--adaptive_temperature"], "a temperature belongs"),
        ([*UNIFIED, "--adaptive_temperature", "--temperature_bounds=3,4"], "lowest <= initial <= highest"),
        ([*UNIFIED, "--use_ngram_penalty", "--ngram_window_size=3"], "expected window_size >= ngram_size"),
        ([*MOE, "--use_moe_balancing", "--target_expert_usage=0.5,0.5"], "must be one share or num_exp"),
        ([*MOE, "--use_moe_balancing", "--target_expert_usage=0.5,0.5,0.5,0.5"], "that sum to 1"),
        ([*UNIFIED, "--use_focal_loss", "--focal_mode=replace", "--focal_alpha=2"], "focal_alpha=2.0 scales"),
        # out of range
        (["--loss=focal"], "loss='focal'; expected one of cross_entropy, nvamp, unified"),
        (["--model=mixtral"], "model='mixtral'; expected one of llama, moe"),
        (["--reduction=sum"], "reduction='sum'; expected one of mean, sequence_mean"),
        ([*UNIFIED, "--mtp_type=x"], "mtp_type='x'; expected one of deepseek, adaptive"),
        ([*UNIFIED, "--num_future_tokens=0"], "expected num_future_tokens >= 1"),
        ([*UNIFIED, "--use_mtp", "--mtp_weight=nan"], "expected mtp_weight to be finite"),
        (["--loss=nvamp", "--nvamp_eps=0"], "nvamp_eps=0.0 is out of range; expected nvamp_eps > 0"),
        (["--loss=nvamp", "--nvamp_alpha=inf"], "nvamp_alpha=inf is out of range; expected .* finite"),
        (["--loss=nvamp", "--nvamp_top_k=0"], "expected nvamp_top_k >= 1"),
        # of a wrong type
        ([*UNIFIED, "--temperature_bounds=3"], r"expects two numbers; came 3 .*=\(0\.5, 2\.0\)"),
        ([*UNIFIED, "--temperature_bounds=1,2,3"], "expects two numbers"),
        ([*UNIFIED, "--temperature_bounds=a,b"], "expects two numbers; came 'a,b'"),
        ([*UNIFIED, "--temperature_bounds=None"], "expects two numbers; came None"),
        ([*MOE, "--moe_top_k=none"], "expects a whole number or None; came 'none' .* moe_top_k=2"),
        ([*MOE, "--moe_top_k=1.5"], "expects a whole number or None; came 1.5"),
        ([*MOE, "--target_expert_usage=x"], "expects a number, a list of numbers or None; came 'x'"),
        ([*MOE, "--target_expert_usage=True"], "expects a number, a list of numbers or None; came True"),
        ([*UNIFIED, "--num_experts=True"], "expects a whole number or None; came True"),
        (["--los=nvamp"], "Did you mean loss"),
        (["--nvamp_lambda=1"], "Did you mean nvamp_"),
    ],
)  # fmt: skip
def test_mistakes(flags: list[str], message: str):
    with pytest.raises(UserError, match=message):
        load_config(flags)


def test_what_belongs_to_the_model_needs_no_unified_loss():
    assert load_config(["--model=moe", "--num_experts=8", "--moe_top_k=1"]).experts == (8, 1)
    assert load_config(["--model=moe"]).experts == (4, 2)
    assert load_config([]).experts is None


def test_the_exponent_of_the_focal_loss_is_its_own_unless_set():
    focal = [*UNIFIED, "--use_focal_loss", "--focal_mode=replace"]
    assert make_objective(load_config(focal), shift=True).base.focal_gamma == 2  # type: ignore
    assert make_objective(load_config([*focal, "--focal_gamma=3"]), shift=True).base.focal_gamma == 3  # type: ignore


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--focal_gamma=2"], [("focal_gamma", "use_focal_loss")]),
        (["--use_focal_loss", "--focal_gamma=2"], []),
        (["--mtp_weight=1", "--diversity_weight=2"], [("mtp_weight", "use_mtp"), DIVERSITY]),
        (["--min_sequence_length=2"], [("min_sequence_length", "eos_token_id")]),
        (["--eos_token_id=0", "--min_sequence_length=2"], []),
    ],
)  # fmt: skip
def test_keys_that_change_nothing_are_found(flags: list[str], expected: list[tuple[str, str]]):
    assert without_effect(load_config([*UNIFIED, *flags])) == expected
    assert without_effect(load_config(["--focal_gamma=2"])) == []


def test_keys_that_change_nothing_are_said(tiny: list[str]):
    shown = go([*tiny, *UNIFIED, "--mtp_weight=1", "--max_iters=1"])[1]
    assert "warning: mtp_weight has no effect without use_mtp." in shown


def test_an_older_run_had_no_choice_of_models(tmp_path: Path):
    path = save_config(load_config([f"--out_dir={tmp_path}"]))
    lines = path.read_text().splitlines()
    old = [line for line in lines if line.split(":")[0] not in ("loss", "model", "num_experts", "moe_top_k")]
    path.write_text("\n".join(old))
    config = load_config([f"--out_dir={tmp_path}", "--resume"])
    assert (config.model, config.loss) == ("llama", "cross_entropy")
    with pytest.raises(UserError, match=r"model=moe but the run in .* was trained with model=llama"):
        load_config([f"--out_dir={tmp_path}", "--resume", "--model=moe"])
