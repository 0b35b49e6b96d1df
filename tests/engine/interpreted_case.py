"""What tests of Triton's kernels share: whether they can run interpreted here, and faster than they would."""

import inspect

import numpy
import pytest
import torch

from lossmith.engine.rows import triton_rows

if not triton_rows.HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)
if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
    pytest.skip("Triton's interpreter needs NumPy before 2.4", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("with a GPU the kernels are not interpreted", allow_module_level=True)

# NumPy's: of what a kernel computes and then throws away, and of how the interpreter uses it
quiet = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def patched_once():
    """The interpreter replaces the language's functions at every call of a function, which takes longer than
    the kernels; once is enough."""
    from triton import language
    from triton.runtime import interpreter

    replace_them, done = interpreter._patch_lang, set()

    class Kept:
        def restore(self) -> None: ...

    def once(function):
        modules = [m for m in function.__globals__.values() if inspect.ismodule(m)]
        seen = frozenset(id(m) for m in modules if m in (language, language.core))
        if seen not in done:
            done.add(seen)
            replace_them(function)
        return Kept()

    interpreter._patch_lang = once
    yield
    interpreter._patch_lang = replace_them
