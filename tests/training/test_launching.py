"""Runs that launchers start: the files in examples/launch, and what accelerate launch asks for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from running import go, rows, weights

from lossmith.training.errors import UserError
from lossmith.training.run.launcher import OTHER_ENGINES, require_data_parallel

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"


@pytest.mark.parametrize("variable", OTHER_ENGINES)
def test_another_engine_is_refused(variable: str, tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(
        UserError, match=rf"asks for {OTHER_ENGINES[variable]}, but .*script with LossTrainer"
    ):
        go(tiny)


def test_a_compiler_that_nobody_knows_of_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    require_data_parallel(compiles=True)
    with pytest.raises(UserError, match=r"torch\.compile \(inductor\), but compile=False.*--compile"):
        require_data_parallel(compiles=False)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    require_data_parallel(compiles=False)


def test_the_files_are_read_by_those_that_they_are_for():
    from accelerate.commands.config.config_args import ClusterConfig

    given = yaml.safe_load((LAUNCH / "accelerate.yaml").read_text())
    assert ClusterConfig.from_yaml_file(LAUNCH / "accelerate.yaml").num_machines == given["num_machines"]
    assert json.loads((LAUNCH / "deepspeed_zero2.json").read_text())["zero_optimization"]["stage"] == 2
    for name in ("torchrun.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", LAUNCH / name], check=True)


ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
HERE = ("--num_machines=1", "--num_processes=2", "--main_process_ip=localhost", "--main_process_port=0")
LAUNCHERS = {
    "torchrun": [LAUNCH / "torchrun.sh"],
    "accelerate": [*ACCELERATE, "--config_file", LAUNCH / "accelerate.yaml", *HERE, "--mixed_precision=no"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_what_one_does_with_twice_the_batch(
    launcher: str, tiny: list[str], tmp_path: Path
):
    flags = [*tiny, "--dropout=0"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"GPUS": "2", "PORT": "0", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(
        [*LAUNCHERS[launcher], ROOT / "train.py", *flags, f"--out_dir={tmp_path / 'two'}"],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert go([*flags, f"--out_dir={tmp_path / 'one'}", "--batch_size=8"])[0] == 0
    for folder in ("one", "two"):
        assert rows(tmp_path / folder)[-1]["step"] == 6
    mine, theirs = weights(tmp_path / "one" / "checkpoint-6"), weights(tmp_path / "two" / "checkpoint-6")
    for name, value in mine.items():
        assert value.allclose(theirs[name], rtol=1e-4, atol=1e-6), name
