"""Ctrl-C: the first one lets the step finish, the second one does not, and the handlers go back."""

import io
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from rich.console import Console

from lossmith.training.run import interrupt
from lossmith.training.run.interrupt import REPEATED_S, StopOnSignal, on_any_rank

ONE_RANK = SimpleNamespace(world_size=1, device="cpu")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that a test moves on."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def stop() -> StopOnSignal:
    return StopOnSignal(Console(file=io.StringIO()))


def control() -> Any:
    return SimpleNamespace(should_save=False, should_evaluate=True, should_training_stop=False)


def test_handlers_are_those_of_before_once_it_is_left(stop: StopOnSignal):
    def own(number: int, frame: object) -> None: ...

    def a_run_that_fails() -> None:
        with stop:
            assert [signal.getsignal(number) for number in SIGNALS] == [stop.receive] * 2
            raise RuntimeError

    before = [signal.signal(number, own) for number in SIGNALS]
    try:
        with pytest.raises(RuntimeError):
            a_run_that_fails()
        assert [signal.getsignal(number) for number in SIGNALS] == [own, own]
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_without_a_signal_a_run_goes_on(stop: StopOnSignal):
    asked = control()
    stop.on_step_end(ONE_RANK, None, asked)
    assert asked == control()


def test_the_first_signal_asks_the_run_to_save_and_stop(stop: StopOnSignal):
    stop.receive(signal.SIGTERM, None)
    asked = control()
    stop.on_step_end(ONE_RANK, None, asked)
    assert asked == SimpleNamespace(should_save=True, should_evaluate=False, should_training_stop=True)
    assert stop.received == signal.SIGTERM


def test_a_second_one_stops_at_once(stop: StopOnSignal, clock: SimpleNamespace):
    stop.receive(signal.SIGINT, None)
    clock.now += 2 * REPEATED_S
    with pytest.raises(KeyboardInterrupt):
        stop.receive(signal.SIGINT, None)


def test_the_same_one_may_come_twice(stop: StopOnSignal, clock: SimpleNamespace):
    """From the terminal and from torchrun."""
    stop.receive(signal.SIGINT, None)
    clock.now += REPEATED_S / 2
    stop.receive(signal.SIGTERM, None)
    assert stop.received == signal.SIGINT


@pytest.mark.parametrize(("mine", "other"), [(None, signal.SIGTERM), (signal.SIGINT, 0), (None, 0)])
def test_all_ranks_stop_when_one_of_them_is_told_to(
    mine: int | None, other: int, monkeypatch: pytest.MonkeyPatch
):
    def all_reduce(number: torch.Tensor, op: Any) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        number.fill_(max(int(number), other))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    two_ranks = SimpleNamespace(world_size=2, device="cpu")
    assert on_any_rank(mine, two_ranks) == (max(mine or 0, other) or None)
