"""``shift``: how many steps ahead logits predict, of every objective, and what is refused."""

import pytest
import torch
from torch.nn import functional as F

import lossmith
from lossmith.equation.batch import align
from lossmith.terms.candidates import context

B, T, V = 3, 7, 11
IGNORE = -100


def batch_of() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (B, T), generator=rng)
    labels[0, 2] = labels[2, 6] = IGNORE
    return torch.randn(B, T, V, generator=rng), labels


def by_hand(logits: torch.Tensor, labels: torch.Tensor, steps: int) -> torch.Tensor:
    """Cross-entropy of logits[t] at labels[t + steps]."""
    ahead = F.pad(labels[:, steps:], (0, min(steps, T)), value=IGNORE)
    total = F.cross_entropy(logits.flatten(0, 1), ahead.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (ahead != IGNORE).sum().clamp(min=1)


OBJECTIVES = {
    "cross_entropy": lossmith.CrossEntropyLoss,
    "unified": lambda shift: lossmith.UnifiedLoss(V, shift=shift),
    "nvamp": lambda shift: lossmith.NVAMPLoss(alpha=0.0, beta=1.0, gamma=0.0, shift=shift),
    "pipeline": lambda shift: lossmith.LossModifierPipeline(base=lossmith.CrossEntropyLoss(shift=shift)),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("shift", [False, True, 0, 1, 2, 3, T, T + 5])
def test_logits_predict_the_targets_so_many_steps_ahead(kind, shift):
    logits, labels = batch_of()
    expected = by_hand(logits, labels, int(shift))
    criterion = OBJECTIVES[kind](shift=shift)
    torch.testing.assert_close(criterion(logits, labels), expected)
    torch.testing.assert_close(
        OBJECTIVES[kind](shift=None).evaluate(logits, labels, shift=shift).total, expected
    )
    assert criterion.count(labels) == (labels[:, int(shift) :] != IGNORE).sum()


def test_the_functions_shift_alike():
    logits, labels = batch_of()
    hidden, weight = torch.randn(B, T, 4), torch.randn(V, 4)
    for shift in (True, 2):
        expected = by_hand(logits, labels, int(shift))
        torch.testing.assert_close(lossmith.cross_entropy(logits, labels, shift=shift), expected)
        torch.testing.assert_close(lossmith.perplexity(logits, labels, shift=shift), expected.exp())
        corpus = lossmith.Perplexity(shift=shift)
        corpus.update(logits, labels)
        assert corpus.compute() == pytest.approx(expected.exp().item(), rel=1e-5)
        found = lossmith.linear_cross_entropy(hidden, weight, labels, shift=shift)
        torch.testing.assert_close(found, by_hand(hidden @ weight.T, labels, int(shift)))


def test_a_plan_counts_the_tokens_that_are_left():
    head = {"hidden_states": torch.randn(B, T, 4), "lm_head_weight": torch.randn(V, 4)}
    labels = batch_of()[1]
    for shift in (0, 2):
        found = lossmith.CrossEntropyLoss().plan(targets=labels, shift=shift, **head)
        assert found == lossmith.CrossEntropyLoss(shift=shift).plan(targets=labels, **head)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_one_call_may_shift_otherwise(kind):
    """By the call, whatever the objective says, which stays as it is."""
    logits, labels = batch_of()
    for own in (None, False, True, 2):
        criterion = OBJECTIVES[kind](shift=own)
        for shift in (False, 1, 2):
            expected = by_hand(logits, labels, int(shift))
            torch.testing.assert_close(criterion.evaluate(logits, labels, shift=shift).total, expected)
            assert criterion.count(labels, shift=shift) == (labels[:, int(shift) :] != IGNORE).sum()
        torch.testing.assert_close(criterion(logits, labels), by_hand(logits, labels, int(own or 0)))
        assert criterion.shift is own


@pytest.mark.parametrize("shift", ["no", "False", 1.0, -1, torch.tensor(1), [1]])
def test_what_is_no_number_of_steps_is_refused(shift):
    logits, labels = batch_of()
    message = r"shift must be True, False(,| or) a whole number >= 0"
    for make in (lossmith.Objective, lossmith.CrossEntropyLoss, lossmith.NVAMPLoss):
        with pytest.raises((TypeError, ValueError), match=message):
            make(shift=shift)
    with pytest.raises((TypeError, ValueError), match=message):
        lossmith.UnifiedLoss(V, shift=shift)
    for call in (lossmith.cross_entropy, lossmith.CrossEntropyLoss().evaluate):
        with pytest.raises((TypeError, ValueError), match=message):
            call(logits, labels, shift=shift)
    with pytest.raises((TypeError, ValueError), match=message):
        align(labels, shift=None)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:MaskRatioWeightModifier weighs all samples alike")
def test_positions_without_a_target_are_as_many_as_steps():
    labels = batch_of()[1]
    assert [align(labels, shift=k).num_positions for k in (False, True, 2, T + 5)] == [T, T - 1, T - 2, 0]
    weigher = lossmith.MaskRatioWeightModifier({})
    pipeline = lossmith.LossModifierPipeline([weigher], base=lossmith.CrossEntropyLoss(shift=2))
    pipeline(torch.randn(B, T, V), labels.clamp(min=0))
    assert weigher.get_metrics()["mean_mask_ratio"] == 1.0


def test_what_was_read_is_known_from_the_targets():
    """Without input_ids: the label at a position is the target of so many steps before."""
    labels = batch_of()[1].clamp(min=0)
    for shift in (1, 2):
        tokens, _ = context(align(labels, shift=shift))
        assert torch.equal(tokens[:, shift:], labels[:, shift:])
        assert (tokens[:, :shift] == -1).all()


def test_a_judge_sees_what_is_drawn_where_it_stands():
    seen = []
    judge = lossmith.SequenceScoringJudgeWeightModifier(
        {"judge": lambda ids: seen.append(ids) or torch.zeros(len(ids))}
    )
    pipeline = lossmith.LossModifierPipeline([judge], base=lossmith.CrossEntropyLoss(shift=2))
    labels = torch.arange(T).expand(B, T)
    certain = 50.0 * F.one_hot((labels + 4) % V, V)  # at t always the token t + 4
    pipeline(certain, labels, input_ids=labels)
    assert seen[0].tolist() == [[0, 1, 4, 5, 6, 7, 8]] * B


def test_equal_tokens_under_a_shift_are_no_mistake():
    """Where all tokens are the same, shifted labels equal the inputs, and nobody forgot to shift them."""
    ids = torch.full((B, T), 4)
    lossmith.CrossEntropyLoss(shift=True)(torch.randn(B, T, V), ids, input_ids=ids)  # a warning is an error


def test_a_sequence_scorer_has_nothing_to_shift():
    pipeline = lossmith.LossModifierPipeline(model_mode="SEQUENCE_SCORER")
    with pytest.raises(TypeError, match="a sequence scorer has none"):
        pipeline.evaluate(torch.rand(4), torch.rand(4), shift=True)
