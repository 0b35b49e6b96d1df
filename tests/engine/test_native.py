"""The library of compiled sources: built with care, done without where it cannot be had."""

import logging

import pytest
import torch

import lossmith
from lossmith.engine import native


@pytest.fixture
def fresh_library():
    """Let the test decide whether and where the library is built."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.parametrize("variable", [("LOSSMITH_NATIVE", "0"), ("CXX", "/nowhere/c++"), ("CXX", "false")])
def test_without_a_compiler_pytorch_takes_over(monkeypatch, fresh_library, variable, tmp_path, caplog):
    monkeypatch.setenv(*variable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    logits, targets = torch.randn(4, 9), torch.randint(9, (4,))
    with caplog.at_level(logging.INFO, logger="lossmith"):
        loss = lossmith.cross_entropy(logits, targets)
    assert native.library() is None
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, targets))
    if variable[0] == "CXX":
        assert "could not be built" in caplog.text


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler here")
def test_a_read_only_cache_is_no_obstacle(monkeypatch, fresh_library, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert native.library() is not None


def test_a_command_that_cannot_be_read_is_no_compiler(monkeypatch, fresh_library, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "g++ '")
    assert native.library() is None


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler here")
def test_a_broken_build_is_replaced(monkeypatch, fresh_library, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library() is not None
    for built in (tmp_path / "lossmith").glob("*.so"):
        built.unlink()
        built.write_bytes(b"no library")
    native.library.cache_clear()
    native.library()  # takes the other variant, or none, and removes what is broken
    native.library.cache_clear()
    assert native.library() is not None


def test_without_an_absolute_home_nothing_lands_in_the_working_directory(
    monkeypatch, fresh_library, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    native.library()
    assert not list(tmp_path.iterdir())
