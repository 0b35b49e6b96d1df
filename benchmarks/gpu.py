"""Everything that only a GPU can show, in one command of less than ten minutes.

    python benchmarks/gpu.py [--out DIR] [--only logits|heads|ceilings] [--rounds 10] [--no-tests]
    python benchmarks/gpu.py --device cpu --tiny        (a dry run of the script itself)

Ceilings first (what a copy and the three matrix products reach), then ``tests/gpu``, then the losses:
given logits, and linear heads. Rounds are interleaved; ``ms`` is the median between two events on the
stream, ``wall ms`` the host's clock around an eager step, ``graph ms`` the replay of a captured one.
Errors are the largest difference from the same loss in fp64, relative to its largest value.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_contenders import FOUR, HEADS, LOGITS, Case, make
from harness import machine, write_rows

LOGITS_SHAPES = [(8192, 32000), (8192, 50257), (8192, 131072)]
HEAD_SHAPES = [(8192, 4096, 131072), (8192, 2048, 50257), (16384, 4096, 32000)]
TINY_LOGITS, TINY_HEADS = [(64, 331)], [(64, 16, 331)]
COLUMNS = (
    "shape", "name", "ms", "x floor", "graph ms", "wall ms", "launches", "extra MiB", "loss error",
    "gradient error",
)  # fmt: skip
# Rows of the fp64 reference that are computed at a time.
BLOCK = 512


@dataclass
class Clock:
    """Times steps on a device.

    Attributes:
        device: its name.
        rounds: how often each step is timed.
    """

    device: str
    rounds: int

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def once(self, step: Callable[[], object]) -> tuple[float, float]:
        """Milliseconds between two events, and of the host's clock."""
        self.wait()
        begin = time.perf_counter()
        if not self.is_gpu:
            step()
            wall = (time.perf_counter() - begin) * 1e3
            return wall, wall
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        step()
        last.record()
        self.wait()
        return first.elapsed_time(last), (time.perf_counter() - begin) * 1e3

    def interleaved(self, steps: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float]]:
        """The medians of each step over the rounds."""
        for step in steps.values():
            for _ in range(3):
                step()
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for _ in range(self.rounds):
            for name, step in steps.items():
                seen[name].append(self.once(step))
        return {name: tuple(torch.tensor(times).median(0).values.tolist()) for name, times in seen.items()}

    def replayed(self, step: Callable[[], object]) -> float | str:
        """Milliseconds of the replay of a captured step, or why there is none."""
        if not self.is_gpu:
            return ""
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        except Exception as error:  # a peer that synchronises
            torch.cuda.synchronize()
            return type(error).__name__
        times = sorted(self.once(graph.replay)[0] for _ in range(self.rounds))
        return times[len(times) // 2]

    def launches(self, step: Callable[[], object]) -> int | str:
        """Kernels of one step, as the profiler sees them."""
        if not self.is_gpu:
            return ""
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profiler:
            step()
            self.wait()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())

    def extra_mib(self, step: Callable[[], object]) -> float | str:
        """What a step takes besides what is there when it begins and the gradients that it leaves."""
        if not self.is_gpu:
            return ""
        step()
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def reference(case: Case, options: dict[str, float]) -> tuple[float, list[Tensor]]:
    """The loss with these options in fp64, and its gradients by the case's leaves, a block at a time."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in case.leaves]
    total = 0.0
    for start in range(0, case.num_tokens, BLOCK):
        rows = slice(start, start + BLOCK)
        z = leaves[0][rows] if len(leaves) == 1 else leaves[0][rows] @ leaves[1].T
        loss = _naive(z, case.targets[rows], options) / case.num_tokens
        loss.backward()
        total += loss.item()
    return total, [leaf.grad for leaf in leaves]  # type: ignore[misc]


def _naive(z: Tensor, targets: Tensor, options: dict[str, float]) -> Tensor:
    eps, gamma = options.get("label_smoothing", 0.0), options.get("focal_gamma", 0.0)
    log_p = z.log_softmax(-1)
    own = log_p.gather(1, targets[:, None]).squeeze(1)
    loss = F.cross_entropy(z, targets, label_smoothing=eps, reduction="none")
    loss = (-torch.expm1(own)) ** gamma * loss if gamma else loss
    loss = loss + options.get("z_loss", 0.0) * z.logsumexp(-1).square()
    return (loss + options.get("confidence_penalty", 0.0) * (log_p.exp() * log_p).sum(-1)).sum()


def errors(
    case: Case, step: Callable[[], object], expected: tuple[float, list[Tensor]]
) -> tuple[float, float]:
    """Relative errors of the loss and, the worst of them, of the gradients."""
    value, gradients = expected
    found = step()
    assert isinstance(found, Tensor)
    of_loss = abs(found.item() - value) / abs(value)
    worst = 0.0
    for leaf, gradient in zip(case.leaves, gradients, strict=True):
        assert leaf.grad is not None
        blocks = zip(leaf.grad.split(BLOCK), gradient.split(BLOCK), strict=True)
        largest = max((ours.double() - theirs).abs().max().item() for ours, theirs in blocks)
        worst = max(worst, largest / gradient.abs().max().item())
    return of_loss, worst


def tried(name: str, case: Case) -> Callable[[], object] | None:
    """A contender's step; None, and a line, where it is not installed, too new or out of memory."""
    try:
        step = make(name, case)
        step()
    except Exception as error:
        print(f"  {name} is left out: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        return None
    return step


def measure(case: Case, names: list[str], floor: tuple[str, float], clock: Clock) -> Iterator[list]:
    """A row for each contender that is installed, against the floor."""
    steps = {name: step for name in names if (step := tried(name, case)) is not None}
    expected = {"plain": reference(case, {}), "all four": reference(case, FOUR)}
    yield [case.shape, floor[0], floor[1], 1.0, *[""] * 6]
    for name, (ms, wall) in clock.interleaved(steps).items():
        step = steps[name]
        kind = next((kind for kind in expected if name.endswith(kind)), None)
        wrong = ("", "") if kind is None else errors(case, step, expected[kind])
        ratio = ms / floor[1]
        rest = (clock.replayed(step), wall, clock.launches(step), clock.extra_mib(step))
        yield [case.shape, name, ms, ratio, *rest, *wrong]


def clone_ms(num_bytes: int, clock: Clock) -> float:
    """How long reading and writing ``num_bytes`` together takes."""
    source = torch.empty(max(num_bytes // 2, 1), dtype=torch.uint8, device=clock.device)
    return clock.interleaved({"clone": source.clone})["clone"][0]


def products_ms(case: Case, clock: Clock) -> float:
    """How long the three products of a head take."""
    hidden, weight = (leaf.detach() for leaf in case.leaves)
    logits = hidden @ weight.T

    def step() -> None:
        torch.mm(hidden, weight.T, out=logits)
        logits @ weight
        logits.T @ hidden

    return clock.interleaved({"products": step})["products"][0]


def ceilings(chosen: argparse.Namespace, clock: Clock) -> None:
    size = 2**20 if chosen.tiny else 2**32
    print(f"  a copy: {size / clone_ms(size, clock) / 1e9:.2f} TB/s, read and written")
    n = 64 if chosen.tiny else 8192
    a = torch.randn(n, n, device=clock.device, dtype=torch.bfloat16)
    ms = clock.interleaved({"mm": lambda: a @ a})["mm"][0]
    print(f"  a product of {n} x {n} x {n} in bf16: {2 * n**3 / ms / 1e9:.1f} TFLOP/s")


def show(row: list) -> None:
    shape, name, *rest = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row)
    print(f"{shape:22}{name:34}" + "".join(f"{cell:>15}" for cell in rest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results", help="folder of the CSV")
    parser.add_argument("--only", choices=("ceilings", "logits", "heads"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--no-tests", action="store_true")
    chosen = parser.parse_args()
    clock = Clock(chosen.device, chosen.rounds)
    print(machine(chosen.device))
    if chosen.only in (None, "ceilings"):
        ceilings(chosen, clock)
    if chosen.only is None and not chosen.no_tests:
        subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/gpu"], check=False)
    rows = []
    cases: list[tuple[Case, list[str]]] = []
    if chosen.only in (None, "logits"):
        cases += [(Case(s, chosen.device), LOGITS) for s in (TINY_LOGITS if chosen.tiny else LOGITS_SHAPES)]
    if chosen.only in (None, "heads"):
        cases += [(Case(s, chosen.device), HEADS) for s in (TINY_HEADS if chosen.tiny else HEAD_SHAPES)]
    for case, names in cases:
        case.fill()
        if case.is_head:
            floor = ("three bf16 products", products_ms(case, clock))
        else:
            floor = ("6 bytes an element", clone_ms(6 * case.leaves[0].numel(), clock))
        show(list(COLUMNS))
        for row in measure(case, names, floor, clock):
            show(row)
            rows.append(row)
        case.empty()
    if rows:
        path = Path(chosen.out) / f"gpu-{chosen.device}.csv"
        write_rows(path, machine(chosen.device), list(COLUMNS), rows)
        print(f"written to {path}")


if __name__ == "__main__":
    main()
