"""What an objective reads is declared: one pass, whatever is switched on and whenever it is."""

import copy

import pytest
import torch

import lossmith
from lossmith import Term

V, D = 23, 6


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
def test_one_pass_each_way_on_every_batch(make, count_ops):
    criterion = make()
    for number, (logits, targets) in enumerate(batches()):
        logits.requires_grad_()
        with count_ops as ops:
            criterion(logits, targets).backward()
        assert ops.passes == (number + 1, number + 1)


def test_modifiers_share_it(count_ops):
    pipeline = lossmith.LossModifierPipeline(
        [lossmith.EntropyModifier({"use_for_weighting": True}), lossmith.TargetSmoothingModifier({})],
        base=everything(),
    )
    for number, (logits, targets) in enumerate(batches()):
        with count_ops as ops:
            pipeline(logits, targets)
            pipeline.get_all_metrics()
        assert ops.passes[0] == number + 1


def test_each_term_is_run_once_on_a_batch():
    runs = []
    term = Term("counted", lambda s, b: (runs.append(len(s.nll)), s.nll)[1])
    logits, targets = next(batches())
    lossmith.Objective([term])(logits, targets)
    assert runs == [24]


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
        given = (
            {"hidden_states": logits[..., :D], "lm_head_weight": weight} if of_head else {"logits": logits}
        )
        found, expected = (loss(**given, targets=targets, return_detailed=True) for loss in (switched, fresh))
        assert found.keys() == expected.keys()
        for name in found:
            assert torch.equal(found[name], expected[name]), (number, name)


HEAD = {"hidden_states": torch.randn(3, 8, D).requires_grad_(), "lm_head_weight": torch.randn(V, D)}
IDS = torch.randint(V, (3, 8))
CHUNKS = {"strategy": "one_sweep", "memory_budget": 2 * V * 4}


def of_head(criterion, **options):
    return criterion(targets=IDS, **HEAD, **options)


def of_logits(criterion):
    return criterion(HEAD["hidden_states"] @ HEAD["lm_head_weight"].t(), IDS)


def test_a_modifier_switched_on_after_the_first_batch():
    pipeline = lossmith.LossModifierPipeline([lossmith.TargetSmoothingModifier({"enabled": False})])
    plain = of_head(pipeline, **CHUNKS)
    (modifier,) = pipeline.modifiers
    modifier.enabled = True
    smoothed = of_head(pipeline, **CHUNKS)
    assert smoothed != plain
    torch.testing.assert_close(smoothed, of_logits(pipeline))


def test_a_setting_replaced_after_the_first_batch():
    criterion = lossmith.CrossEntropyLoss()
    for criterion.label_smoothing in (0.0, 0.1, 0.0):
        torch.testing.assert_close(of_head(criterion, **CHUNKS), of_logits(criterion))


def test_a_term_that_differs_between_training_and_evaluation():
    class Careful(lossmith.Objective):
        def terms(self, token_loss=None):
            sure = Term("sure", lambda s, b: s.nll, reads=("nll",), scope="token")
            flat = Term("flat", lambda s, b: -s.entropy, reads=("entropy",), scope="token")
            return [sure, flat] if self.training else [sure]

    criterion = Careful()
    for criterion.training in (False, True, False, True):
        torch.testing.assert_close(of_head(criterion, **CHUNKS), of_logits(criterion))


@pytest.mark.parametrize("scope", ["batch", "token"])
def test_a_term_that_reads_by_value(scope):
    state = {}
    options = {} if scope == "batch" else CHUNKS
    criterion = lossmith.Objective([Term("own", lambda s, b: getattr(s, state["reads"]), scope=scope)])
    for state["reads"] in ("nll", "entropy", "top_prob", "nll"):
        torch.testing.assert_close(of_head(criterion, **options), of_logits(criterion))


