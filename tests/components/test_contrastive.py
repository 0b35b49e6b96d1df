"""InfoNCE and the contrast of tokens against loops over pairs."""

import math

import pytest
import torch

from lossmith import ComposedLoss, Contrastive, CrossEntropyLoss, Weighted
from lossmith.components.contrastive import info_nce, token_contrast
from reference_components import info_nce as naive_info_nce, token_contrast as naive_tokens

B, T, D, V = 3, 4, 5, 7
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [1, 0, 0, 0]])


def composed(weight=1.0, **options) -> ComposedLoss:
    return ComposedLoss(CrossEntropyLoss(), {"part": Weighted(Contrastive(**options), weight)})


def part_of(contrastive=None, **inputs) -> torch.Tensor:
    rows = torch.zeros(B, T, V, dtype=torch.float64), torch.zeros(B, T, dtype=torch.long)
    return composed(**(contrastive or {})).evaluate(*rows, **inputs).parts["part"]


def vectors(rng, *shape, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=rng, dtype=dtype, requires_grad=True)


# ── two views ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_info_nce_is_its_formula(rng, temperature):
    a, b = vectors(rng, B, D), vectors(rng, B, D)
    found = part_of({"temperature": temperature}, contrastive_pairs=(a, b))
    expected = naive_info_nce(a, b, temperature)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, (a, b))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (a, b)))
    assert all((g != 0).any() for g in gradients)
    torch.autograd.gradcheck(
        lambda *pair: part_of({"temperature": temperature}, contrastive_pairs=pair), (a, b)
    )


def test_info_nce_is_symmetric_and_bounded_by_chance(rng):
    a, b = vectors(rng, B, D), vectors(rng, B, D)
    torch.testing.assert_close(info_nce(a, b), info_nce(b, a))
    alike = torch.ones(8, D)
    torch.testing.assert_close(info_nce(alike, alike), torch.tensor(math.log(8)))
    apart = torch.eye(8)
    assert info_nce(apart, apart) < 1e-4


def test_a_batch_of_one_has_nothing_to_compare_with(rng):
    a, b = vectors(rng, 1, D), vectors(rng, 1, D)
    found = part_of(contrastive_pairs=[a, b])
    assert found == 0
    assert all((g == 0).all() for g in torch.autograd.grad(found, (a, b)))
    nobody = vectors(rng, 0, D)
    assert part_of(contrastive_pairs=(nobody, nobody)) == 0


def test_pairs_come_before_hidden_states(rng):
    a, hidden = vectors(rng, B, D), vectors(rng, B, T, D)
    both = part_of(contrastive_pairs=(a, a), hidden_states=hidden)
    assert both == part_of(contrastive_pairs=(a, a))


# ── the tokens of a row ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("margin", [0.0, 0.5, 1.2])
def test_the_contrast_of_tokens_is_its_formula(rng, mask, margin):
    hidden = vectors(rng, B, T, D)
    with torch.no_grad():
        hidden += 1  # so that some are alike
    found = part_of({"margin": margin}, hidden_states=hidden, attention_mask=mask)
    expected = naive_tokens(hidden, margin, mask)
    torch.testing.assert_close(found, expected)
    if margin:
        (gradient,) = torch.autograd.grad(found, hidden)
        torch.testing.assert_close(gradient, *torch.autograd.grad(expected, hidden))
        assert (gradient != 0).any()
    torch.autograd.gradcheck(
        lambda h: part_of({"margin": margin}, hidden_states=h, attention_mask=mask), hidden
    )


def test_tokens_that_are_far_enough_apart_are_free():
    assert token_contrast(torch.eye(4).unsqueeze(0), margin=1.0) == 0
    alike = torch.ones(1, 4, D)
    torch.testing.assert_close(token_contrast(alike, margin=0.5), torch.tensor(0.5))


def test_padding_changes_nothing_and_gets_nothing(rng):
    hidden = vectors(rng, B, T, D)
    kept = MASK.bool()
    garbage = hidden.detach().masked_fill(~kept.unsqueeze(-1), torch.nan).requires_grad_()
    found = part_of({"margin": 1.5}, hidden_states=garbage, attention_mask=MASK)
    assert found == part_of({"margin": 1.5}, hidden_states=hidden, attention_mask=kept)
    (gradient,) = torch.autograd.grad(found, garbage)
    assert (gradient[~kept] == 0).all()
    assert (gradient[:2][kept[:2]] != 0).all()
    assert (gradient[2] == 0).all()  # one token has no pair
    nothing = part_of(hidden_states=garbage, attention_mask=torch.zeros_like(MASK))
    assert nothing == 0
    assert (torch.autograd.grad(nothing, garbage)[0] == 0).all()


