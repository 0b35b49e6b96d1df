"""Ctrl-C ends a run in good order: after the step it is in, with a checkpoint."""

import signal
import threading
from types import FrameType
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from lossmith.training.progress import say


class StopOnSignal(TrainerCallback):
    """While entered, SIGINT and SIGTERM ask the run to save and stop; a second one stops it at once.

    Args:
        console: where to say so.
    """

    def __init__(self, console: Console):
        self.console = console
        self.received: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        # Only the main thread may set handlers; elsewhere the host program keeps its own.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        say(self.console, "Finishing this step and saving; once more to stop at once.", "yellow")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.received is not None:
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True
        elif state.global_step >= state.max_steps:
            control.should_evaluate = False  # the run ends with an evaluation of everything
