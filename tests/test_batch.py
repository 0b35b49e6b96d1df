"""TokenBatch: which token predicts what, settled once."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import lossmith
from lossmith.equation.batch import align

IGNORE, INF = -100, float("inf")
B, T, V = 3, 5, 7


def labels() -> torch.Tensor:
    return torch.tensor([[5, 1, 2, IGNORE], [IGNORE, 3, 4, 0]])


def test_unshifted_targets_are_taken_as_they_are():
    batch = align(labels())
    assert isinstance(batch, lossmith.TokenBatch)
    assert torch.equal(batch.targets, labels().reshape(-1))
    assert torch.equal(batch.valid, labels().reshape(-1) != IGNORE)
    assert batch.shape == (2, 4)
    assert batch.num_tokens.item() == 6
    torch.testing.assert_close(batch.scale, batch.valid / 6)


def test_shift_moves_targets_mask_and_weights_together_but_not_inputs():
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    weight = torch.arange(8.0).reshape(2, 4)
    inputs = torch.arange(8).reshape(2, 4)
    batch = align(labels(), shift=True, mask=mask, token_weight=weight, input_ids=inputs, reduction="sum")
    assert batch.rows(batch.targets).tolist() == [[1, IGNORE, IGNORE, IGNORE], [3, 4, 0, IGNORE]]
    assert batch.rows(batch.valid).tolist() == [[True, False, False, False], [True, True, True, False]]
    assert batch.rows(batch.scale).tolist() == [[1.0, 0, 0, 0], [5.0, 6.0, 7.0, 0]]
    assert torch.equal(batch.input_ids, inputs.reshape(-1))


def test_shift_does_not_cross_samples():
    ids = torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    assert align(ids, shift=True).targets.reshape(2, 2, 2).tolist() == [
        [[2, IGNORE], [4, IGNORE]],
        [[6, IGNORE], [8, IGNORE]],
    ]


def test_a_sequence_of_one_token_has_nothing_to_predict_when_shifted():
    assert align(torch.tensor([[3], [4]]), shift=True).num_tokens.item() == 0
    with pytest.raises(ValueError, match="without a sequence"):
        align(torch.tensor(3), shift=True)


def test_padding_is_not_learned_unless_it_is_also_the_end():
    ids = torch.tensor([[7, 0, 0], [0, 7, 0]])
    assert align(ids, pad_token_id=0).valid.tolist() == [True, False, False, False, True, False]
    assert align(ids, pad_token_id=0, eos_token_id=7).valid.tolist() == [
        True,
        False,
        False,
        False,
        True,
        False,
    ]
    both = align(ids, pad_token_id=0, eos_token_id=0)  # GPT-2 style: only the mask can tell
    assert both.valid.all()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert align(ids, pad_token_id=0, eos_token_id=0, mask=mask).valid.tolist() == [
        True,
        True,
        False,
        True,
        True,
        True,
    ]


def test_unsupervised_positions_carry_ignore_index():
    mask = torch.tensor([[True, False, True, True], [True, True, True, False]])
    batch = align(labels(), mask=mask, ignore_index=IGNORE)
    assert torch.equal(batch.valid, batch.targets != IGNORE)
    own = align(torch.tensor([[0, 1, 2]]), ignore_index=0)
    assert own.valid.tolist() == [False, True, True]


def test_token_weights_are_detached_and_do_not_enter_the_denominator():
    weight = torch.full((2, 4), 3.0, requires_grad=True)
    batch = align(labels(), token_weight=weight)
    torch.testing.assert_close(batch.scale, 3 * batch.valid / 6)
    assert not batch.scale.requires_grad


def test_class_weights_are_what_a_token_counts_for():
    class_weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    batch = align(labels(), class_weight=class_weight)
    torch.testing.assert_close(batch.scale, batch.valid / (6 + 2 + 3 + 4 + 5 + 1))
    rows = align(labels(), class_weight=class_weight, reduction="sequence_mean")
    torch.testing.assert_close(rows.rows(rows.scale)[0, :3], torch.full((3,), 1 / (6 + 2 + 3) / 2))


def test_share_is_this_micro_batchs_part():
    assert align(labels()).share == 1.0
    assert float(align(labels(), denominator=24).share) == pytest.approx(6 / 24)
    assert float(align(labels(), denominator=torch.tensor(8), reduction="sequence_mean").share) == 2 / 8
    assert float(align(labels(), denominator=0).share) == 6  # an empty run is divided by 1


def test_selected_tokens_keep_their_scale_in_the_whole_batch():
    weight = torch.arange(1.0, 9.0).reshape(2, 4)
    batch = align(labels(), token_weight=weight, input_ids=labels().clamp(min=0), denominator=11)
    for index in (slice(2, 6), torch.tensor([1, 5, 7]), batch.valid):
        part = batch.select(index)
        for name in ("targets", "valid", "scale", "input_ids"):
            assert torch.equal(getattr(part, name), getattr(batch, name)[index]), name
        assert part.shape == part.targets.shape
        assert part.ignore_index == batch.ignore_index
        assert torch.equal(part.share, batch.share)
    halves = batch.select(slice(0, 4)).num_tokens + batch.select(slice(4, 8)).num_tokens
    assert halves == batch.num_tokens


def test_rows_folds_leading_dimensions():
    batch = align(torch.zeros(2, 3, 4, dtype=torch.long))
    assert batch.rows(batch.targets).shape == (6, 4)
    assert align(torch.tensor(1)).rows(torch.tensor([1])).shape == (1, 1)
    assert align(torch.tensor([1, 2])).rows(torch.tensor([1, 2])).shape == (1, 2)


def test_what_a_batch_says_of_its_samples():
    batch = align(labels(), shift=2)
    assert batch.row_counts.tolist() == [1, 2]
    assert batch.spread(torch.tensor([7.0, 8.0])).tolist() == [7.0] * 4 + [8.0] * 4
    for shift, num_positions in ((False, 4), (True, 3), (2, 2), (4, 0), (9, 0)):
        assert align(labels(), shift=shift).num_positions == num_positions
    assert align(labels(), pad_token_id=0).pad_token_id == 0
    assert align(labels(), pad_token_id=0, eos_token_id=0).pad_token_id is None  # an end like another


def test_where_a_position_is_only_looked_at_any_class_is_read():
    also_read = torch.tensor([True, True, False, True, False, False, True, True])
    batch = replace(align(labels()), also_read=also_read)
    assert batch.read_targets.tolist() == [5, 1, 2, 0, IGNORE, 3, 4, 0]
    assert torch.equal(align(labels()).read_targets, labels().reshape(-1))


def test_the_inputs_are_not_modified():
    ids, mask, weight = labels(), torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4)
    align(ids, shift=True, mask=mask, token_weight=weight, pad_token_id=5)
    assert torch.equal(ids, labels())
    assert mask.all()
    assert torch.equal(weight, torch.ones(2, 4))


@pytest.mark.parametrize("name", ["mask", "token_weight", "input_ids"])
def test_what_belongs_to_the_targets_has_their_shape(name):
    with pytest.raises(ValueError, match=rf"{name} must have the targets' shape \[2, 4\]; got \[2, 3\]"):
        align(labels(), **{name: torch.ones(2, 3, dtype=torch.long)})


@pytest.mark.parametrize("name", ["mask", "input_ids", "segment_ids"])
def test_what_is_no_tensor_is_named_with_the_shape_that_is_wanted(name):
    with pytest.raises(TypeError, match=rf"^{name} must be a tensor of shape \[2, 4\]; got list$"):
        align(labels(), **{name: labels().tolist()})


def test_features_are_looked_at_by_their_own_names():
    with pytest.raises(TypeError, match=r"^scores must be a tensor of shape \[2, 4\]; got float$"):
        align(labels(), features={"scores": 1.0})
    with pytest.raises(ValueError, match=r"^scores must have the targets' shape \[2, 4\]; got \[8\]$"):
        align(labels(), features={"scores": torch.ones(8)})


def test_a_mask_of_weights_is_told_where_they_go():
    mask = torch.ones(2, 4)
    mask[1, 2] = 0.25
    with pytest.raises(ValueError, match=r"got 0\.25 at position \(1, 2\)\. Pass weights as token_weight"):
        align(labels(), mask=mask)
    with pytest.raises(TypeError, match=r"token_weight must be .*torch\.bool\. What is 0 or 1 is a mask"):
        align(labels(), token_weight=mask.bool())


def test_a_share_of_nothing_is_zero_and_never_a_broken_number():
    nothing = torch.full_like(labels(), IGNORE)
    for denominator in (0, torch.tensor(0), 24):
        for reduction in ("mean", "sequence_mean"):
            assert align(nothing, denominator=denominator, reduction=reduction).share == 0


def random_batch() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    targets = torch.randint(V, (B, T), generator=rng)
    targets[0, ::2], targets[-1] = IGNORE, IGNORE
    return 3 * torch.randn(B, T, V, generator=rng), targets


def random_weight() -> Tensor:
    return torch.rand(B, T, generator=torch.Generator().manual_seed(1)) + 0.5


# -- what a token is, seen from the loss ------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sequence_mean", "sum", "none"])
def test_shift_is_shifting_by_hand(reduction):
    logits, labels = random_batch()
    weight, mask = random_weight(), random_weight() < 1.2
    shifted = lossmith.cross_entropy(
        logits, labels, shift=True, mask=mask, token_weight=weight, reduction=reduction, z_loss=0.1
    )
    by_hand = lossmith.cross_entropy(
        logits[:, :-1],
        labels[:, 1:],
        mask=mask[:, 1:],
        token_weight=weight[:, 1:],
        reduction=reduction,
        z_loss=0.1,
    )
    if reduction == "none":
        assert torch.equal(shifted[:, -1], torch.zeros(B))
        shifted = shifted[:, :-1]
    torch.testing.assert_close(shifted, by_hand, rtol=1e-6, atol=0)


def test_a_mask_is_the_same_as_ignoring():
    logits, targets = random_batch()
    mask = random_weight() < 1.2
    by_mask = lossmith.cross_entropy(logits, targets, mask=mask, label_smoothing=0.1)
    by_index = lossmith.cross_entropy(logits, targets.masked_fill(~mask, IGNORE), label_smoothing=0.1)
    assert torch.equal(by_mask, by_index)
    assert torch.equal(by_mask, lossmith.cross_entropy(logits, targets, mask=mask.int(), label_smoothing=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_mask_of_floats_that_are_0_and_1_is_a_mask(dtype):
    logits, targets = random_batch()
    mask = random_weight() < 1.2
    expected = lossmith.cross_entropy(logits, targets, mask=mask)
    assert torch.equal(lossmith.cross_entropy(logits, targets, mask=mask.to(dtype)), expected)
    criterion = lossmith.CrossEntropyLoss(shift=True)
    for name in ("mask", "attention_mask"):
        assert torch.equal(
            criterion(logits, targets, **{name: mask.to(dtype)}), criterion(logits, targets, mask=mask)
        )
    assert criterion.count(targets, mask=mask.to(dtype)) == criterion.count(targets, mask=mask)


def test_masks_of_sequences_and_pairs_may_be_floats():
    predictions, scores, mask = torch.rand(4), torch.rand(4), torch.tensor([1, 0, 1, 1])
    pipeline = lossmith.LossModifierPipeline(model_mode="sequence_scorer")
    expected = pipeline(predictions, scores, mask=mask)
    assert torch.equal(pipeline(predictions, scores, mask=mask.float()), expected)
    expected = lossmith.ranking_loss(predictions, scores, mask=mask)
    assert torch.equal(lossmith.ranking_loss(predictions, scores, mask=mask.float()), expected)
    for call in (pipeline, lossmith.ranking_loss):
        with pytest.raises(ValueError, match=r"mask must be 0 or 1 .*; got 0\.5 at position \(0,\)"):
            call(predictions, scores, mask=mask / 2)


def test_a_mask_of_floats_is_looked_at_without_waiting_where_the_loss_is_compiled():
    logits, targets = random_batch()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda mask: lossmith.cross_entropy(logits, targets, mask=mask), fullgraph=True, backend="aot_eager"
    )
    mask = (random_weight() < 1.2).float()
    assert torch.equal(compiled(mask), lossmith.cross_entropy(logits, targets, mask=mask))
    with pytest.raises(RuntimeError, match="mask must be 0 or 1"):
        compiled(mask / 2)
    torch._dynamo.reset()


def test_ids_under_the_mask_may_be_anything():
    logits, targets = random_batch()
    mask = targets != IGNORE
    expected = lossmith.cross_entropy(logits, targets)
    assert torch.equal(lossmith.cross_entropy(logits, targets.masked_fill(~mask, 12345), mask=mask), expected)


def test_a_token_of_weight_zero_contributes_nothing_even_if_its_loss_is_infinite():
    logits = torch.tensor([[0.0, 1.0], [-INF, 0.0]], requires_grad=True)
    weight = torch.tensor([1.0, 0.0])
    loss = lossmith.cross_entropy(logits, torch.tensor([0, 0]), token_weight=weight, reduction="sum")
    assert loss.item() == pytest.approx(math.log(1 + math.e))
    loss.backward()
    assert torch.equal(logits.grad[1], torch.zeros(2))


def test_a_single_token_without_leading_dimensions():
    logits, target = torch.tensor([0.0, 1.0, 2.0], requires_grad=True), torch.tensor(2)
    for reduction in ("mean", "sequence_mean", "sum", "none"):
        loss = lossmith.cross_entropy(logits, target, reduction=reduction)
        torch.testing.assert_close(loss, functional.cross_entropy(logits, target))
        assert loss.shape == ()


def test_targets_that_were_forgotten_to_be_shifted_are_pointed_out_once():
    input_ids = torch.randint(9, (2, 5))
    logits = torch.randn(2, 5, 9)
    labels = input_ids.masked_fill(torch.arange(5) < 2, -100)
    criterion = lossmith.CrossEntropyLoss()
    with pytest.warns(UserWarning, match="shift=True"):
        criterion(logits, labels, input_ids=input_ids)
    criterion(logits, labels, input_ids=input_ids)  # an error here if it warned again
    lossmith.CrossEntropyLoss(shift=True)(logits, labels, input_ids=input_ids)
    lossmith.CrossEntropyLoss()(logits, torch.full_like(labels, -100), input_ids=input_ids)
