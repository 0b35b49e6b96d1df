"""The cross-entropy family in one step is its terms, one after another: on nasty rows, for its parts, and
where it cannot be had."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from token_case import nasty_logits
from torch.testing import assert_close

import lossmith
from lossmith.engine.native.build import library
from lossmith.engine.rows import native_cross_entropy, native_rows
from lossmith.engine.tokens import native_targets
from lossmith.equation.reduction import supervised, token_scale
from lossmith.objectives.temperature import AdaptiveTemperature

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")
IGNORE = -100
EVERYTHING = {
    "label_smoothing": 0.1,
    "focal_gamma": 2.0,
    "z_loss": 0.01,
    "confidence_penalty": 0.1,
    "temperature": 0.8,
}


class ByTerms(lossmith.CrossEntropyLoss):
    """The same, made of its terms."""

    family = None


@pytest.fixture
def calls(monkeypatch):
    """How often the library is entered: for the step, and for rows alone."""
    found = []
    for module, name in ((native_cross_entropy, "_run"), (native_rows, "run")):
        inner = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, name=name, inner=inner: (found.append(name), inner(*args))[1]
        )
    return found


def of(criterion, logits, targets, upstream=(1.0, 0.0, 0.0, 0.0), **inputs):
    """Loss, parts, shares and the gradient from random upstream gradients of loss and parts."""
    leaf = logits.clone().requires_grad_()
    output = criterion.evaluate(leaf, targets, **inputs)
    values = (output.total, *output.parts.values())
    sum(value * factor for value, factor in zip(values, upstream, strict=False)).backward()
    return output, leaf.grad


@settings(deadline=None, max_examples=150)
@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "label_smoothing": st.sampled_from([0.1, 0.9]),
            "smoothing_mode": st.sampled_from(["uniform", "exclude_target"]),
            "focal_gamma": st.sampled_from([0.5, 1.0, 2.0]),
            "z_loss": st.sampled_from([0.01, -0.5]),
            "confidence_penalty": st.sampled_from([0.1, -0.2]),
            "temperature": st.sampled_from([0.3, 2.0]),
            "reduction": st.sampled_from(["mean", "sequence_mean", "sum"]),
            "shift": st.booleans(),
        },
    ),
    weighed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    is_strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_it_is_its_terms(options, weighed, dtype, is_strided, seed):
    rng = torch.Generator().manual_seed(seed)
    rows, _ = nasty_logits()
    logits = rows[torch.randint(13, (2, 6), generator=rng)].to(dtype)
    if is_strided:
        logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
    targets = torch.randint(7, (2, 6), generator=rng)
    targets[0, :2] = IGNORE
    inputs = {"token_weight": torch.rand(2, 6, generator=rng) - 0.3} if weighed else {}
    options["class_weight"] = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0, 1.0]) if weighed else None
    upstream = torch.randn(4, generator=rng).tolist()
    (ours, gradient), (terms, expected) = (
        of(kind(**options), logits, targets, upstream, **inputs)
        for kind in (lossmith.CrossEntropyLoss, ByTerms)
    )
    assert list(ours.parts) == list(terms.parts)
    close = {"rtol": 2e-5, "atol": 2e-5, "equal_nan": True}
    assert_close([ours.total, *ours.parts.values()], [terms.total, *terms.parts.values()], **close)
    assert_close(ours.shares, terms.shares, **close)
    rounding = {"rtol": 1.6e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-5}
    assert_close(gradient, expected, **rounding, equal_nan=True)
    for name, value in terms.metrics.to_dict().items():
        assert_close(ours.metrics[name], value, rtol=2e-5, atol=1e-6, equal_nan=True)


def test_the_library_is_entered_once_each_way(calls):
    logits, targets = torch.randn(3, 5, 9), torch.randint(9, (3, 5))
    criterion = lossmith.CrossEntropyLoss(**EVERYTHING)
    of(criterion, logits, targets, (1.0, 0.5, 0.25, 0.1))
    assert calls == ["_run", "_run"]
    criterion(logits.requires_grad_(), targets).backward()
    assert calls == ["_run"] * 4


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean", "sum", "none"])
@pytest.mark.parametrize("empty", ["zero", "nan"])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_the_loss_alone_has_the_bits_of_the_output(shape, reduction, empty, ignored):
    rng = torch.Generator().manual_seed(len(shape))
    logits, targets = torch.randn(*shape, 9, generator=rng), torch.randint(9, shape, generator=rng)
    targets = targets.masked_fill(torch.rand(shape, generator=rng) < ignored, IGNORE)
    for dtype, options in itertools.product((torch.float32, torch.bfloat16), ({}, EVERYTHING)):
        criterion = lossmith.CrossEntropyLoss(reduction=reduction, empty=empty, **options)
        found = []
        for call in (criterion, lambda z, y: criterion.evaluate(z, y).total):  # noqa: B023
            leaf = logits.to(dtype, copy=True).requires_grad_()
            value = call(leaf, targets)
            value.backward(torch.full_like(value, 1.7))
            found.append((value.detach(), leaf.grad))
        assert_close(*found, rtol=0, atol=0, equal_nan=True)


def test_the_loss_alone_of_what_is_not_plain_is_that_of_the_output():
    logits, targets = torch.randn(3, 4, 9), torch.randint(9, (3, 4))
    for options in (
        {"shift": True},
        {"class_weight": torch.rand(9)},
        {"label_smoothing": 0.1, "special_tokens": (2,)},
        {"temperature": AdaptiveTemperature(0.9)},
        {"temperature": torch.tensor(0.9)},
        {"softcap": 3.0},
        {"ignore_index": 4},
    ):
        criterion = lossmith.CrossEntropyLoss(**options)
        assert torch.equal(criterion(logits, targets), criterion.evaluate(logits, targets).total)
    padded = lossmith.CrossEntropyLoss()
    padded.pad_token_id = 4
    assert torch.equal(padded(logits, targets), padded.evaluate(logits, targets).total)
    assert not torch.equal(padded(logits, targets), lossmith.CrossEntropyLoss()(logits, targets))


@pytest.mark.parametrize(
    "given",
    [
        (torch.zeros(3, 9), torch.tensor([0, 9, 1])),
        (torch.zeros(3, 9), torch.zeros(3)),
        (torch.zeros(3, 9), torch.zeros(4).long()),
        (torch.zeros(0, 9), torch.zeros(0).long()),
        (torch.zeros(3, 9).long(), torch.zeros(3).long()),
        (None, torch.zeros(3).long()),
        (torch.zeros(3, 9), None),
        ([[0.0]], [0]),
    ],
)
def test_the_loss_alone_refuses_what_the_output_refuses(given):
    criterion = lossmith.CrossEntropyLoss()
    with pytest.raises((TypeError, ValueError)) as ours:
        criterion(*given)
    with pytest.raises(ours.type) as expected:
        criterion.evaluate(*given)
    assert str(ours.value) == str(expected.value)


def test_the_loss_alone_sees_what_is_written_over():
    criterion = lossmith.CrossEntropyLoss(reduction="sum")
    logits, targets = torch.randn(4, 9, requires_grad=True), torch.randint(9, (4,))
    for one in (logits, targets):
        loss = criterion(logits, targets)
        with torch.no_grad():
            one.mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize(
    "options",
    [
        {"special_tokens": (1,), "label_smoothing": 0.1},
        {"softcap": 5.0},
        {"reduction": "none"},
        {"backend": "torch"},
    ],
    ids=str,
)
def test_what_it_does_not_know_is_made_of_terms(options, calls):
    output = lossmith.CrossEntropyLoss(**options).evaluate(torch.randn(4, 9), torch.randint(9, (4,)))
    assert "_run" not in calls
    assert output.total.isfinite().all()


def test_a_subclass_with_terms_or_a_loss_of_its_own_is_asked_for_them(calls):
    class Doubled(lossmith.CrossEntropyLoss):
        def token_loss(self, stats, batch):
            return 2 * super().token_loss(stats, batch)

    class Alone(lossmith.CrossEntropyLoss):
        def terms(self, token_loss=None):
            return super().terms(token_loss)[1:]

    class Weighed(lossmith.CrossEntropyLoss):
        @property
        def weigh(self):
            return lambda stats, batch: torch.full_like(batch.scale, 3.0)

    logits, targets = torch.randn(4, 9), torch.randint(9, (4,))
    plain = lossmith.CrossEntropyLoss(z_loss=0.1).evaluate(logits, targets)
    assert calls.count("_run") == 1
    doubled, alone, weighed = (
        kind(z_loss=0.1).evaluate(logits, targets) for kind in (Doubled, Alone, Weighed)
    )
    assert calls.count("_run") == 1
    assert_close(doubled.parts["cross_entropy"], 2 * plain.parts["cross_entropy"])
    assert_close(alone.total, plain.parts["z_loss"])
    assert_close(weighed.total, 3 * plain.total)


def test_a_weight_that_becomes_a_tensor_is_a_term_with_a_gradient():
    criterion = lossmith.CrossEntropyLoss(z_loss=0.1)
    criterion.z_loss = torch.tensor(0.1, requires_grad=True)
    criterion(torch.randn(4, 9), torch.randint(9, (4,))).backward()
    assert criterion.z_loss.grad > 0


def test_options_that_change_between_batches_are_seen():
    logits, targets = torch.randn(4, 9), torch.randint(9, (4,))
    criterion = lossmith.CrossEntropyLoss()
    for name, value in EVERYTHING.items():
        criterion(logits, targets)
        setattr(criterion, name, value)
    assert_close(criterion(logits, targets), ByTerms(**EVERYTHING)(logits, targets))


def test_its_statistics_are_known_and_have_gradients(calls):
    logits, targets = torch.randn(3, 5, 9), torch.randint(9, (3, 5))
    found = []
    for kind in (lossmith.CrossEntropyLoss, ByTerms):
        leaf = logits.clone().requires_grad_()
        stats = kind(**EVERYTHING).evaluate(leaf, targets).stats
        calls.clear()
        value = stats.nll * stats.entropy + stats.unscaled.logsumexp * stats.total_nll
        assert calls == []  # no further sweep
        (value * torch.arange(5.0)).sum().backward()
        found.append((value.detach(), leaf.grad))
        assert stats.top_prob.shape == (3, 5)  # one that the step did not know takes a sweep
    assert_close(*found)


def test_statistics_after_the_logits_have_changed_are_an_error():
    logits = torch.randn(4, 9)
    output = lossmith.CrossEntropyLoss().evaluate(logits, torch.randint(9, (4,)))
    logits.add_(1.0)
    with pytest.raises(RuntimeError, match="modified in place"):
        _ = output.stats.nll


@pytest.mark.parametrize("which", ["logits", "targets", "class_weight", "scale"])
def test_what_is_written_over_before_the_way_back_is_an_error(which):
    logits, targets = torch.randn(4, 9, requires_grad=True), torch.randint(9, (4,))
    weight = torch.rand(9)
    criterion = lossmith.CrossEntropyLoss(class_weight=weight, label_smoothing=0.1)
    output = criterion.evaluate(logits, targets)
    given = {"logits": logits, "targets": targets, "class_weight": criterion.class_weight}
    given["scale"] = output.batch.scale
    with torch.no_grad():
        given[which].mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.total.backward()


def test_ids_that_are_written_over_unseen_are_an_error_and_no_crash():
    targets = torch.randint(9, (4,)).numpy()
    logits = torch.randn(4, 9, requires_grad=True)
    loss = lossmith.CrossEntropyLoss()(logits, torch.from_numpy(targets))
    targets[2] = 10**9
    with pytest.raises(RuntimeError, match="the targets were written over"):
        loss.backward()


def test_the_way_back_again_and_again():
    logits, targets = torch.randn(4, 9, requires_grad=True), torch.randint(9, (4,))
    output = lossmith.CrossEntropyLoss(**EVERYTHING).evaluate(logits, targets)
    first, again = (torch.autograd.grad(output.total, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    parts = [torch.autograd.grad(p, logits, retain_graph=True)[0] for p in output.parts.values()]
    assert_close(sum(parts), first)
    (once,) = torch.autograd.grad(output.total, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        once.sum().backward()


def test_many_upstream_gradients_at_once_are_refused():
    logits = torch.randn(4, 9, requires_grad=True)
    loss = lossmith.CrossEntropyLoss()(logits, torch.randint(9, (4,)))
    with pytest.raises(RuntimeError, match="one upstream gradient at a time"):
        torch.autograd.grad(loss, logits, torch.ones(3), is_grads_batched=True)


def test_many_tokens_on_several_threads_have_the_bits_of_one():
    logits, targets = torch.randn(9000, 11), torch.randint(11, (9000,))
    found = []
    for num_threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            output, gradient = of(lossmith.CrossEntropyLoss(**EVERYTHING), logits, targets)
        finally:
            torch.set_num_threads(before)
        found.append((output.total, output.shares, gradient))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_a_copy_of_its_output_keeps_the_numbers():
    output = lossmith.CrossEntropyLoss(**EVERYTHING).evaluate(torch.randn(4, 9), torch.randint(9, (4,)))
    _ = output.stats.nll
    copied = copy.deepcopy(output)
    assert_close(copied.total, output.total)
    assert_close(copied.stats.nll, output.stats.nll)


def test_a_token_that_counts_nothing_pulls_nowhere():
    """Its loss is infinite, and infinity times nothing is no number."""
    logits = torch.randn(3, 5)
    logits[1, 2] = -torch.inf
    criterion = lossmith.CrossEntropyLoss(focal_gamma=2.0, label_smoothing=0.1)
    targets, weight = torch.tensor([0, 2, 1]), torch.tensor([1.0, 0.0, 1.0])
    output, gradient = of(criterion, logits, targets, token_weight=weight)
    assert output.total.isfinite()
    assert torch.equal(gradient[1], torch.zeros(5))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean", "sum", "none"])
@pytest.mark.parametrize("empty", ["zero", "nan"])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shares_have_the_bits_of_pytorchs(shape, reduction, empty, ignored, dtype):
    rng = torch.Generator().manual_seed(len(shape))
    targets = torch.randint(9, shape, generator=rng)
    targets = targets.masked_fill(torch.rand(shape, generator=rng) < ignored, IGNORE)
    assert native_targets.takes(targets)
    valid, scale, own = supervised(targets, IGNORE, reduction, empty=empty, dtype=dtype)
    expected = token_scale(targets != IGNORE, reduction, empty=empty, dtype=dtype)
    assert torch.equal(valid, targets != IGNORE)
    assert_close((scale, own), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("wrong", [-1, 9, -101, 2**62, -(2**63)])
def test_an_id_that_is_no_class_is_seen(wrong):
    ids = torch.tensor([[0, 8, IGNORE], [3, 4, 5]])
    assert not native_targets.is_outside(ids, 9, IGNORE)
    ids[1, 1] = wrong
    assert native_targets.is_outside(ids.t(), 9, IGNORE)
    with pytest.raises(ValueError, match=rf"got {wrong} at position \(1, 1\)"):
        lossmith.CrossEntropyLoss()(torch.randn(2, 3, 9), ids)


def test_shares_in_half_precision_are_pytorchs_business():
    """The library writes single and double precision alone."""
    targets = torch.tensor([[1, 2, IGNORE]])
    assert not native_targets.takes(targets, torch.bfloat16)
    valid, scale, _ = supervised(targets, IGNORE, "mean", dtype=torch.bfloat16)
    assert scale.dtype == torch.bfloat16
    assert_close(scale.float(), valid / 2)