def test_two_closures_of_the_same_code():
    """What another closure captured says nothing about this one."""

    def contrasted(c):
        return Term("t", lambda s, b: s.nll * (1 + c * s.nll / s.nll.mean()))

    for c in (0.0, 1.0):
        criterion = lossmith.Objective([contrasted(c)])
        losses = [of_head(criterion, memory_budget=2 * V * 4), of_logits(criterion)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, HEAD["hidden_states"]) for loss in losses))


def test_what_a_term_captured_is_nobodys_business():
    def refers_to_itself(s, b):
        return s.nll if refers_to_itself else s.entropy

    def of_a_cell_without_a_value():
        def loss(s, b):
            return s.nll if True else later

        return loss
        later = 0

    for loss in (refers_to_itself, of_a_cell_without_a_value()):
        criterion = lossmith.Objective([Term("t", loss, scope="token")])
        torch.testing.assert_close(of_head(criterion, **CHUNKS), of_logits(criterion))


def test_a_schedule_that_begins_to_look_at_the_batch():
    class Schedule:
        step = 0

        def loss(self, stats, batch):
            return stats.nll if self.step == 0 else stats.nll * stats.nll.detach() / stats.nll.detach().mean()

    schedule = Schedule()
    criterion = lossmith.Objective([Term("scheduled", schedule.loss)])
    for schedule.step in (0, 1):
        losses = [of_head(criterion, memory_budget=2 * V * 4), of_logits(criterion)]
        torch.testing.assert_close(*(torch.autograd.grad(loss, HEAD["hidden_states"]) for loss in losses))


@pytest.mark.parametrize("options", [{}, CHUNKS])
def test_reading_what_is_not_declared_is_an_error_that_names_it(options):
    criterion = lossmith.Objective([Term("own", lambda s, b: s.entropy, reads=("nll",), scope="token")])
    with pytest.raises(ValueError, match=r"'own' reads the statistic 'entropy'.*reads=\('nll', 'entropy'\)"):
        of_head(criterion, **options)
    with pytest.raises(ValueError, match="'own' reads the statistic 'entropy'"):
        of_logits(criterion)


def test_one_term_cannot_live_on_what_another_declares():
    terms = [
        Term("a", lambda s, b: s.entropy, reads=("entropy",), scope="token"),
        Term("b", lambda s, b: s.entropy, reads=("nll",), scope="token"),
    ]
    with pytest.raises(ValueError, match="'b' reads the statistic 'entropy'"):
        of_head(lossmith.Objective(terms), **CHUNKS)


def test_a_declaration_that_cannot_be():
    def loss(s, b):
        return s.nll

    with pytest.raises(ValueError, match="no statistic 'entropi'"):
        Term("t", loss, reads=("entropi",))
    with pytest.raises(TypeError, match=r"reads must be a list of texts or None; got 'nll'.*Of one, write"):
        Term("t", loss, reads="nll")
    with pytest.raises(ValueError, match="scope must be one of 'token', 'batch'; got 'tokens'"):
        Term("t", loss, scope="tokens")


def test_a_statistic_at_temperature_one_is_declared_by_that_name():
    plain = Term("t", lambda s, b: s.unscaled.nll, reads=("unscaled.nll",), scope="token")
    mistaken = Term("t", lambda s, b: s.unscaled.nll, reads=("nll",), scope="token")
    torch.testing.assert_close(
        of_head(lossmith.Objective([plain], temperature=1.5), **CHUNKS),
        of_logits(lossmith.CrossEntropyLoss()),
    )
    with pytest.raises(ValueError, match=r"reads the statistic 'unscaled\.nll'"):
        of_head(lossmith.Objective([mistaken], temperature=1.5), **CHUNKS)


def test_nothing_of_it_is_saved():
    criterion = everything()
    before = set(vars(criterion))
    for logits, targets in batches():
        criterion(logits, targets)
    assert set(vars(criterion)) == before
    copy.deepcopy(criterion)
