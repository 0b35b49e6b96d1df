"""How the benchmarks measure: interleaved in one run, medians, ratios; memory in processes of its own.

The machines are shared and noisy, so absolute times mean little and ratios within one run a
lot. Every round times each contender once, in turn, so that a slow second hits all alike.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable

import torch

Step = Callable[[], object]


def time_interleaved(steps: dict[str, Step], *, rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each step over ``rounds``, after two calls to warm up (and compile)."""
    for step in steps.values():
        for _ in range(2):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory_mb(make_step: Callable[..., Step], *args: object, device: str) -> float:
    """MiB that one step needs on top of its inputs, in a fresh process on a CPU."""
    if device != "cpu":
        step = make_step(*args)
        step()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(theirs, make_step, args))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _measure_peak(pipe: object, make_step: Callable[..., Step], args: tuple) -> None:
    step = make_step(*args)
    step()  # imports, thread pools, compiled code
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak starts again from what is held now
    before = _kib("VmRSS")
    step()
    pipe.send((_kib("VmHWM") - before) / 1024)  # type: ignore[attr-defined]


def _kib(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine(device: str) -> str:
    """The machine and versions, in a line."""
    if device == "cpu":
        name = platform.processor() or platform.machine()
        with open("/proc/cpuinfo") as info:
            name = next(
                (line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), name
            )
        name = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    else:
        name = torch.cuda.get_device_name()
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
