"""The library of compiled sources: built with care, done without where it cannot be had."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lossmith
from lossmith.engine.native import build
from slow_but import slow_but

needs_compiler = pytest.mark.skipif(build.library() is None, reason="no C++ compiler here")


@pytest.fixture
def fresh_library():
    """Let the test decide whether and where the library is built."""
    build.library.cache_clear()
    yield
    build.library.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def a_compiler_that_remembers(tmp_path_factory):
    """What it makes of the same source and flags it makes once, for these tests are of where that is kept."""
    folder, run = tmp_path_factory.mktemp("objects"), subprocess.run
    kept: dict[tuple[str, ...], Path] = {}

    def remembering(command, **options):
        if "-c" not in command or "-o" not in command:
            return run(command, **options)
        *what, path = command
        if tuple(what) in kept:
            shutil.copyfile(kept[tuple(what)], path)
            return subprocess.CompletedProcess(command, 0, b"", b"")
        done = run(command, **options)
        kept[tuple(what)] = Path(shutil.copyfile(path, folder / f"{len(kept)}.o"))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build.subprocess, "run", remembering)
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory, a_compiler_that_remembers) -> Path:
    """A cache with a build in it, which takes the compiler less time than a fast one."""
    home = tmp_path_factory.mktemp("cache")
    build.library.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.setenv("LOSSMITH_CXXFLAGS", "-O0")
        assert build.library() is not None
    build.library.cache_clear()
    return home / "lossmith"


@pytest.fixture
def cache(built, monkeypatch, tmp_path) -> Path:
    """A cache of this test's own, with a build in it."""
    folder = tmp_path / "home" / "lossmith"
    shutil.copytree(built, folder)
    folder.chmod(0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent))
    monkeypatch.setenv("LOSSMITH_CXXFLAGS", "-O0")
    return folder


@pytest.fixture
def compilations(monkeypatch) -> list[list[str]]:
    """The compiler's runs that produce something."""
    found, run = [], subprocess.run

    def recorded(command, **options):
        if "-c" in command:
            found.append(command)
        return run(command, **options)

    monkeypatch.setattr(build.subprocess, "run", recorded)
    return found


def loaded_from() -> Path:
    compiled = build.library()
    assert compiled is not None
    return Path(compiled._name).parent


@pytest.mark.parametrize("variable", [("LOSSMITH_NATIVE", "0"), ("CXX", "/nowhere/c++"), ("CXX", "false")])
def test_without_a_compiler_pytorch_takes_over(monkeypatch, fresh_library, variable, tmp_path, caplog):
    monkeypatch.setenv(*variable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    logits, targets = torch.randn(4, 9), torch.randint(9, (4,))
    with caplog.at_level(logging.INFO, logger="lossmith"):
        loss = lossmith.cross_entropy(logits, targets)
    assert build.library() is None
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, targets))
    if variable[0] == "CXX":
        assert "could not be built" in caplog.text


def test_a_command_that_cannot_be_read_is_no_compiler(monkeypatch, fresh_library, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "g++ '")
    assert build.library() is None


def test_without_an_absolute_home_nothing_lands_in_the_working_directory(
    monkeypatch, fresh_library, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setenv("LOSSMITH_CXXFLAGS", "-O0")
    build.library()
    assert not list(tmp_path.iterdir())


# -- where it is kept, and what is loaded from there -------------------------------------------------


@needs_compiler
def test_a_build_is_kept(cache, fresh_library, compilations):
    assert loaded_from() == cache
    assert not compilations
    assert [path.stat().st_mode & 0o777 for path in cache.iterdir()] == [0o600]


@needs_compiler
def test_a_read_only_cache_is_no_obstacle(monkeypatch, fresh_library, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setenv("LOSSMITH_CXXFLAGS", "-O0")
    assert build.library() is not None


@needs_compiler
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_cache_that_others_can_write_to_is_not_used(cache, mode, fresh_library, caplog):
    cache.chmod(mode)
    before = sorted(cache.iterdir())
    with caplog.at_level(logging.WARNING, logger="lossmith"):
        assert loaded_from() != cache
        lossmith.cross_entropy(torch.randn(4, 9), torch.randint(9, (4,)))
    assert sorted(cache.iterdir()) == before
    assert caplog.text.count("does not belong to this user alone") == 1


@needs_compiler
def test_a_cache_of_somebody_else_is_not_used(cache, monkeypatch, fresh_library, caplog):
    me = os.geteuid()
    monkeypatch.setattr(build.os, "geteuid", lambda: me + 1)
    assert loaded_from() != cache
    assert "does not belong to this user alone" in caplog.text


@needs_compiler
def test_a_link_to_another_folder_is_not_a_cache(cache, fresh_library, tmp_path):
    cache.rename(tmp_path / "elsewhere")
    cache.symlink_to(tmp_path / "elsewhere")
    assert loaded_from() not in (cache, tmp_path / "elsewhere")


@needs_compiler
@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_build_that_others_can_write_to_is_built_again(cache, mode, fresh_library, compilations):
    (kept,) = cache.iterdir()
    kept.chmod(mode)
    assert loaded_from() == cache
    assert compilations
    assert build.library()._name != str(kept) or kept.stat().st_mode & 0o022 == 0


@needs_compiler
@pytest.mark.parametrize("length", slow_but([5000], [0, 5000, -1]))
def test_a_build_that_was_cut_short_is_built_again(cache, length, monkeypatch):
    """In a process of its own: to load it would end it."""
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:length])
    code = "from lossmith.engine.native import build; print(build.library()._name)"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(shown.stdout.strip()).parent == cache
    assert kept.read_bytes() == whole or len(list(cache.iterdir())) == 2


