"""Repetition penalties: unlikelihood of the candidates, with a gradient, next to any objective."""

import math

import pytest
import torch

from lossmith import (
    Component,
    ComposedLoss,
    CrossEntropyLoss,
    EarlyEOS,
    ImmediateRepetition,
    LossModifierPipeline,
    MaskRatioWeightModifier,
    NgramRepetition,
    NVAMPLoss,
    UnifiedLoss,
    Weighted,
)
from lossmith.equation.batch import align
from lossmith.terms.candidates import early_eos_candidates, immediate_candidates, ngram_candidates

IGNORE = -100
MADE = {
    "ngram": (lambda: NgramRepetition(2, 6), lambda b: ngram_candidates(b, ngram_size=2, window=6)),
    "immediate": (lambda: ImmediateRepetition(2), lambda b: immediate_candidates(b, threshold=2)),
    "eos": (lambda: EarlyEOS(3, 4), lambda b: early_eos_candidates(b, eos_token_id=3, min_length=4)),
}


def batch(num_classes: int = 4):
    rng = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(3, 12, num_classes, generator=rng, dtype=torch.float64)
    targets = torch.randint(num_classes, (3, 12), generator=rng)
    targets[0, 3:5] = IGNORE
    inputs = torch.randint(num_classes, (3, 12), generator=rng)
    inputs[:, 4:7] = 1
    return logits.requires_grad_(), targets, inputs


def naive(logits, targets, candidates):
    """sum over the candidates of -log(1 - p_c), over the supervised tokens."""
    log_p = logits.log_softmax(-1).reshape(-1, logits.shape[-1])
    total = torch.zeros((), dtype=logits.dtype)
    for position, ids in enumerate(candidates.tolist()):
        for c in ids:
            if c >= 0:
                total = total - torch.log1p(-log_p[position, c].exp())
    return total / (targets != IGNORE).sum()


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("has_inputs", [True, False])
def test_value_and_gradient_are_those_of_the_formula(name, has_inputs):
    logits, targets, inputs = batch()
    inputs = inputs if has_inputs else None
    make, find = MADE[name]
    candidates = find(align(targets, input_ids=inputs))
    assert (candidates >= 0).any()
    expected = naive(logits, targets, candidates)
    criterion = ComposedLoss(CrossEntropyLoss(), {"penalty": Weighted(make(), 0.3)})
    part = criterion.evaluate(logits, targets, input_ids=inputs).parts["penalty"]
    torch.testing.assert_close(part, 0.3 * expected)
    gradient = torch.autograd.grad(part, logits)[0]
    torch.testing.assert_close(gradient, 0.3 * torch.autograd.grad(expected, logits)[0])
    assert gradient.any()
    assert not gradient[targets == IGNORE].any()


@pytest.mark.parametrize("name", MADE)
def test_a_step_against_the_gradient_makes_the_candidates_rarer(name):
    logits, targets, inputs = batch()
    make, find = MADE[name]
    candidates = find(align(targets, input_ids=inputs))
    criterion = ComposedLoss(CrossEntropyLoss(), {"penalty": make()})
    part = criterion.evaluate(logits, targets, input_ids=inputs).parts["penalty"]
    (gradient,) = torch.autograd.grad(part, logits)
    before, after = (
        z.detach().softmax(-1).reshape(-1, 4).gather(1, candidates.clamp(min=0))[candidates >= 0].sum()
        for z in (logits, logits - gradient)
    )
    assert after < before


def test_across_the_sets_the_weights_add():
    """A token that two penalties point at pays both."""
    logits, targets, inputs = batch()
    both = {"ngram": Weighted(MADE["ngram"][0](), 0.3), "immediate": Weighted(MADE["immediate"][0](), 0.2)}
    output = ComposedLoss(CrossEntropyLoss(), both).evaluate(logits, targets, input_ids=inputs)
    for name, weighted in both.items():
        alone = ComposedLoss(CrossEntropyLoss(), {name: weighted})
        part = alone.evaluate(logits, targets, input_ids=inputs).parts[name]
        torch.testing.assert_close(output.parts[name], part)
    torch.testing.assert_close(sum(output.parts.values()), output.total)


@pytest.mark.parametrize("name", MADE)
def test_a_weight_of_zero_is_bit_identical_to_absent(name):
    logits, targets, inputs = batch()
    off = ComposedLoss(CrossEntropyLoss(), {"penalty": Weighted(MADE[name][0](), 0.0)})
    losses = [c(logits, targets, input_ids=inputs) for c in (off, CrossEntropyLoss())]
    assert torch.equal(*losses)
    assert torch.equal(*[torch.autograd.grad(loss, logits)[0] for loss in losses])


def test_the_penalty_is_that_of_the_prediction_not_of_a_tempered_one():
    logits, targets, inputs = batch()
    candidates = immediate_candidates(align(targets, input_ids=inputs), threshold=2)
    criterion = ComposedLoss(CrossEntropyLoss(temperature=3.0), {"penalty": ImmediateRepetition(2)})
    part = criterion.evaluate(logits, targets, input_ids=inputs).parts["penalty"]
    torch.testing.assert_close(part, naive(logits, targets, candidates))


