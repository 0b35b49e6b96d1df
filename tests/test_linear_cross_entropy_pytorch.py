"""PyTorch's own samples of ``F.linear_cross_entropy``, as a conformance test."""

import functools
import sys
import types
import unittest
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import linear_case
import lossmith
from linear_case import STRATEGIES, Head
from slow_but import slow_but

NAMES = {"linear_bias": "bias", "weight": "class_weight"}


@functools.cache
def op_infos() -> list[Any]:
    """What PyTorch tests its own operator with; its tests' helpers want a module that few have."""
    if "expecttest" not in sys.modules:
        sys.modules["expecttest"] = stub = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        invocations = pytest.importorskip(
            "torch.testing._internal.common_methods_invocations", exc_type=ImportError
        )
    found = [op for op in invocations.op_db if op.name == "nn.functional.linear_cross_entropy"]
    if not found:
        pytest.skip("this PyTorch has no linear_cross_entropy")
    return found


def samples(dtype: torch.dtype) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [s for op in op_infos() for s in op.sample_inputs("cpu", dtype, requires_grad=True)]


def is_ours(sample: Any) -> bool:
    """Class ids, and one dimension of classes."""
    weight, targets = sample.args
    return not targets.is_floating_point() and weight.dim() == 2 and sample.input.dim() in (1, 2)


def leaves(sample: Any, dtype: torch.dtype) -> Head:
    given = (sample.input, sample.args[0], sample.kwargs.get("linear_bias"))
    return Head(*(None if x is None else x.detach().to(dtype).requires_grad_() for x in given))


def pytorch(head: Head, targets: Tensor, *, bias: Tensor | None = None, **options: Any) -> Tensor:
    options["weight"] = options.pop("class_weight", None)
    return functional.cross_entropy(head.logits(), targets, **options)


@pytest.mark.parametrize("rows", slow_but([1, 3, None], [1, 2, 3, None]))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pytorchs_own_samples(strategy, rows):
    ran = 0
    for sample in samples(torch.float64):
        if not is_ours(sample):
            continue
        targets = sample.args[1]
        options = {NAMES.get(k, k): v for k, v in sample.kwargs.items() if k != "options"}
        if options.get("class_weight") is not None:
            options["class_weight"] = options["class_weight"].detach()
        ours, theirs = leaves(sample, torch.float64), leaves(sample, torch.float64)
        expected = pytorch(theirs, targets, **options)
        loss = lossmith.linear_cross_entropy(
            ours.hidden,
            ours.weight,
            targets,
            strategy=strategy,
            memory_budget=ours.budget(rows),
            empty="nan",
            **options | {"bias": ours.bias},
        )
        torch.testing.assert_close(loss, expected, equal_nan=True, rtol=1e-11, atol=1e-12)
        if expected.isfinite().all():
            torch.testing.assert_close(
                linear_case.gradients(loss, ours),
                linear_case.gradients(expected, theirs),
                rtol=1e-10,
                atol=1e-11,
            )
        ran += 1
    assert ran >= 50  # of 210; the others have class probabilities or more dimensions


@pytest.mark.parametrize("rows", slow_but([2], [2, 3]))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradcheck(strategy, rows):
    """Numerical gradients, of the loss and of a loss of the statistics."""
    head, targets = linear_case.head(5), linear_case.targets(5)
    targets[1] = -100

    def loss(*given: Tensor) -> Tensor:
        return lossmith.linear_cross_entropy(
            given[0],
            given[1],
            targets,
            bias=given[2],
            strategy=strategy,
            memory_budget=head.budget(rows),
            label_smoothing=0.1,
            focal_gamma=2.0,
            z_loss=0.1,
            confidence_penalty=0.1,
            class_weight=torch.linspace(0.5, 2.0, 7).double(),
            softcap=4.0,
            temperature=0.7,
        )

    def of_statistics(*given: Tensor) -> Tensor:
        stats = lossmith.linear_token_stats(
            given[0], given[1], targets, bias=given[2], memory_budget=head.budget(rows), temperature=0.7
        )
        return stats.entropy * stats.target_prob + stats.unscaled.logsumexp**2 + stats.wrong_entropy

    torch.autograd.gradcheck(loss, head.leaves)
    torch.autograd.gradcheck(of_statistics, head.leaves)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pytorchs_bfloat16_samples_are_closer_to_fp64_than_its_own(strategy):
    errors = []
    for sample in samples(torch.bfloat16):
        if not is_ours(sample) or sample.kwargs.get("reduction") == "none":
            continue
        targets = sample.args[1]
        options = {
            NAMES.get(k, k): v for k, v in sample.kwargs.items() if k not in ("options", "linear_bias")
        }
        options["class_weight"] = None
        head = leaves(sample, torch.bfloat16)
        exact = pytorch(head.to(torch.float64), targets, **options)
        ours = lossmith.linear_cross_entropy(
            head.hidden, head.weight, targets, bias=head.bias, strategy=strategy, empty="nan", **options
        )
        if exact.isfinite():
            theirs = pytorch(head, targets, **options)
            errors.append([abs((x.double() - exact) / exact).item() for x in (ours, theirs)])
    mean = torch.tensor(errors).mean(0)
    assert len(errors) > 20
    assert mean[0] < 0.7 * mean[1]
