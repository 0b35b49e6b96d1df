"""One pass each way, whatever is asked for, in blocks of any size, over logits of any layout."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import lossmith
import reference
from reference import DIFFERENTIABLE, IGNORE


def batch(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(*shape, generator=rng).to(dtype)
    targets = torch.randint(shape[-1], shape[:-1], generator=rng)
    targets[torch.rand(shape[:-1], generator=rng) < 0.2] = IGNORE
    return logits, targets


def everything(logits: Tensor, targets: Tensor, **options: object) -> Tensor:
    """One scalar that depends on every statistic, token by token with another weight."""
    candidates = torch.stack([targets.clamp(min=0), (targets + 1) % logits.shape[-1]], -1)
    stats = lossmith.token_stats(logits, targets, candidates=candidates, **options)
    total = logits.new_zeros((), dtype=stats.nll.dtype)
    for k, name in enumerate(DIFFERENTIABLE):
        value = getattr(stats, name).reshape(targets.numel(), -1)
        weight = torch.linspace(-1, 1 + k, value.numel(), dtype=value.dtype).reshape(value.shape)
        total = total + torch.where(value.isfinite(), value * weight, 0.0).sum()
    return total


def value_and_gradient(logits: Tensor, targets: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    value = everything(logits, targets, **options)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


pytestmark = pytest.mark.usefixtures("arithmetic")

# -- gradients, blocks ----------------------------------------------------------------------


@pytest.mark.parametrize("block_rows", [2, 3, 100])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"softcap": 4.0}, {"temperature": 2.0, "softcap": 6.0}], ids=str
)
def test_gradcheck(block_rows, options, rng, set_block_rows):
    set_block_rows(block_rows, 5)
    logits, targets = batch(rng, 7, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: everything(z, targets, **options), (logits.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": 0.7}], ids=str)
def test_the_size_of_a_block_changes_nothing_but_the_last_bits(dtype, options, rng, set_block_rows):
    logits, targets = batch(rng, 33, 19, dtype=dtype)
    found = []
    for rows in (1, 2, 5, 32, 33, 1000):
        set_block_rows(rows, 19)
        found.append(value_and_gradient(logits, targets, **options))
    eps = max(torch.finfo(dtype).eps, 8 * torch.finfo(found[0][0].dtype).eps)
    for value, gradient in found[1:]:  # exp() of a vector's tail may differ by one bit
        torch.testing.assert_close(value, found[0][0], rtol=eps, atol=0)
        torch.testing.assert_close(gradient, found[0][1], rtol=eps, atol=eps)


def test_a_vocabulary_larger_than_a_block(rng, monkeypatch):
    from lossmith.engine.rows import blocks

    logits, targets = batch(rng, 6, 40)
    whole = value_and_gradient(logits, targets)
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", 7)
    for a, b in zip(whole, value_and_gradient(logits, targets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_over_a_hundred_blocks_the_loss_is_the_truth(dtype, rng, set_block_rows):
    set_block_rows(2, 32)
    logits = 4 * torch.randn(300, 32, generator=rng).to(dtype)
    targets = torch.randint(32, (300,), generator=rng)
    truth = reference.cross_entropy(logits.double(), targets)
    assert lossmith.cross_entropy(logits, targets).item() == pytest.approx(truth.item(), rel=1e-6)


# -- shapes and layouts ---------------------------------------------------------------------

SHAPES = [(252, 507), (8, 5003), (1, 1), (3, 2), (1, 9), (4, 1, 6), (1, 5, 6), (2, 3, 5), (2, 1, 3, 4), (9,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_leading_shape_and_odd_sizes(shape, dtype, rng, set_block_rows):
    set_block_rows(100, 507)
    logits, targets = batch(rng, *shape, dtype=dtype)

    def ours(z: Tensor) -> Tensor:
        stats = lossmith.token_stats(z, targets)
        return stats.nll + stats.entropy + stats.mean_logit

    def truth(z: Tensor) -> Tensor:
        stats = reference.statistics(z, targets)
        return stats["nll"] + stats["entropy"] + stats["mean_logit"]

    reference.Case(ours, truth, logits, torch.randn(shape[:-1], generator=rng)).check()


LAYOUTS = {
    "transposed": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "classes strided": lambda z: torch.stack([z, -z], -1)[..., 0],
    "classes first": lambda z: z.movedim(-1, 0).contiguous().movedim(0, -1),
    "rows sliced": lambda z: torch.cat([z, z], 1)[:, : z.shape[1]],
    "classes sliced": lambda z: torch.cat([z, z], -1)[..., : z.shape[-1]],
    "every other row": lambda z: z.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_layout_of_the_logits_does_not_matter(layout, dtype, rng, set_block_rows):
    set_block_rows(4, 11)
    logits, targets = batch(rng, 4, 5, 11, dtype=dtype)
    strided = LAYOUTS[layout](logits)
    assert torch.equal(strided, logits)
    value, gradient = value_and_gradient(logits, targets)
    other_value, other_gradient = value_and_gradient(strided, targets)
    torch.testing.assert_close(other_value, value, rtol=1e-6, atol=0)
    torch.testing.assert_close(other_gradient, gradient)


def test_expanded_logits_sum_their_gradients(rng):
    row, targets = 3 * torch.randn(1, 1, 8, generator=rng), torch.randint(8, (3, 4), generator=rng)
    row.requires_grad_()
    lossmith.cross_entropy(row.expand(3, 4, 8), targets).backward()
    expected = torch.nn.functional.cross_entropy(row.expand(3, 4, 8).reshape(12, 8), targets.reshape(-1))
    torch.testing.assert_close(row.grad, torch.autograd.grad(expected, row)[0])


def test_shifted_views_of_the_logits_need_no_copy_by_the_caller(rng):
    logits, labels = batch(rng, 3, 6, 9)
    sliced, targets = logits[:, :-1], labels[:, 1:]
    value, gradient = value_and_gradient(sliced, targets)
    other_value, other_gradient = value_and_gradient(sliced.contiguous(), targets.contiguous())
    torch.testing.assert_close(other_value, value)
    torch.testing.assert_close(other_gradient, gradient)


# The same numbers in memory that is strided, repeated or of another dtype.
IN_OTHER_MEMORY = {
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "an offset": lambda x: torch.cat([x, x], -1)[..., x.shape[-1] :],
}


@pytest.mark.parametrize("memory", IN_OTHER_MEMORY)
@pytest.mark.parametrize("name", ["targets", "candidates", "class_weight", "mask", "token_weight"])
@pytest.mark.parametrize("shape", [(6,), (3, 4)], ids=str)
def test_the_layout_of_everything_else_does_not_matter(shape, name, memory, rng):
    logits, targets = batch(rng, *shape, 8)
    inputs = {
        "targets": targets,
        "candidates": torch.randint(8, (*shape, 3), generator=rng),
        "class_weight": torch.rand(8, generator=rng),
        "mask": torch.rand(shape, generator=rng) < 0.8,
        "token_weight": torch.rand(shape, generator=rng),
    }
    moved = inputs | {name: IN_OTHER_MEMORY[memory](inputs[name])}
    assert torch.equal(moved[name], inputs[name])
    found = []
    for given in (inputs, moved):
        z = logits.clone().requires_grad_()
        stats = lossmith.token_stats(z, given["targets"], candidates=given["candidates"])
        options = {key: given[key] for key in ("class_weight", "mask", "token_weight")}
        loss = lossmith.cross_entropy(z, given["targets"], label_smoothing=0.1, **options)
        value = loss + stats.candidate_log1m_prob.sum() + stats.nll.sum()
        found.append((value.detach(), *torch.autograd.grad(value, z)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


def test_expanded_targets_candidates_and_weights(rng):
    logits, _ = batch(rng, 6, 8)
    once, ids, weight = torch.tensor(3), torch.tensor([1, 2]), torch.tensor(0.5)
    found = []
    for copied in (False, True):
        given = [once.expand(6), ids.expand(6, 2), weight.expand(8)]
        targets, candidates, class_weight = (x.contiguous() if copied else x for x in given)
        z = logits.clone().requires_grad_()
        stats = lossmith.token_stats(z, targets, candidates=candidates)
        loss = lossmith.cross_entropy(z, targets, class_weight=class_weight, label_smoothing=0.1)
        value = loss + stats.candidate_log1m_prob.sum() + stats.entropy.sum()
        found.append((value.detach(), *torch.autograd.grad(value, z)))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("logits_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_temperature_of_any_dtype(dtype, logits_dtype, rng):
    logits, targets = batch(rng, 6, 8, dtype=logits_dtype)
    by_tensor = value_and_gradient(logits, targets, temperature=torch.tensor(2, dtype=dtype))
    for a, b in zip(by_tensor, value_and_gradient(logits, targets, temperature=2.0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16], ids=str)
def test_narrow_integer_targets(dtype, rng):
    logits, targets = batch(rng, 5, 6)
    for a, b in zip(
        value_and_gradient(logits, targets), value_and_gradient(logits, targets.to(dtype)), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": 0.7}], ids=str)
def test_inputs_are_never_modified(dtype, options, rng):
    logits, targets = batch(rng, 6, 7, dtype=dtype)
    kept = logits.clone(), targets.clone()
    logits.requires_grad_()
    value = everything(logits, targets, **options)
    upstream = torch.ones_like(value)
    value.backward(upstream)
    assert torch.equal(logits, kept[0])
    assert torch.equal(targets, kept[1])
    assert torch.equal(upstream, torch.ones_like(value))
    assert logits._version == 0  # not even written to and restored


# -- passes and memory -----------------------------------------------------------------------


def test_any_number_of_statistics_read_lazily_is_one_pass_each_way(rng, count_ops):
    logits, targets = batch(rng, 6, 9)
    logits.requires_grad_()
    with count_ops as ops:
        everything(logits, targets).backward()
    assert ops.passes == (1, 1)


def test_announced_statistics_of_both_temperatures_are_one_pass_each_way(rng, count_ops):
    logits, targets = batch(rng, 6, 9)
    logits.requires_grad_()
    with count_ops as ops:
        stats = lossmith.token_stats(logits, targets, temperature=0.5)
        stats.compute("nll", "unscaled.logsumexp", "num_wrong")
        (stats.nll + stats.unscaled.logsumexp**2 + stats.num_wrong).sum().backward()
    assert ops.passes == (1, 1)


def test_nothing_is_computed_until_it_is_asked_for(rng, count_ops):
    logits, targets = batch(rng, 6, 9)
    with count_ops as ops:
        lossmith.token_stats(logits, targets)
    assert ops.passes == (0, 0)


def test_statistics_without_a_gradient_need_no_backward(rng, count_ops):
    logits, targets = batch(rng, 6, 9)
    with count_ops as ops:
        stats = lossmith.token_stats(logits.requires_grad_(), targets)
        assert not stats.correct.requires_grad
        assert not stats.detach().nll.requires_grad
        with torch.no_grad():
            assert not lossmith.token_stats(logits, targets).nll.requires_grad
    assert ops.passes == (2, 0)


def test_frozen_logits_are_not_differentiated(rng, count_ops):
    logits, targets = batch(rng, 6, 9)
    scale = torch.ones((), requires_grad=True)
    with count_ops as ops:
        (lossmith.cross_entropy(logits, targets) * scale).backward()
    assert ops.passes == (1, 0)


def test_unknown_statistics_are_errors_that_list_the_known(rng):
    stats = lossmith.token_stats(*batch(rng, 2, 5))
    with pytest.raises(AttributeError, match=r"no statistic 'entrpy'.*'entropy'"):
        stats.compute("entrpy")


@contextlib.contextmanager
def peak_bytes(found: list[int]) -> Iterator[None]:
    """Append the most memory that was held at once by tensors made inside."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    found.append(peak)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_the_gradient_and_a_few_blocks(dtype, rng, set_block_rows):
    set_block_rows(4, 512)
    logits, targets = batch(rng, 512, 512, dtype=dtype)
    logits.requires_grad_()
    peaks: list[int] = []
    for options in (
        {},
        {"label_smoothing": 0.1, "z_loss": 1e-4, "focal_gamma": 2.0, "confidence_penalty": 0.1},
    ):
        with peak_bytes(peaks):
            lossmith.cross_entropy(logits, targets, **options).backward()
        logits.grad = None
    gradient = logits.numel() * logits.element_size()
    assert gradient <= peaks[0]
    assert max(peaks) < 1.4 * gradient, [p / gradient for p in peaks]
