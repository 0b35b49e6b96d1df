"""The Triton kernels as a backend: asked for by name, never for another, and compiled ahead of time."""

import contextlib
import functools
import inspect
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interpreted_case import patched_once, quiet  # noqa: F401

import lossmith
import reference
from lossmith.engine.rows import backends, triton_rows
from lossmith.engine.sweep import Sweep

pytestmark = quiet


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_loss(dtype, rng):
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "confidence_penalty": 0.1, "temperature": 0.8}
    logits = 3 * torch.randn(2, 3, 300, generator=rng).to(dtype)
    targets = torch.randint(300, (2, 3), generator=rng)
    targets[0, 1] = -100
    reference.Case(
        functools.partial(lossmith.cross_entropy, targets=targets, backend="triton", **options),
        functools.partial(reference.cross_entropy, targets=targets, **options),
        logits,
        torch.ones(()),
    ).check()


@pytest.mark.parametrize("strategy", ["one_sweep", "two_sweep"])
def test_a_head(strategy, rng):
    hidden, weight = torch.randn(6, 8, generator=rng), torch.randn(90, 8, generator=rng)
    targets = torch.tensor([1, 2, -100, 4, 89, 0])
    found = []
    for backend in ("triton", "torch"):
        given = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = lossmith.linear_cross_entropy(
            *given, targets, z_loss=0.1, strategy=strategy, memory_budget=3 * 90 * 4, backend=backend
        )
        found.append((loss.detach(), *torch.autograd.grad(loss, given)))
    torch.testing.assert_close(*found)


def test_the_interpreter_runs_only_when_it_is_asked_for():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z = torch.zeros(2, 5, dtype=dtype)
        assert triton_rows.takes(z, None, True)
        assert backends.backend_for(z, Sweep(torch.zeros(2))) is not triton_rows


def test_an_explicit_backend_never_falls_back():
    targets = torch.tensor([0, 1])
    with pytest.raises(
        ValueError, match=r"backend='triton' takes fp16, bf16 and fp32 .*; got float64 on cpu; pass"
    ):
        lossmith.cross_entropy(torch.zeros(2, 3, dtype=torch.float64), targets, backend="triton")
    with pytest.raises(ValueError, match=r"got float32 on cpu whose classes do not lie side by side; pass"):
        lossmith.cross_entropy(torch.zeros(3, 2).t(), targets, backend="triton")
    with pytest.raises(
        ValueError, match=r"backend='native' takes .*; got float32 on cpu with a softcap; pass"
    ):
        lossmith.cross_entropy(torch.zeros(2, 3), targets, backend="native", softcap=3.0)
    with pytest.raises(ValueError, match="backend must be"):
        lossmith.cross_entropy(torch.zeros(2, 3), targets, backend="cuda")


@pytest.mark.slow
def test_ids_are_drawn_as_often_as_they_should(rng):
    logits, num = 2 * torch.randn(9, generator=rng), 500
    logits[3] = -torch.inf
    ids = triton_rows.sample(logits.expand(num, 9), torch.arange(num), 3.0)
    expected = num * (3 * torch.tanh(logits.double() / 3)).softmax(-1)  # a cap lifts what is masked
    chi_square = ((ids.bincount(minlength=9) - expected).square() / expected).sum()
    assert chi_square < 30  # 8 degrees of freedom: exceeded once in 5,000 times
    again = triton_rows.sample(logits.expand(num, 9)[:9], torch.arange(9), 3.0)
    assert torch.equal(again, ids[:9])


def test_an_id_is_drawn_of_every_row(rng):
    logits = torch.randn(4, 1030, generator=rng)[:, 3:]
    logits[1] = -torch.inf
    logits[2] = torch.nan
    logits[3, 5], logits[3, 6:] = 9.0, -torch.inf
    ids = triton_rows.sample(logits, torch.arange(4), None)
    assert ((ids >= 0) & (ids < 1027)).all()
    logits[3, :5] = -torch.inf
    assert triton_rows.sample(logits, torch.arange(4), None)[3] == 5


def test_kernels_stop_at_an_id_out_of_range(monkeypatch):
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", replace(builder.options, debug=triton_rows.OPTIONS["debug"]))
    logits = torch.zeros(2, 5)
    for sweep in (
        Sweep(torch.tensor([1, 5])),
        Sweep(torch.tensor([1, -1])),
        Sweep(torch.tensor([1, 2**32 + 1])),
        Sweep(torch.tensor([1, 2]), torch.tensor([[1], [5]]), needs=16),
    ):
        outputs = sweep.blank(torch.float32, logits.device)
        with pytest.raises(Exception, match=r"outside \[0, V\)"):
            triton_rows.fill_stats(logits, sweep, sweep.views(outputs))


def test_a_kernel_that_cannot_be_made_during_a_capture_says_what_to_do(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            raise OSError("not while a stream captures")

    class OnAGpu:
        is_cuda, device = True, torch.device("cpu")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    with pytest.raises(RuntimeError, match=r"before the capture call lossmith\.warm_up"):
        triton_rows.launch(Kernel(), 1, OnAGpu(), {}, 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(OSError, match="not while"):
        triton_rows.launch(Kernel(), 1, OnAGpu(), {}, 1)


def test_nothing_is_specialised_on():
    from lossmith.engine.rows import triton_gradient, triton_sampling, triton_statistics
    from lossmith.engine.tokens import triton_derivation, triton_family, triton_weighing

    for kernel in (
        triton_statistics.statistics_of_row,
        triton_gradient.gradient_of_tile,
        triton_gradient.gradient_of_candidates,
        triton_gradient.put_candidates,
        triton_sampling.sample_of_row,
        triton_derivation.derive,
        triton_derivation.derive_back,
        triton_family.family,
        triton_family.family_back,
        triton_weighing.weigh,
        triton_weighing.weigh_back,
    ):
        parameters = inspect.signature(kernel.fn).parameters.values()
        varying = {p.name for p in parameters if "constexpr" not in str(p.annotation)}
        assert varying <= set(kernel.kwargs["do_not_specialize"])


def test_some_kernels_compile_ahead_of_time_without_a_spill(record_property):
    script = Path(__file__).parents[2] / "scripts" / "triton_aot"
    found = subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True, check=False)
    record_property("shown", found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr
    assert {"sm_80", "sm_90", "gfx942"} <= set(re.findall(r"^\| (\w+)", found.stdout, re.MULTILINE))
