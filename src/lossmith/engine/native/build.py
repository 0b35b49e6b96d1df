"""What is compiled: the C++ sources of this folder, built into one library on this machine when first used.

Builds are kept in the user's cache, and loaded from there only if no other user can have written them and
they are byte for byte what the compiler made. ``LOSSMITH_NATIVE=0`` turns it all off, and PyTorch's
operations take over; ``LOSSMITH_CXXFLAGS`` are further flags for compiling and linking.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger(__name__)
_SOURCES = [
    Path(__file__).with_name(f"{name}_native.cpp") for name in ("rows", "tokens", "cross_entropy", "products")
]
_HEADERS = [Path(__file__).with_name(f"{name}_native.h") for name in ("lanes", "rows", "tokens", "family")]
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
    folders = _Folders()
    for variant in _VARIANTS:
        try:
            own = shlex.split(os.environ.get("LOSSMITH_CXXFLAGS", ""))
            loaded = _load(_Build(shlex.split(compiler), [*_FLAGS, *variant], own), folders)
            if failures:
                _log.info(
                    "built without OpenMP: rows have threads of their own, products are PyTorch's: %s",
                    failures,
                )
            return loaded
        except (OSError, ValueError, subprocess.SubprocessError) as error:  # noqa: PERF203
            failures.append(error)
    _log.info("the C++ sources could not be built; PyTorch operations take over: %s", failures)
    return None


def _load(build: _Build, folders: _Folders) -> ctypes.CDLL:
    """A build from the cache, made first if it is not there. Where it cannot be loaded, because the file
    system forbids execution, say, a copy is loaded from the first private folder where it can."""
    privates = folders.privates()
    folder = folders.cache or next(privates, None)
    if folder is None:
        raise FileNotFoundError("there is no folder to compile into")
    made = build.in_folder(folder)
    try:
        return ctypes.CDLL(str(made))
    except OSError as error:
        for private in privates:
            with contextlib.suppress(OSError):
                loaded = ctypes.CDLL(str(shutil.copy(made, private)))
                _log.info(
                    "%s can be kept but not loaded there (%s); loaded a copy of this process's own",
                    made,
                    error,
                )
                return loaded
        raise


class _Build:
    """The sources as one compiler makes a library of them on this machine.

    Args:
        compiler: the command.
        flags: for compiling.
        own: the user's, for compiling and linking.
    """

    def __init__(self, compiler: list[str], flags: list[str], own: list[str]) -> None:
        self.compiler = compiler
        self.compiling, self.linking = [*flags, *own], ["-shared", "-pthread", *own]
        command = shlex.join([*compiler, *self.compiling, *self.linking]).encode()
        sources = (source.read_bytes() for source in _SOURCES + _HEADERS)
        made_of = [*sources, self._call("--version"), command, _processor()]  # another CPU builds its own
        self.name = f"lossmith-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}"

    def in_folder(self, folder: Path) -> Path:
        """The library in this folder, compiled unless it is there."""
        for found in sorted(folder.glob(f"{self.name}-*.so")):
            if self._is_sound(found):
                return found
            _log.info("%s is not what was built; it is built again", found)
        _log.info("compiling into %s", folder)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            objects = [str(Path(scratch) / f"{source.stem}.o") for source in _SOURCES]
            for source, compiled in zip(_SOURCES, objects, strict=True):
                self._call(*self.compiling, "-c", str(source), "-o", compiled)
            linked = Path(scratch) / "linked.so"
            self._call(*self.linking, *objects, "-o", str(linked))
            linked.chmod(0o600)  # whatever the umask is
            target = folder / self._name_of(linked)
            linked.replace(target)  # atomic: another process may be building the same
        return target

    def _is_sound(self, path: Path) -> bool:
        """Whether it is ours, and all that was built: a file that was cut short would end the process."""
        try:
            return _is_ours(path) and path.name == self._name_of(path)
        except OSError:
            return False

    def _name_of(self, path: Path) -> str:
        """What a library with the bytes at ``path`` is called."""
        return f"{self.name}-{hashlib.sha256(path.read_bytes()).hexdigest()}.so"

    def _call(self, *arguments: str) -> bytes:
        command = [*self.compiler, *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=_PATIENCE_S).stdout


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join([platform.machine(), *kinds[:2]]).encode()


class _Folders:
    """Where builds are kept."""

    @functools.cached_property
    def cache(self) -> Path | None:
        """The user's cache; None where other users can write to it."""
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        folder = Path(home) / "lossmith"
        if not folder.is_absolute():
            return None
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            is_ours = _is_ours(folder)
        except OSError:
            return None
        if not is_ours:
            _log.warning(
                "%s does not belong to this user alone (owner, or mode: group and others must not write "
                "there), so that nothing is loaded from it; compiling for this process alone",
                folder,
            )
        return folder if is_ours and os.access(folder, os.W_OK) else None

    def privates(self) -> Iterator[Path]:
        """Folders of this process alone, wherever one can be made; not everywhere may files be executed."""
        for place in dict.fromkeys((tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR"), "/dev/shm")):
            with contextlib.suppress(OSError):
                folder = tempfile.mkdtemp(prefix="lossmith-", dir=place)
                atexit.register(shutil.rmtree, folder, ignore_errors=True)
                yield Path(folder)


def _is_ours(path: Path) -> bool:
    """Whether a file or folder, no link, belongs to this user, and no other user can write to it."""
    found = path.lstat()
    is_plain = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return is_plain and found.st_uid == os.geteuid() and not found.st_mode & 0o022
