"""Files first, flags second, every mistake named."""

from pathlib import Path

import pytest

pytest.importorskip("yaml")

from lossmith.training.config.keys import TrainConfig
from lossmith.training.config.reading import load_config, read_config_file
from lossmith.training.config.saved_run import save_config
from lossmith.training.errors import UserError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.py"
    path.write_text(text)
    return path


def test_without_arguments_everything_is_the_default():
    assert load_config([]) == TrainConfig()


@pytest.mark.parametrize(
    ("args", "key", "value"),
    [
        (["--batch_size=3"], "batch_size", 3),
        (["--batch_size", "3"], "batch_size", 3),
        (["--batch-size=3"], "batch_size", 3),
        (["--learning_rate=1e-3"], "learning_rate", 1e-3),
        (["--dropout=0"], "dropout", 0.0),
        (["--compile"], "compile", True),
        (["--compile=True"], "compile", True),
        (["--compile", "false"], "compile", False),
        (["--compile", "--batch_size=3"], "compile", True),
        (["--dataset=2024"], "dataset", "2024"),
        (["--dataset=${HOME}/a=b"], "dataset", "${HOME}/a=b"),
        (["--dataset=${"], "dataset", "${"),
        (["--out_dir=a\\${b}"], "out_dir", "a\\${b}"),
        (["--max_iters=1e3"], "max_iters", 1000),
        (["--seed=007"], "seed", 7),
        (["--compile=1"], "compile", True),
        (["--compile", "0"], "compile", False),
        (["--batch_size=3", "--batch_size=4"], "batch_size", 4),
    ],
)
def test_flags(args: list[str], key: str, value: object):
    found = getattr(load_config(args), key)
    assert found == value
    assert type(found) is type(value)


def test_the_file_comes_first_and_the_flags_win(tmp_path: Path):
    path = write(tmp_path, '"""A run."""\nbatch_size = 3  # small\nn_layer: int = 2\nmin_lr = 1e-5\n')
    config = load_config(["--batch_size=5", str(path)])
    assert (config.batch_size, config.n_layer, config.min_lr) == (5, 2, 1e-5)


def test_a_config_file_is_never_executed(tmp_path: Path):
    proof = tmp_path / "executed"
    path = write(tmp_path, f"batch_size = 3\nseed = open({str(proof)!r}, 'w').write('x')\n")
    with pytest.raises(UserError, match=r"run\.py:2: seed expects a plain value"):
        load_config([str(path)])
    assert not proof.exists()


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "print('hello')",
        "a, b = 1, 2",
        "a = b = 1",
        "x += 1",
        "if True:\n    seed = 1",
        "seed: int",
    ],
)
def test_anything_but_an_assignment_is_an_error_with_its_line(tmp_path: Path, line: str):
    path = write(tmp_path, f"batch_size = 3\n\n{line}\n")
    with pytest.raises(UserError, match=r"run\.py:3: expected `key = value`; came `"):
        read_config_file(path)


def test_what_is_not_python_is_an_error_with_its_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"run\.py:2: this is not Python"):
        read_config_file(write(tmp_path, "batch_size = 3\nseed = = 4\n"))


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match=r"none\.py cannot be read: No such file"):
        load_config([str(tmp_path / "none.py")])


def test_a_file_of_bytes(tmp_path: Path):
    path = tmp_path / "run.py"
    path.write_bytes(b"seed = 1 # \xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config([str(path)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batchsize=3"], r"--batchsize: there is no key 'batchsize'\. Did you mean batch_size\?"),
        (["--lerning_rate", "3"], r"Did you mean learning_rate\?"),
        (["--xyzzy=3"], r"no key 'xyzzy'\. `--help` lists"),
        (["--batch_size=lots"], r"batch_size expects a whole number; came 'lots' \(str\)"),
        (["--batch_size=3.5"], r"batch_size expects a whole number; came 3\.5 \(float\)"),
        (["--batch_size=True"], r"batch_size expects a whole number; came True \(bool\)"),
        (["--batch_size=[1]"], r"batch_size expects a whole number"),
        (["--batch_size="], r"batch_size expects a whole number; came ''"),
        (["--dropout=None"], r"dropout expects a number; came None"),
        (["--compile=2"], r"compile expects True or False; came 2 \(int\)\. Write for example compile=False"),
        (["--max_iters=1e400"], r"max_iters expects a whole number; came inf"),
        (["--learning_rate=" + "9" * 400], r"learning_rate expects a number"),
        (["--lr=3"], r"no key 'lr'\. Did you mean learning_rate\?"),
        (["--MAX_ITERS=3"], r"no key 'MAX_ITERS'\. Did you mean max_iters\?"),
        (["--out_dir="], r"out_dir is empty; expected a folder"),
        (["--out_dir= ", "--resume"], r"out_dir is empty; expected a folder"),
        (["--compile=maybe"], r"compile expects True or False; came 'maybe'"),
        (["--batch_size"], r"--batch_size needs a value; came nothing"),
        (["--batch_size", "--compile"], r"--batch_size needs a value"),
        (["shakespeare"], r"expected --key=value or one config file ending in \.py; came 'shakespeare'"),
        (["--compile", "3"], r"came '3'"),
    ],
)
def test_mistakes_on_the_command_line(args: list[str], message: str):
    with pytest.raises(UserError, match=message):
        load_config(args)


