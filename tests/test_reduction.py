"""One denominator: the reduction table, batches without tokens, padding, micro-batches."""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import lossmith
import reference
from lossmith.equation.batch import align

IGNORE, B, T, V = -100, 4, 6, 5
REDUCTIONS = ["mean", "token_mean", "sequence_mean", "sum", "none"]
FULL = {"label_smoothing": 0.1, "z_loss": 0.01, "focal_gamma": 1.0, "confidence_penalty": 0.1}
OPTIONS = [
    {},
    FULL,
    FULL | {"class_weight": torch.linspace(0.5, 2.0, V)},
    {"temperature": 0.5, "softcap": 6.0},
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(B, T, V, generator=rng)).to(dtype)
    targets = torch.randint(V, (B, T), generator=rng)
    targets[torch.rand(B, T, generator=rng) < 0.3] = IGNORE
    targets[2] = IGNORE  # a sample without a token
    return logits, targets


def loss_and_gradient(logits: Tensor, targets: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    loss = lossmith.cross_entropy(logits, targets, **options)
    loss.sum().backward()
    return loss.detach(), logits.grad


# -- the table ---------------------------------------------------------------------------------


def scale(valid: Tensor, reduction: str, **options: object) -> Tensor:
    batch = align(torch.where(valid, 1, IGNORE), reduction=reduction, **options)
    return batch.rows(batch.scale)


def test_the_table_by_hand():
    valid = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    mean = torch.where(valid, 1 / 6, 0.0)
    by_sample = torch.tensor([[0.25, 0.25, 0, 0], [0, 0, 0, 0], [0.125] * 4])
    table = {
        "mean": mean,
        "token_mean": mean,
        "sequence_mean": by_sample,
        "sum": valid.float(),
        "none": valid.float(),
    }
    for reduction, expected in table.items():
        torch.testing.assert_close(scale(valid, reduction), expected)
    torch.testing.assert_close(scale(valid, "mean", denominator=12), mean / 2)
    torch.testing.assert_close(scale(valid, "sequence_mean", denominator=torch.tensor(4)), by_sample / 2)
    torch.testing.assert_close(scale(valid, "sum", denominator=10.0), valid / 10)


def test_a_sequence_mean_does_not_depend_on_the_lengths():
    """Samples that lose [1.5, 1.2, 2.0] per token have the mean 4.7 / 3."""
    valid = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    losses = torch.tensor([1.5, 1.2, 2.0]).unsqueeze(-1)
    assert (losses * scale(valid, "sequence_mean")).sum().item() == pytest.approx(4.7 / 3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_of_the_per_token_values(reduction):
    logits, targets = batch(torch.float64)
    values = lossmith.cross_entropy(logits, targets, reduction="none")
    assert values.shape == targets.shape
    assert torch.equal(
        values[targets == IGNORE], torch.zeros(int((targets == IGNORE).sum()), dtype=torch.float64)
    )
    valid = targets != IGNORE
    expected = reference.reduce(values, valid, valid.double(), reduction, None, "zero")
    torch.testing.assert_close(lossmith.cross_entropy(logits, targets, reduction=reduction), expected)


# -- nothing to learn from -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "full", "weighted", "read"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_all_ignored_batch_is_a_connected_zero(reduction, options, dtype):
    logits, targets = batch(dtype)
    logits[0] = float("nan")
    for denominator in (None, 0, 17, torch.tensor(0)):
        loss, gradient = loss_and_gradient(
            logits, torch.full_like(targets, IGNORE), reduction=reduction, denominator=denominator, **options
        )
        assert torch.equal(loss, torch.zeros_like(loss))
        assert torch.equal(gradient, torch.zeros_like(logits))


@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sequence_mean"])
def test_empty_nan_is_pytorchs_answer(reduction):
    logits, targets = batch()
    nothing = torch.full_like(targets, IGNORE)
    assert lossmith.cross_entropy(logits, nothing, reduction=reduction, empty="nan").isnan()
    some = lossmith.cross_entropy(logits, targets, reduction=reduction, empty="nan")
    assert torch.equal(some, lossmith.cross_entropy(logits, targets, reduction=reduction))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_empty_nan_leaves_what_is_not_divided(reduction):
    logits, targets = batch()
    loss = lossmith.cross_entropy(logits, torch.full_like(targets, IGNORE), reduction=reduction, empty="nan")
    assert torch.equal(loss, torch.zeros_like(loss))


def test_masked_out_and_shifted_away_are_also_nothing():
    logits, targets = batch()
    for options in (
        {"mask": torch.zeros(B, T, dtype=torch.bool)},
        {"mask": torch.arange(T).expand(B, T) < 1, "shift": True},
    ):
        loss, gradient = loss_and_gradient(logits, targets, **options)
        assert loss.item() == 0
        assert torch.equal(gradient, torch.zeros_like(logits))


def test_class_weights_that_are_all_zero_give_zero_not_nan():
    logits, targets = batch()
    loss, gradient = loss_and_gradient(logits, targets, class_weight=torch.zeros(V))
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(logits))


def test_an_all_ignored_batch_is_connected_to_the_model():
    weight = torch.randn(V, 3, requires_grad=True)
    lossmith.cross_entropy(torch.randn(2, 3) @ weight.T, torch.tensor([IGNORE, IGNORE])).backward()
    assert torch.equal(weight.grad, torch.zeros(V, 3))


# -- ignored rows change nothing -------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "full", "weighted", "read"])
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_appending_ignored_positions_and_samples_changes_nothing(dtype, reduction, options):
    logits, targets = batch(dtype)
    wider = torch.cat([logits, torch.full((B, 3, V), float("nan"), dtype=dtype)], 1)
    wider = torch.cat([wider, torch.randn(2, T + 3, V).to(dtype)])
    more = torch.nn.functional.pad(targets, (0, 3, 0, 2), value=IGNORE)
    loss, gradient = loss_and_gradient(logits, targets, reduction=reduction, **options)
    padded_loss, padded = loss_and_gradient(wider, more, reduction=reduction, **options)
    torch.testing.assert_close(padded_loss, loss, rtol=5e-7, atol=0)  # sums have another order
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(padded[:B, :T], gradient, rtol=4 * eps, atol=eps / 4)
    assert not padded[B:].any()
    assert not padded[:, T:].any()


# -- micro-batches ---------------------------------------------------------------------------------


def split(logits: Tensor, targets: Tensor, cuts: list[int]) -> list[tuple[Tensor, Tensor, slice]]:
    edges = [0, *sorted(set(cuts)), B]
    parts = [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]
    return [(logits[part], targets[part], part) for part in parts]


@settings(max_examples=settings().max_examples // 2)  # each is of many micro-batches
@given(
    cuts=st.lists(st.integers(1, B - 1), max_size=3),
    reduction=st.sampled_from(["mean", "sequence_mean", "sum"]),
    options=st.sampled_from(OPTIONS),
    as_tensor=st.booleans(),
)
def test_micro_batches_add_up_to_the_batch(cuts, reduction, options, as_tensor):
    logits, targets = batch(torch.float64)
    weight = torch.linspace(0.5, 1.5, B * T).reshape(B, T)
    whole, gradient = loss_and_gradient(logits, targets, reduction=reduction, token_weight=weight, **options)
    valid = targets != IGNORE
    denominator = {"mean": valid.sum(), "sequence_mean": valid.any(-1).sum(), "sum": torch.tensor(1)}[
        reduction
    ]
    if "class_weight" in options and reduction == "mean":
        denominator = options["class_weight"].double()[targets[valid]].sum()
    if not as_tensor:
        denominator = denominator.item()
    total = 0.0
    for some_logits, some_targets, part in split(logits, targets, cuts):
        loss, some_gradient = loss_and_gradient(
            some_logits,
            some_targets,
            reduction=reduction,
            denominator=denominator,
            token_weight=weight[part],
            **options,
        )
        total = total + loss
        torch.testing.assert_close(some_gradient, gradient[part])
    torch.testing.assert_close(total, whole)


@pytest.mark.parametrize(
    ("denominator", "error", "came"),
    [
        (-1, ValueError, "-1"),
        (float("nan"), ValueError, "nan"),
        (float("inf"), ValueError, "inf"),
        (torch.tensor(-2.0), ValueError, r"a tensor \[\] of -2\.0"),
        (torch.ones(2), ValueError, r"a tensor \[2\] with numbers from 1\.0 to 1\.0"),
        (True, TypeError, r"True \(bool\)"),
        (torch.tensor(True), TypeError, r"a tensor \[\] of torch\.bool"),
        ("3", TypeError, r"'3' \(str\)"),
    ],
)
def test_what_cannot_be_divided_by(denominator, error, came):
    message = rf"denominator must be .* >= 0; got {came}\. Leave it out to divide by this batch's own number$"
    with pytest.raises(error, match=message):
        align(batch()[1], denominator=denominator)


@pytest.mark.parametrize("former", ["batch", "batchmean"])
def test_former_reductions_are_told_what_is_written_now(former):
    with pytest.raises(
        ValueError, match=rf"got '{former}'; write reduction='sequence_mean' for the mean over"
    ):
        align(batch()[1], reduction=former)


def test_unknown_reductions_are_told_the_known():
    known = "'mean', 'token_mean', 'sequence_mean', 'sum', 'none'"
    with pytest.raises(ValueError, match=rf"^reduction must be one of {known}; got 'average'$"):
        align(batch()[1], reduction="average")
    with pytest.raises(ValueError, match=r"^empty must be one of 'zero', 'nan'; got 'skip'$"):
        align(batch()[1], empty="skip")


def test_a_denominator_is_divided_by_once():
    logits, targets = batch(torch.float64)
    total = lossmith.cross_entropy(logits, targets, reduction="sum")
    for denominator in (5, 0.5, torch.tensor(5), torch.tensor(123.0)):
        loss = lossmith.cross_entropy(logits, targets, denominator=denominator)
        torch.testing.assert_close(loss, total / denominator)


def test_a_fp32_count_of_tokens_is_exact_for_half_precision_logits():
    """4001 tokens do not exist in bf16: neither the count nor the sum may be kept in it."""
    logits = torch.zeros(4001, 3, dtype=torch.bfloat16)
    loss = lossmith.cross_entropy(logits, torch.zeros(4001, dtype=torch.long))
    assert loss.item() == pytest.approx(torch.tensor(3.0).log().item(), rel=1e-6)
