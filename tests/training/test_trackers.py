"""What TensorBoard and Weights & Biases get besides numbers: configuration, pulls, sample."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from running import go

from lossmith.training.config.reading import load_config
from lossmith.training.run.trackers import hyperparameters

PARTS = ["--loss=unified", "--z_loss=1e-3", "--pull_interval=3", "--log_interval=2"]


def test_tensorboard(tiny: list[str], tmp_path: Path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run" / "tensorboard"
    for more in ([], ["--resume", "--max_iters=8"]):
        go([*tiny, *PARTS, "--tensorboard_log", *more])
    events = accumulators.EventAccumulator(str(folder)).Reload()
    assert {event.step for event in events.Scalars("pull/z_loss")} == {4, 6}
    assert all(-1.001 <= event.value <= 1.001 for event in events.Scalars("pull_cosine/z_loss"))
    assert {name for name in events.summary_metadata if name.startswith("_hparams_")}
    texts = accumulators.EventAccumulator(str(folder / "texts")).Reload()
    assert set(texts.Tags()["tensors"]) == {"configuration/text_summary", "sample/text_summary"}
    said = texts.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    z_loss: 0.001" in said
    assert {event.step for event in texts.Tensors("sample/text_summary")} == {6, 8}


def test_hyperparameters_are_the_keys_that_differ(tiny: list[str]):
    found = hyperparameters(load_config([*tiny, *PARTS, "--target_smoothing_special_tokens=[0]"]))
    assert (found["loss"], found["z_loss"], found["batch_size"]) == ("unified", 1e-3, 4)
    assert found["target_smoothing_special_tokens"] == "(0,)"
    assert not {"out_dir", "weight_decay"} & {*found}


def test_weights_and_biases(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged: list[tuple[int, dict]] = []
    given: dict = {}

    class Run:
        def log(self, values: dict, step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            pass

    monkeypatch.setattr(wandb, "init", lambda **options: given.update(options) or Run())
    go([*tiny, *PARTS, "--wandb_log"])
    assert (given["config"]["z_loss"], given["config"]["pull_interval"]) == (1e-3, 3)
    keys = {key for _, values in logged for key in values}
    assert {"pull/z_loss", "pull_cosine/z_loss", "loss/z_loss", "val/loss", "sample"} <= keys
    (sample,) = [values["sample"] for _, values in logged if "sample" in values]
    assert isinstance(sample, str)
    json.dumps(logged)  # plain values alone