def test_one_token_has_no_pair(rng):
    hidden = vectors(rng, B, 1, D)
    found = part_of(hidden_states=hidden)
    assert found == 0
    assert (torch.autograd.grad(found, hidden)[0] == 0).all()


# ── both ──────────────────────────────────────────────────────────────────────────────────────────


def test_zero_vectors_have_no_gradient(rng):
    hidden = vectors(rng, 2, 3, D).detach()
    hidden[0, 1] = 0
    hidden.requires_grad_()
    for loss in (token_contrast(hidden, margin=1.5), info_nce(hidden[0], hidden[1])):
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert (gradient[0, 1] == 0).all()
        assert (gradient != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_vectors_are_compared_in_full(rng, dtype):
    a, hidden = vectors(rng, B, D, dtype=dtype), vectors(rng, B, T, D, dtype=dtype)
    b = vectors(rng, B, D, dtype=dtype)
    for inputs, expected in (
        ({"contrastive_pairs": (a, b)}, naive_info_nce(a.double(), b.double(), 0.07)),
        ({"hidden_states": hidden}, naive_tokens(hidden.double(), 0.5)),
    ):
        found = part_of(**inputs)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert part_of(**inputs) == found


def test_micro_batches_of_rows_add_up_and_those_of_views_take_their_share(rng):
    logits = torch.randn(B, T, V, generator=rng, dtype=torch.float64)
    targets, hidden = torch.zeros(B, T, dtype=torch.long), vectors(rng, B, T, D)
    a, b = vectors(rng, B, D), vectors(rng, B, D)
    criterion = composed(0.3, margin=1.0)
    whole = criterion(logits, targets, hidden_states=hidden)
    parts = [slice(0, 1), slice(1, 3)]
    split = [criterion(logits[p], targets[p], hidden_states=hidden[p], denominator=B * T) for p in parts]
    torch.testing.assert_close(sum(split), whole)
    found = [
        criterion.evaluate(logits[p], targets[p], contrastive_pairs=(a[p], b[p]), denominator=B * T).parts[
            "part"
        ]
        for p in parts
    ]
    torch.testing.assert_close(sum(found), 0.3 * 2 / 3 * naive_info_nce(a[1:], b[1:], 0.07))


def test_a_weight_of_zero_is_as_good_as_absent(rng):
    logits = torch.randn(B, T, V, generator=rng, requires_grad=True)
    targets = torch.zeros(B, T, dtype=torch.long)
    plain, without = CrossEntropyLoss()(logits, targets), composed(0.0)(logits, targets)
    assert torch.equal(plain, without)
    assert all(map(torch.equal, torch.autograd.grad(plain, logits), torch.autograd.grad(without, logits)))
    with pytest.raises(ValueError, match=r"contrastive_pairs.*or hidden_states.*got neither"):
        composed()(logits, targets)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"contrastive_pairs": torch.zeros(2, B, D)}, r"\(view_a, view_b\).*got a tensor \[2, 3, 5\]"),
        ({"contrastive_pairs": (torch.zeros(B, D),)}, "got a tuple of 1"),
        ({"contrastive_pairs": (torch.zeros(B, D), None)}, "two floating-point tensors"),
        ({"contrastive_pairs": (torch.zeros(B, D), torch.zeros(2, D))}, r"got \[3, 5\] and \[2, 5\]"),
        ({"contrastive_pairs": (torch.zeros(B, T, D),) * 2}, r"one shape \[B, D\].*hidden_states.mean\(1\)"),
        ({"hidden_states": (torch.zeros(B, T, D),)}, r"got a tuple of 1.*hidden_states\[-1\]"),
        ({"hidden_states": torch.zeros(B, D)}, r"must be \[B, T, D\]; got \[3, 5\]"),
        ({"hidden_states": torch.zeros(B, T, D, dtype=torch.long)}, "of torch.int64"),
        ({"hidden_states": torch.zeros(B, T, D), "attention_mask": MASK[:, :2]}, r"\[3, 4\]; got \[3, 2\]"),
    ],
)
def test_bad_inputs(inputs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        part_of(**inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a number > 0; got 0.0"),
        ({"temperature": float("nan")}, "temperature must be a number > 0"),
        ({"margin": -0.1}, "margin must be a number >= 0; got -0.1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Contrastive(**options)