def test_mistakes_in_a_file_name_its_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"run\.py:2: there is no key 'n_layers'\. Did you mean n_layer\?"):
        load_config([str(write(tmp_path, "seed = 1\nn_layers = 2\n"))])
    with pytest.raises(UserError, match=r"run\.py:1: seed expects a whole number; came 'one'"):
        load_config([str(write(tmp_path, "seed = 'one'\n"))])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("out_dir = 5", r"out_dir expects text; came 5 \(int\)\. Write for example out_dir='out'"),
        ("out_dir = True", r"out_dir expects text; came True \(bool\)"),
        ("dataset = None", r"dataset expects text; came None"),
        ("dataset = b'x'", r"dataset expects text; came b'x' \(bytes\)"),
        ("compile = 3", r"compile expects True or False; came 3 \(int\)"),
        ("compile = 'yes'", r"compile expects True or False; came 'yes'"),
        ("max_iters = '5'", r"max_iters expects a whole number; came '5' \(str\)"),
        ("max_iters = 5.5", r"max_iters expects a whole number; came 5\.5"),
        ("max_iters = True", r"max_iters expects a whole number; came True"),
        ("dropout = '0.1'", r"dropout expects a number; came '0\.1'"),
        ("dropout = False", r"dropout expects a number; came False"),
        ("dropout = [0.1]", r"dropout expects a number; came \[0\.1\] \(list\)"),
    ],
)
def test_wrong_types_in_a_file(tmp_path: Path, line: str, message: str):
    with pytest.raises(UserError, match=r"run\.py:1: " + message):
        load_config([str(write(tmp_path, line))])


def test_texts_of_a_file_are_taken_literally(tmp_path: Path):
    for text in ("${b}", "${", "5"):
        config = load_config([str(write(tmp_path, f"dataset = {text!r}\nout_dir = {text!r}\n"))])
        assert (config.dataset, config.out_dir) == (text, text)


def test_a_file_with_a_byte_order_mark(tmp_path: Path):
    path = tmp_path / "run.py"
    path.write_bytes(b"\xef\xbb\xbfmax_iters = 1e3\r\n")
    found = load_config([str(path)]).max_iters
    assert (found, type(found)) == (1000, int)


def test_the_home_folder_is_spelled_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = str(tmp_path / "run")
    assert load_config(["--out_dir=~/run"]).out_dir == home
    assert load_config([str(write(tmp_path, "out_dir = '~/run'"))]).out_dir == home
    (tmp_path / "run").mkdir()
    save_config(load_config(["--out_dir=~/run", "--n_layer=2"]))
    config = load_config(["--out_dir=~/run", "--resume"])
    assert (config.out_dir, config.n_layer) == (home, 2)


def test_the_lowest_learning_rate_follows_the_highest_unless_it_is_set(tmp_path: Path):
    assert load_config(["--learning_rate=1e-5"]).min_lr == pytest.approx(1e-6)
    assert load_config(["--learning_rate=1e-2"]).min_lr == pytest.approx(1e-3)
    assert load_config(["--learning_rate=1e-2", "--min_lr=1e-5"]).min_lr == 1e-5
    file = str(write(tmp_path, "learning_rate = 1e-5\n"))
    assert load_config([file]).min_lr == pytest.approx(1e-6)
    assert load_config([file, "--min_lr=0"]).min_lr == 0


