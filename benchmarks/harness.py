"""How the benchmarks measure: interleaved in one run, medians, ratios; memory in processes of its own.

The machines are shared and noisy, so absolute times mean little and ratios within one run a
lot. Every round times each contender once, in turn, so that a slow second hits all alike.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

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


def against_first(
    title: str, names: Iterable[str], make_step: Callable[..., Step], *args: object, rounds: int, device: str
) -> list[list]:
    """Time and memory of each ``make_step(name, *args)`` against the first: [name, ms, ratio, MiB]."""
    steps = {name: make_step(name, *args) for name in names}
    seconds = time_interleaved(steps, rounds=rounds, device=device)
    first = next(iter(steps))
    del steps
    print(f"\n{title}: forward and backward")
    print(f"  {'':34}{'ms':>9}{'ratio':>9}{'extra MiB':>11}")
    rows = []
    for name, value in seconds.items():
        memory = peak_memory_mb(make_step, name, *args, device=device)
        print(f"  {name:34}{value * 1e3:9.1f}{value / seconds[first]:9.2f}{memory:11.0f}")
        rows.append([name, value * 1e3, value / seconds[first], memory])
    return rows


def over_dtypes(
    shape: list[int], names: Iterable[str], make_step: Callable[..., Step], chosen: argparse.Namespace
) -> list[list]:
    """:func:`against_first` of ``make_step(name, dtype, device)`` in fp32 and bf16: [dtype, ...]."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        title, device = f"logits {shape}, {dtype}", chosen.device
        found = against_first(title, names, make_step, dtype, device, rounds=chosen.rounds, device=device)
        rows += [[dtype, *row] for row in found]
    return rows


def options(description: str, rounds: int = 15) -> argparse.Namespace:
    """The options of a benchmark, taken from the command line; sets the number of threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", help="also write the rows to this file")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(machine(chosen.device))
    return chosen


def write_csv(chosen: argparse.Namespace, header: list[str], rows: list[list]) -> None:
    """Write the rows where ``--csv`` says, with the machine in the first line."""
    if chosen.csv:
        write_rows(Path(chosen.csv), machine(chosen.device), header, rows)


def write_rows(path: Path, comment: str, header: list[str], rows: list[list]) -> None:
    """Write a table, a comment in its first line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["# " + comment])
        writer.writerow(header)
        writer.writerows(rows)


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
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda or torch.version.hip}{_driver()}"
    return f"{name}; torch {torch.__version__}{_triton()}, Python {platform.python_version()}"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return f", driver {subprocess.run(query, capture_output=True, text=True).stdout.split()[0]}"
    except (OSError, IndexError):
        return ""


def _triton() -> str:
    try:
        return f", Triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
