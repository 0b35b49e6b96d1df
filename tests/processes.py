"""Processes of their own, forked by a server that has imported PyTorch and transformers once for all."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

# What the server imports, where it is installed.
IMPORTED = [
    "torch.distributed.tensor",
    "hypothesis",
    "pytest",
    "transformers.trainer",
    "lossmith.training.run.runner",
]


def server() -> ForkServerContext:
    """What forks processes; it begins with the first of them."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    return multiprocessing.get_context("forkserver")


def started(function: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
    """A process that calls a function; ``join`` waits for its end, and ``exitcode`` is how it ended."""
    process = server().Process(target=_call, args=(dict(os.environ), function, arguments), daemon=False)
    process.start()
    return process


def started_script(script: Path, flags: list[str], shown: Path, complaints: Path) -> ForkServerProcess:
    """What ``python script flags`` begins in the script's folder; it writes to two files."""
    return started(_run_script, script, flags, shown, complaints)


def begin(environ: dict[str, str]) -> None:
    """Have this environment, where the server has that of its own beginning."""
    gc.freeze()  # what was imported stays
    os.environ.clear()
    os.environ |= environ


def _call(environ: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    begin(environ)
    function(*arguments)


def _run_script(script: Path, flags: list[str], shown: Path, complaints: Path) -> None:
    for number, path in ((1, shown), (2, complaints)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(script.parent)
    sys.argv = [script.name, *flags]
    runpy.run_path(script.name, run_name="__main__")