@pytest.mark.parametrize(("first", "rate", "low"), [([], 1e-5, 1e-6), (["--min_lr=3e-6"], 1e-5, 3e-6)])
def test_a_resumed_run_keeps_to_that(tmp_path: Path, first: list[str], rate: float, low: float):
    save_config(load_config([f"--out_dir={tmp_path}", *first]))
    saved = load_config([f"--out_dir={tmp_path}", "--resume"])
    assert saved.min_lr == load_config(first).min_lr
    config = load_config([f"--out_dir={tmp_path}", "--resume", f"--learning_rate={rate}"])
    assert (config.learning_rate, config.min_lr) == (rate, pytest.approx(low))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("batch_size=0", "expected batch_size >= 1"),
        ("dropout=1.5", "expected dropout >= 0 and < 1"),
        ("dropout=nan", "expected dropout >= 0 and < 1"),
        ("label_smoothing=1", "expected label_smoothing >= 0 and < 1"),
        ("temperature=0", "expected temperature >= 1e-20"),
        ("learning_rate=-1", "expected learning_rate > 0"),
        ("learning_rate=inf", "expected learning_rate > 0"),
        ("vocab_size=100", "expected vocab_size >= 259"),
        ("block_size=1", "expected block_size >= 2"),
        ("seed=-1", "expected seed >= 0"),
        ("max_iters=0", "expected max_iters >= 1"),
        ("device=tpu", "expected one of auto, cpu, cuda, mps"),
        ("dtype=int8", "expected one of auto, float32"),
        ("smoothing_mode=even", "expected one of uniform, exclude_target"),
        ("n_head=3", "n_embd=128 over n_head=3"),
        ("min_lr=1", "min_lr=1 is above learning_rate"),
    ],
)
def test_values_out_of_range_name_the_key(flag: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        load_config([f"--{flag}"])
    assert flag.split("=")[0] in str(caught.value)


def test_the_remedy_for_heads_works():
    with pytest.raises(UserError) as caught:
        load_config(["--n_head=3"])
    remedy = str(caught.value).rpartition("Try ")[2].rstrip(".")
    assert load_config(["--n_head=3", remedy]).n_head == 3


def test_a_saved_run_is_continued_by_its_folder_alone(tmp_path: Path):
    save_config(load_config([f"--out_dir={tmp_path}", "--n_layer=2", "--dataset=${a}", "--batch_size=3"]))
    config = load_config([f"--out_dir={tmp_path}", "--resume", "--batch_size=7"])
    assert (config.n_layer, config.dataset, config.batch_size, config.resume) == (2, "${a}", 7, True)
    with pytest.raises(UserError, match=r"n_layer=3 but the run in .* was trained with n_layer=2"):
        load_config([f"--out_dir={tmp_path}", "--resume", "--n_layer=3"])


@pytest.mark.parametrize("switch", ["--resume", "--eval_only"])
def test_a_run_that_was_moved_goes_on_where_it_is(
    switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not in the folder that its configuration names; nor does it inherit what the command was."""
    save_config(load_config([f"--out_dir={tmp_path}", "--n_layer=2"]))
    (tmp_path / "out").mkdir()
    text = (tmp_path / "config.yaml").read_text()
    text = text.replace("resume: false", "resume: true").replace("eval_only: false", "eval_only: true")
    (tmp_path / "out" / "config.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    config = load_config([switch])
    assert (config.out_dir, config.n_layer) == ("out", 2)
    assert (config.resume, config.eval_only) == (switch == "--resume", switch == "--eval_only")


@pytest.mark.parametrize("switch", ["--resume", "--eval_only"])
def test_nothing_to_go_on_from(tmp_path: Path, switch: str):
    with pytest.raises(UserError, match=f"{switch}: there is no run in"):
        load_config([f"--out_dir={tmp_path}", switch])


def test_both_switches_at_once(tmp_path: Path):
    save_config(load_config([f"--out_dir={tmp_path}"]))
    with pytest.raises(UserError, match="resume and eval_only are both on"):
        load_config([f"--out_dir={tmp_path}", "--resume", "--eval_only"])


@pytest.mark.parametrize("text", ["${", "${b}", "\\${b}", "\\\\${b}", "1e3", "null", "a: b", "~", "é", ""])
def test_any_text_survives_saving(tmp_path: Path, text: str):
    save_config(load_config([f"--out_dir={tmp_path}", f"--dataset={text}"]))
    assert load_config([f"--out_dir={tmp_path}", "--eval_only"]).dataset == text


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ("[", r"cannot be read as a configuration"),
        ("- 1\n- 2\n", r"is not a configuration; .* came something else"),
        ("", r"is not a configuration; .* came an empty file"),
        ("n_layer: 2\n", r"lacks vocab_size, block_size, n_head, n_embd"),
        ("dataset: ${nowhere}\n", r"lacks vocab_size, block_size, n_layer, n_head, n_embd"),
        ("\x00", r"cannot be read as a configuration"),
    ],
)
def test_a_spoilt_saved_configuration(tmp_path: Path, spoilt: str, message: str):
    (tmp_path / "config.yaml").write_text(spoilt)
    with pytest.raises(UserError, match=rf"config\.yaml {message}.*Restore it or train anew\.$") as caught:
        load_config([f"--out_dir={tmp_path}", "--resume"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("n_layer: two", r"config\.yaml: n_layer expects a whole number; came 'two'"),
        ("n_layers: 2", r"config\.yaml: there is no key 'n_layers'\. Did you mean n_layer\?"),
        ("batch_size: ", r"config\.yaml: batch_size expects a whole number; came None"),
        ("min_lr: low", r"config\.yaml: min_lr expects a number; came 'low'"),
    ],
)
def test_a_saved_configuration_edited_by_hand(tmp_path: Path, line: str, message: str):
    path = save_config(load_config([f"--out_dir={tmp_path}"]))
    kept = [row for row in path.read_text().splitlines() if not row.startswith(line.split(":")[0] + ":")]
    path.write_text("\n".join([*kept, line, ""]))
    with pytest.raises(UserError, match=message):
        load_config([f"--out_dir={tmp_path}", "--resume"])


def test_the_example_configs_are_valid():
    examples = sorted((Path(__file__).parents[2] / "config").glob("*.py"))
    assert examples
    for path in examples:
        load_config([str(path)])


def test_the_mark_of_a_missing_value_is_refused():
    with pytest.raises(UserError, match=r"dataset='...' marks a value that is still missing"):
        load_config(["--dataset=???"])