@needs_compiler
def test_a_build_that_was_altered_is_built_again(cache, fresh_library, compilations):
    (kept,) = cache.iterdir()
    altered = bytearray(kept.read_bytes())
    altered[len(altered) // 2] ^= 1
    kept.write_bytes(altered)
    assert loaded_from() == cache
    assert len(compilations) == len(build._SOURCES)
    build.library.cache_clear()
    assert loaded_from() == cache
    assert len(compilations) == len(build._SOURCES)


@needs_compiler
def test_a_broken_build_is_replaced(cache, fresh_library):
    for kept in cache.glob("*.so"):
        kept.unlink()
        kept.write_bytes(b"no library")
    assert build.library() is not None


@needs_compiler
def test_where_nothing_may_be_executed_a_copy_is_loaded(
    cache, monkeypatch, fresh_library, compilations, caplog
):
    """As on a file system that is mounted noexec. Nothing is compiled for that, and the cache stays."""
    load, before = ctypes.CDLL, sorted(cache.iterdir())

    def not_from_there(path, *rest):
        if Path(path).parent == cache:
            raise OSError(f"{path}: failed to map segment from shared object: Operation not permitted")
        return load(path, *rest)

    monkeypatch.setattr(build.ctypes, "CDLL", not_from_there)
    with caplog.at_level(logging.INFO, logger="lossmith"):
        assert loaded_from() != cache
    assert not compilations
    assert sorted(cache.iterdir()) == before
    assert "not loaded there" in caplog.text


@needs_compiler
def test_where_temporary_files_may_not_be_executed_either_the_next_folder_is_tried(
    cache, monkeypatch, fresh_library, compilations, tmp_path
):
    load, elsewhere = ctypes.CDLL, tmp_path / "runtime"
    elsewhere.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(elsewhere))

    def only_from_elsewhere(path, *rest):
        if elsewhere not in Path(path).parents:
            raise OSError(f"{path}: failed to map segment from shared object: Operation not permitted")
        return load(path, *rest)

    monkeypatch.setattr(build.ctypes, "CDLL", only_from_elsewhere)
    assert loaded_from().parent == elsewhere
    assert not compilations


@needs_compiler
def test_flags_of_the_users_own_make_another_build(cache, monkeypatch, fresh_library, compilations):
    monkeypatch.setenv("LOSSMITH_CXXFLAGS", "-O0 -DANYTHING='1 2'")
    assert loaded_from() == cache
    assert compilations
    assert all("-DANYTHING=1 2" in command for command in compilations)
    assert len(list(cache.iterdir())) == 2


@needs_compiler
def test_a_build_is_found_again_where_all_is_as_it_was_alone(monkeypatch, tmp_path):
    """A cache in a home that several machines share has builds for processors that this one is not."""
    compiler = next(filter(None, map(shutil.which, build._COMPILERS)))

    def name(flags: str = "-O0", own: str = "-DX") -> str:
        return build._Build([compiler], [flags], [own]).name

    names = [name(), name(flags="-O1"), name(own="-DY")]
    assert name() == names[0]
    changed = tmp_path / build._HEADERS[0].name
    changed.write_text(build._HEADERS[0].read_text() + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(build, "_HEADERS", [changed])
        names.append(name())
    for machine, lines in (("x86_64", "flags : avx2"), ("x86_64", "flags : avx512f"), ("aarch64", "")):
        with monkeypatch.context() as patch:
            patch.setattr(build.platform, "machine", lambda machine=machine: machine)
            patch.setattr(build.Path, "read_text", lambda self, lines=lines: f"cpu MHz : 1\n{lines}\n")
            names.append(name())
            patch.setattr(build.Path, "read_text", lambda self, lines=lines: f"cpu MHz : 2\n{lines}\n")
            assert name() == names[-1]
    assert len(set(names)) == len(names)
