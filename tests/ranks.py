"""A function run by several ranks, each a process of its own, and what each of them found."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

from processes import begin, server

# After this many seconds ranks that wait for each other say where, and end.
PATIENCE = 300


def on_two_ranks(function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What ``function(rank, *arguments)`` returns on each; ``folder`` is a new one, where they meet."""
    return on_ranks(2, function, folder, *arguments)


def on_ranks(num: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """The same on any number of ranks."""
    server()
    torch.multiprocessing.start_processes(
        _run, (num, function, str(folder), arguments, dict(os.environ)), nprocs=num, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(num)]


def _run(
    rank: int,
    num: int,
    function: Callable[..., Any],
    folder: str,
    arguments: tuple[Any, ...],
    environ: dict[str, str],
) -> None:
    begin(environ)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    torch.set_num_threads(1)
    meeting_point = f"file://{folder}/meeting-point"
    torch.distributed.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=num)
    torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a process group at exit may abort


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def like_torchrun(rank: int, port: int) -> None:
    """Make one of two processes look as if torchrun had started it, which engines ask for."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
