"""Ctrl-C ends a run after the current step, with a checkpoint."""

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback

from lossmith.training.run.terminal import say

REPEATED_S = 1.0


class StopOnSignal(TrainerCallback):
    """While entered, SIGINT and SIGTERM ask the run to save and stop; a second one stops it at once."""

    def __init__(self, console: Console):
        self.console = console
        self.received: int | None = None
        self.received_at = 0.0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        # Only the main thread may set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()
            say(self.console, "Finishing this step and saving; once more to stop at once.", "yellow")
        elif time.monotonic() - self.received_at > REPEATED_S:
            raise KeyboardInterrupt
        # Otherwise it is the same Ctrl-C, which a rank gets from the terminal and from torchrun.

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.received = on_any_rank(self.received, args)
        if self.received is not None:
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True


def on_any_rank(received: int | None, args: Any) -> int | None:
    """The signal that any rank received, so that all of them stop after the same step."""
    if args.world_size == 1:
        return received
    number = torch.tensor(received or 0, device=args.device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return int(number) or None