def test_a_certain_repetition_costs_much_and_has_a_finite_gradient():
    logits = torch.zeros(1, 3, 5, requires_grad=True)
    with torch.no_grad():
        logits[0, 2, 1] = 30.0
    inputs = torch.tensor([[1, 1, 1]])
    criterion = ComposedLoss(CrossEntropyLoss(), {"penalty": ImmediateRepetition(2)})
    part = criterion.evaluate(logits, torch.tensor([[2, 2, 2]]), input_ids=inputs).parts["penalty"]
    # at the second and third position a third 1 is a candidate: 1/5 there, all but 4 exp(-30) here
    expected = -math.log(4 / 5) - (math.log(4) - 30)
    assert part.item() * 3 == pytest.approx(expected, rel=1e-5)
    assert torch.autograd.grad(part, logits)[0].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("is_empty", [True, False])
def test_the_smallest_batches(shape, num_classes, is_empty):
    logits = torch.randn(*shape, num_classes, requires_grad=True)
    targets = torch.full(shape, IGNORE) if is_empty else torch.zeros(shape, dtype=torch.long)
    parts = {name: make() for name, (make, _) in MADE.items() if num_classes > 3 or name != "eos"}
    loss = ComposedLoss(CrossEntropyLoss(), parts)(logits, targets)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert loss == 0 or not is_empty


def test_around_nvamp_and_inside_the_modifiers(count_ops):
    logits, targets, inputs = batch()
    base = ComposedLoss(NVAMPLoss(), {name: Weighted(make(), 0.1) for name, (make, _) in MADE.items()})
    pipeline = LossModifierPipeline([MaskRatioWeightModifier({})], base=base)
    with count_ops as ops:
        output = pipeline.evaluate(logits, targets, input_ids=inputs)
        output.total.backward()
    assert ops.passes == (1, 1)
    assert set(output.parts) == {"variance", "cross_entropy", "max", *MADE}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NgramRepetition(4, 3), "window_size=3 holds no n-gram of 4"),
        (lambda: NgramRepetition(0), "ngram_size must be a whole number >= 1"),
        (lambda: ImmediateRepetition(0), "threshold must be a whole number >= 1"),
        (lambda: EarlyEOS(-1), "must be a whole number >= 0"),
        (lambda: Weighted(torch.nn.Linear(1, 1)), "component must be a Component; got Linear"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_the_defaults_are_those_of_the_documentation():
    ngram = NgramRepetition()
    assert (ngram.ngram_size, ngram.window_size) == (4, 50)
    assert ImmediateRepetition().threshold == 2
    assert EarlyEOS(0).min_length == 20
    assert Weighted(ngram).weight == 1.0
    assert ComposedLoss(CrossEntropyLoss(), {"bare": ngram}).components["bare"].weight == 1.0
    assert NgramRepetition(3, 3).window_size == 3  # room for one, which cannot come again in it


def test_an_end_of_sequence_that_is_no_class():
    logits, targets, _ = batch()
    with pytest.raises(ValueError, match="9"):
        ComposedLoss(CrossEntropyLoss(), {"eos": EarlyEOS(9, 4)})(logits, targets)


# ── components of one's own ───────────────────────────────────────────────────────────────────────


class Scalar(Component):
    required = ("router",)

    def scalar(self, inputs, output):
        return inputs["router"].mean()


def test_a_component_of_ones_own():
    logits, targets, _ = batch()
    router = torch.rand(5, dtype=torch.float64, requires_grad=True)
    criterion = ComposedLoss(CrossEntropyLoss(), {"router": Weighted(Scalar(), 0.5)})
    output = criterion.evaluate(logits, targets, router=router)
    torch.testing.assert_close(output.parts["router"], 0.5 * router.mean())
    torch.testing.assert_close(output.total, CrossEntropyLoss()(logits, targets) + 0.5 * router.mean())
    whole = (targets != IGNORE).sum() * 4
    split = criterion.evaluate(logits, targets, router=router, denominator=whole)
    torch.testing.assert_close(split.total, output.total / 4)
    with pytest.raises(ValueError, match=r"'router' \(Scalar\) needs router; pass router="):
        criterion(logits, targets)
    with pytest.raises(TypeError, match=r"no option 'rooter'\. Did you mean 'router'"):
        criterion(logits, targets, rooter=router)
    off = ComposedLoss(CrossEntropyLoss(), {"router": Weighted(Scalar(), 0.0)})
    assert torch.equal(off(logits, targets), CrossEntropyLoss()(logits, targets))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
def test_compiled_by_inductor():
    """Inductor wrote C++ that did not compile for the candidates' masks."""
    torch.compiler.reset()
    criterion = UnifiedLoss(
        30,
        use_ngram_penalty=True,
        ngram_size=3,
        use_immediate_repetition_penalty=True,
        eos_token_id=2,
        track_statistics=False,
    )
    logits, ids = torch.randn(2, 24, 30), torch.randint(4, (2, 24))
    segments = (torch.arange(24) // 9).expand(2, 24)
    for more in ({}, {"segment_ids": segments}):
        given = {"targets": ids.roll(-1, 1), "input_ids": ids, **more}
        compiled = torch.compile(criterion, fullgraph=True)(logits, **given)
        torch.testing.assert_close(compiled, criterion(logits, **given))
