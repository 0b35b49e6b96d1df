"""What logging costs: steps of one run of the trainer with and without it, one after the other.

    python benchmarks/log_cost.py [--steps 400] [--loss unified] [--csv FILE]

Every second step of a run with the default sizes is bare: it has the loss, the way back and the optimizer,
and what the trainer needs to stop at numbers that are not finite, but keeps nothing for the log. The others
observe the parts and measures; some of them also write a line, to `log.jsonl`, the terminal and TensorBoard,
with findings; and some of those measure the pull of every part. The cost of logging is that of the medians at
the default intervals, relative to the median of a bare step. What is measured is the processor's time, which
other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from transformers import Trainer, TrainerCallback

from lossmith.training.config.keys import TrainConfig
from lossmith.training.config.reading import load_config
from lossmith.training.data.corpus import load_corpus
from lossmith.training.data.tokenizer import train_tokenizer
from lossmith.training.run.loss_modifiers import add_modifiers
from lossmith.training.run.progress import Display, LogFile
from lossmith.training.run.runner import blocks_to_draw, quiet_libraries
from lossmith.training.run.telling import TellFindings
from lossmith.training.run.trackers import open_trackers
from lossmith.training.run.trainer import TaskTrainer, training_arguments
from lossmith.training.tasks import make_task

BARE, OBSERVED, LINE, PULLS = "bare", "observed", "with a line", "with pulls"
# In this order, so that each kind stands beside bare steps.
CYCLE = (BARE, OBSERVED, BARE, LINE, BARE, OBSERVED, BARE, PULLS)
WARM_UP = 2 * len(CYCLE)
FLAGS = {
    "cross_entropy": [],
    "unified": [
        "--loss=unified",
        "--z_loss=1e-4",
        "--use_mtp",
        "--use_ngram_penalty",
        "--label_smoothing=0.1",
    ],
    "modifiers": ["--loss_modifiers_enabled", "--entropy_modifier_enabled", "--metrics_collector_enabled"],
}


class Alternating(TaskTrainer):
    """A trainer some of whose steps keep nothing for the log."""

    def kind(self) -> str:
        return CYCLE[self.state.global_step % len(CYCLE)]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        attached = self.task.attached  # pyright: ignore[reportAttributeAccessIssue]
        if self.kind() == BARE:
            attached.observe = None
            loss, outputs = Trainer.compute_loss(
                self, model, {**inputs, "denominator": num_items_in_batch}, True, num_items_in_batch
            )
            self.finite.see(loss)
            return (loss, outputs) if return_outputs else loss
        attached.observe = self.task.observed  # pyright: ignore[reportAttributeAccessIssue]
        self.pull_interval = int(self.kind() == PULLS)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Clock(TrainerCallback):
    """The processor's seconds of each step by its kind, a line that it writes included."""

    def __init__(self) -> None:
        self.trainer: Alternating | None = None
        self.seconds: dict[str, list[float]] = {kind: [] for kind in CYCLE}
        self.last: tuple[str, float] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.trainer is not None
        now = time.process_time()
        if self.last is not None and state.global_step > WARM_UP:
            kind, begin = self.last
            self.seconds[kind].append(now - begin)
        self.last = self.trainer.kind(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.last is not None
        control.should_log = self.last[0] in (LINE, PULLS)
        control.should_evaluate = control.should_save = False


def measure(loss: str, num_steps: int, folder: str) -> dict[str, list[float]]:
    """The processor's seconds of the steps of a run."""
    out = f"--out_dir={folder}"
    config = load_config([out, f"--max_iters={num_steps}", "--tensorboard_log", "--device=cpu", *FLAGS[loss]])
    args = training_arguments(config)
    args.logging_strategy = args.eval_strategy = args.save_strategy = "no"
    corpus = load_corpus(config.dataset)
    tokenizer = train_tokenizer(corpus, config.vocab_size)
    transformers.set_seed(config.seed)
    task = make_task(config, corpus, tokenizer, blocks_to_draw(config, args))
    add_modifiers(task, "cpu", "float32")
    model, clock = task.make_model(), Clock()
    console = Console(file=io.StringIO(), width=140)
    with open_trackers(config, 0, is_main=True) as trackers:
        log = LogFile(Path(folder) / "log.jsonl")
        findings = TellFindings(console, log, [tracker.tell for tracker in trackers], config)
        watchers = [clock, *trackers, log, Display(console, task), findings]
        clock.trainer = Alternating(task, model, args, watchers)
        clock.trainer.train()
    return clock.seconds


def cost_of(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median of each kind in ms, and what logging adds at the default intervals, as a share of a step."""
    ms = {kind: 1e3 * statistics.median(values) for kind, values in seconds.items()}
    line = (ms[LINE] - ms[OBSERVED]) / TrainConfig.log_interval
    pulls = (ms[PULLS] - ms[LINE]) / TrainConfig.pull_interval
    return {**ms, "cost": (ms[OBSERVED] - ms[BARE] + line + pulls) / ms[BARE]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--loss", choices=FLAGS, action="append")
    parser.add_argument("--csv", type=Path)
    asked = parser.parse_args()
    rows = []
    for loss in asked.loss or FLAGS:
        with tempfile.TemporaryDirectory() as folder, quiet_libraries():
            found = cost_of(measure(loss, asked.steps, folder))
        rows.append({"loss": loss, **{name: f"{value:.4g}" for name, value in found.items()}})
        said = "  ".join(f"{kind} {found[kind]:.1f} ms" for kind in dict.fromkeys(CYCLE))
        print(f"{loss:<14} {said}  logging {found['cost']:+.2%} of a step")
    if asked.csv:
        with asked.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
