"""What is compiled: the C++ sources of this folder, built into one library on this machine when first used.

``LOSSMITH_NATIVE=0`` turns it off, and PyTorch's operations take over.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_log = logging.getLogger(__name__)
_SOURCES = [Path(__file__).with_name(name) for name in ("rows_native.cpp", "products_native.cpp")]
_HEADERS = [Path(__file__).with_name("lanes_native.h")]
# No contraction: forward and backward must round a logit over its temperature alike.
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-pthread", "-ffp-contract=off"]
# OpenMP is compiled against but not linked: its symbols are then found in the runtime that
# PyTorch has loaded. Where they are not, that build does not load, and the next one brings threads.
_VARIANTS = (["-fopenmp"], [])
_COMPILERS = ("g++", "clang++", "c++")
# A build takes seconds; a compiler that hangs must not hold up a training step for long.
_PATIENCE_S = 30


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, built on first use and kept; None where it cannot be built."""
    if os.environ.get("LOSSMITH_NATIVE", "1") == "0" or sys.platform == "win32":
        return None
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        _log.info(
            "no C++ compiler found; PyTorch operations take over, and rows take about three times as long"
        )
        return None
    failures: list[Exception] = []
    for variant in _VARIANTS:
        try:
            loaded = _load(_build(shlex.split(compiler), [*_FLAGS, *variant]))
            if failures:
                _log.info(
                    "built without OpenMP: rows have threads of their own, products are PyTorch's: %s",
                    failures,
                )
            return loaded
        except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:  # noqa: PERF203
            failures.append(error)
    _log.info("the C++ sources could not be built; PyTorch operations take over: %s", failures)
    return None


def _load(path: Path) -> ctypes.CDLL:
    """The library at ``path``; a file that is none is removed, so that the next process builds it anew."""
    try:
        loaded = ctypes.CDLL(str(path))
        _ = loaded.lossmith_sweep
    except (OSError, AttributeError):
        path.unlink(missing_ok=True)
        raise
    return loaded


def _build(compiler: list[str], flags: list[str]) -> Path:
    """Compile the sources unless this machine's build of it is there; another CPU builds its own."""

    def call(*arguments: str) -> bytes:
        command = [*compiler, *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=_PATIENCE_S).stdout

    linking = ["-shared", "-pthread"]
    command = shlex.join([*compiler, *flags, *linking]).encode()
    made_of = [
        *(source.read_bytes() for source in _SOURCES + _HEADERS),
        call("--version"),
        command,
        _processor(),
    ]
    directory = _cache_directory()
    target = directory / f"lossmith-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"
    if not target.exists():
        _log.info("compiling into %s", target)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            objects = [str(Path(scratch) / f"{source.stem}.o") for source in _SOURCES]
            for source, compiled in zip(_SOURCES, objects, strict=True):
                call(*flags, "-c", str(source), "-o", compiled)
            linked = Path(scratch) / target.name
            call(*linking, *objects, "-o", str(linked))
            linked.replace(target)  # atomic: another process may be building the same
    return target


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join([platform.machine(), *kinds[:2]]).encode()


def _cache_directory() -> Path:
    """Where builds are kept: the user's cache, or a directory of this process if there is none."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    directory = Path(home) / "lossmith"
    try:
        if directory.is_absolute():
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(directory, os.W_OK):
                return directory
    except OSError:
        pass
    private = tempfile.mkdtemp(prefix="lossmith-")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return Path(private)
