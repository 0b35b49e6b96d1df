"""``TellFindings``: says each finding once, on the terminal, in `log.jsonl` and on the trackers."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from lossmith.modifiers.config import MASTER
from lossmith.training.config.keys import TrainConfig
from lossmith.training.run.findings import History, Limit, find
from lossmith.training.run.progress import LogFile, log_row
from lossmith.training.run.terminal import say

# A metric of a weight and the key of its limit.
CLAMPED = {
    "mask_ratio_weight_enabled": {
        "MaskRatioWeightModifier.min_weight": "mask_ratio_weight_min_weight",
        "MaskRatioWeightModifier.max_weight": "mask_ratio_weight_max_weight",
    },
    "judge_weight_modifier_enabled": {
        "SequenceScoringJudgeWeightModifier.min_factor": "judge_weight_min_factor",
        "SequenceScoringJudgeWeightModifier.max_factor": "judge_weight_max_factor",
    },
}


class TellFindings(TrainerCallback):
    """Looks at every row of the log; comes after the log file and the trackers among the callbacks.

    A resumed run reads what was logged before it, and does not repeat what was said then.

    Args:
        console: where to print.
        log: the run's log.
        tell: the trackers' functions (step, sentence).
        config: the run's configuration.
        before: what was found before the first step, and is on the terminal already.
    """

    def __init__(
        self,
        console: Console,
        log: LogFile,
        tell: Sequence[Callable[[int, str], None]],
        config: TrainConfig,
        before: Sequence[str] = (),
    ):
        self.console = console
        self.log = log
        self.tell = tell
        self.before = before
        self.history = History(config.max_iters, limits_of(config))
        self.said: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        for row in self.log.rows():
            if "finding" in row:
                self.said.add(str(row.get("name", row["finding"])))
            else:
                self.history.add(row)
        for text in self.before:
            self._write(state.global_step, text, text)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        row = log_row(state.global_step, logs or {})
        if row is None or not state.is_world_process_zero:
            return
        self.history.add(row)
        for name, text in find(self.history):
            if self._write(state.global_step, name, text):
                say(self.console, f"finding: {text}", "yellow")

    def say_now(self, step: int, name: str, text: str) -> None:
        """Take a finding that is not of the log's numbers."""
        is_main = not self.console.quiet  # on the other ranks it is
        if is_main and self._write(step, name, text):
            say(self.console, f"finding: {text}", "yellow")

    def _write(self, step: int, name: str, text: str) -> bool:
        """Write a finding down unless it was said before; returns whether it was not."""
        if name in self.said:
            return False
        self.said.add(name)
        self.log.write({"finding": text, "step": step} | ({"name": name} if name != text else {}))
        for tell in self.tell:
            tell(step, text)
        return True


def limits_of(config: TrainConfig) -> tuple[Limit, ...]:
    """What the weights of the modifiers that are switched on are clamped to."""
    if not getattr(config, MASTER):
        return ()
    return tuple(
        Limit(f"loss_modifiers/{metric}", getattr(config, key), key)
        for switch, metrics in CLAMPED.items()
        if getattr(config, switch)
        for metric, key in metrics.items()
    )
