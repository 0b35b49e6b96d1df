"""What an objective remembers of the batches before: which statistics its terms read, and nothing else."""

import copy

import pytest
import torch

import lossmith
from lossmith import evaluation

V, D = 23, 6


@pytest.fixture
def count_first_runs(monkeypatch):
    """How often terms were run on blank statistics."""
    runs = []
    read = evaluation._Pass._read
    monkeypatch.setattr(evaluation._Pass, "_read", lambda self, blank: (runs.append(1), read(self, blank)))
    return runs


def batches():
    rng = torch.Generator().manual_seed(0)
    for _ in range(4):
        yield torch.randn(3, 8, V, generator=rng), torch.randint(V, (3, 8), generator=rng)


def everything():
    return lossmith.UnifiedLoss(
        V,
        label_smoothing=0.1,
        z_loss=0.01,
        initial_temperature=1.2,
        use_ngram_penalty=True,
        use_focal_loss=True,
        use_auxiliary_loss=True,
    )


@pytest.mark.parametrize("make", [lossmith.CrossEntropyLoss, lossmith.NVAMPLoss, everything])
def test_terms_are_run_on_blanks_once(make, count_first_runs, count_ops):
    criterion = make()
    for number, (logits, targets) in enumerate(batches()):
        logits.requires_grad_()
        with count_ops as ops:
            criterion(logits, targets).backward()
        assert ops.passes == (number + 1, number + 1)
    assert len(count_first_runs) == 1


def test_modifiers_too(count_first_runs, count_ops):
    pipeline = lossmith.LossModifierPipeline(
        [lossmith.EntropyModifier({"use_for_weighting": True}), lossmith.TargetSmoothingModifier({})],
        base=everything(),
    )
    for number, (logits, targets) in enumerate(batches()):
        with count_ops as ops:
            pipeline(logits, targets)
        assert ops.passes[0] == number + 1
    assert len(count_first_runs) == 1


@pytest.mark.parametrize("of_head", [False, True])
def test_what_is_switched_on_or_off_later_is_as_if_it_had_been_from_the_first(of_head):
    """Also in the last digit: what is computed together depends on what is read."""
    switched, weight = everything(), torch.randn(V, D)
    for number, (logits, targets) in enumerate(batches()):
        base = switched.base
        base.confidence_penalty = 0.1 * (number % 2)
        base.z_loss = 0.01 * (number < 2)
        switched.components["ngram_penalty"].weight = float(number != 1)
        fresh = copy.deepcopy(switched)
        fresh._memory = {}
        given = (
            {"hidden_states": logits[..., :D], "lm_head_weight": weight} if of_head else {"logits": logits}
        )
        found, expected = (loss(**given, targets=targets, return_detailed=True) for loss in (switched, fresh))
        assert found.keys() == expected.keys()
        for name in found:
            assert torch.equal(found[name], expected[name]), (number, name)


def test_a_reading_that_changes_is_found_out(count_ops):
    """A term that reads now this and now that is right all the same, and wastes no passes for long."""
    state = {"reads": "nll"}
    criterion = lossmith.Objective([lossmith.Term("own", lambda stats, _: getattr(stats, state["reads"]))])
    (logits, targets), *_ = batches()
    for name in ("nll", "nll", "entropy", "nll", "entropy"):
        state["reads"] = name
        expected = getattr(lossmith.token_stats(logits, targets).compute(name), name).mean()
        torch.testing.assert_close(criterion(logits, targets), expected)
    with count_ops as ops:
        criterion(logits, targets)
    assert ops.passes == (1, 0)


def test_nothing_of_it_is_saved():
    criterion = everything()
    for logits, targets in batches():
        criterion(logits, targets)
    assert not any("memory" in name for name in criterion.state_dict())
    copy.deepcopy(criterion)
