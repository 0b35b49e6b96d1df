"""Ids: of any integer dtype, refused where they are none, and checked again before anything is indexed."""

import numpy as np
import pytest
import torch

import lossmith
from lossmith import Objective, Term, UnifiedLoss
from lossmith.engine.rows import native_rows
from lossmith.engine.sweep import Sweep

pytestmark = pytest.mark.usefixtures("arithmetic")

V = 50
WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
NO_IDS = [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.complex64]


def batch(dtype: torch.dtype = torch.int64):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 12, V, generator=rng, requires_grad=True)
    return logits, torch.randint(V, (2, 12), generator=rng).to(dtype)


def head_of(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    weight = torch.eye(V).requires_grad_()
    return {"hidden_states": logits, "lm_head_weight": weight}


def unlikely(ids, **options):
    """A term that reads the logits of these candidates."""
    return Term(
        "seen",
        lambda s, b: -s.candidate_log1m_prob.sum(-1),
        candidates=lambda b: ids(b),
        scope="token",
        **options,
    )


# Every way from candidates to a loss.
WAYS = {
    "logits": lambda criterion, logits, targets: criterion(logits, targets),
    "one sweep": lambda criterion, logits, targets: criterion(
        targets=targets, strategy="one_sweep", **head_of(logits)
    ),
    "two sweeps": lambda criterion, logits, targets: criterion(
        targets=targets, strategy="two_sweep", **head_of(logits)
    ),
}


# -- of any integer dtype --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_input_ids_of_any_integer_dtype(dtype):
    logits, ids = batch()
    criterion = UnifiedLoss(vocab_size=V, use_ngram_penalty=True, ngram_size=2)
    found = []
    for given in (ids, ids.to(dtype)):
        loss = criterion(logits, ids.roll(-1, -1), input_ids=given)
        found.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_candidates_of_any_integer_dtype(way, dtype):
    logits, targets = batch()
    found = []
    for of_dtype in (torch.int64, dtype):
        criterion = Objective(
            [unlikely(lambda b, d=of_dtype: torch.stack([b.targets, (b.targets + 3) % V], -1).to(d))]
        )
        loss = WAYS[way](criterion, logits, targets)
        found.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_targets_and_candidates_of_token_stats(dtype):
    logits, targets = batch()
    exact = lossmith.token_stats(logits, targets, candidates=targets.unsqueeze(-1))
    stats = lossmith.token_stats(logits, targets.to(dtype), candidates=targets.unsqueeze(-1).to(dtype))
    assert torch.equal(stats.nll, exact.nll)
    assert torch.equal(stats.candidate_log1m_prob, exact.candidate_log1m_prob)


# -- no ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NO_IDS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_candidates_that_are_no_ids_name_their_term(way, dtype):
    criterion = Objective([unlikely(lambda b: torch.zeros(len(b.targets), 2, dtype=dtype))])
    with pytest.raises(TypeError, match=rf"candidates of the term 'seen' must be integer.*got {dtype}"):
        WAYS[way](criterion, *batch())


@pytest.mark.parametrize("shape", [(24,), (23, 2), (12, 2), (2, 12, 2), (48, 1)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_candidates_of_other_tokens_name_their_term(way, shape):
    criterion = Objective([unlikely(lambda b: torch.zeros(shape, dtype=torch.int32))])
    with pytest.raises(ValueError, match=r"candidates of the term 'seen' must be \[\.\.\., K\].*\[24\]"):
        WAYS[way](criterion, *batch())


def test_candidates_that_are_no_tensor():
    criterion = Objective([unlikely(lambda b: [[1]] * 24)])
    with pytest.raises(TypeError, match=r"candidates of the term 'seen' must be a tensor.*got list"):
        criterion(*batch())


@pytest.mark.parametrize("name", ["input_ids", "segment_ids"])
@pytest.mark.parametrize("dtype", NO_IDS, ids=str)
def test_ids_of_the_inputs_that_are_none(name, dtype):
    logits, ids = batch()
    criterion = UnifiedLoss(vocab_size=V, use_ngram_penalty=True)
    with pytest.raises(TypeError, match=rf"{name} must be integer ids; got {dtype}"):
        criterion(logits, ids, **{"input_ids": ids.roll(1, -1), name: ids.to(dtype)})


@pytest.mark.parametrize("dtype", NO_IDS, ids=str)
def test_candidates_of_token_stats_that_are_no_ids(dtype):
    logits, targets = batch()
    with pytest.raises(TypeError, match=rf"candidates must be integer class ids; got {dtype}"):
        lossmith.token_stats(logits, targets, candidates=targets.unsqueeze(-1).to(dtype))
    with pytest.raises(TypeError, match=rf"candidates must be integer class ids; got {dtype}"):
        lossmith.linear_token_stats(logits, torch.eye(V), targets, candidates=targets.unsqueeze(-1).to(dtype))


@pytest.mark.parametrize("name", ["targets", "candidates"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32], ids=str)
def test_the_operators_refuse_what_the_door_would_have_converted(name, dtype):
    logits, targets = batch()
    ids = {"targets": targets, "candidates": targets.unsqueeze(-1)}
    ids[name] = ids[name].to(dtype)
    options = (None, None, None, -100, 16, -1)
    with pytest.raises(TypeError, match=rf"{name} as torch.int64; got {dtype}"):
        torch.ops.lossmith.row_stats(logits, ids["targets"], ids["candidates"], *options)
    given = (logits.reshape(24, V), torch.eye(V), None, ids["targets"].reshape(-1))
    with pytest.raises(TypeError, match=rf"{name} as torch.int64; got {dtype}"):
        torch.ops.lossmith.head_stats(*given, ids["candidates"].reshape(24, 1), *options, torch.float32, None)


def test_the_operators_refuse_ids_of_other_tokens():
    logits, targets = batch()
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.lossmith.row_stats(logits, targets[:, 1:], None, None, None, None, -100, 0, -1)
    with pytest.raises(ValueError, match="are not of targets"):
        torch.ops.lossmith.row_stats(
            logits, targets, targets.reshape(-1, 1)[:9], None, None, None, -100, 16, -1
        )


# -- ids that change while they are in use -----------------------------------------------------------


def from_numpy(ids: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    memory = ids.numpy().copy()
    return memory, torch.from_numpy(memory)


BAD = [V, 10**9, -1, -(10**12), 2**62]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("has_head", [False, True])
def test_targets_written_over_through_numpy(has_head, bad):
    """Memory that is shared with NumPy has no version counter."""
    logits, targets = batch()
    memory, targets = from_numpy(targets)
    stats = (
        lossmith.linear_token_stats(logits, torch.eye(V), targets, memory_budget=5 * V * 4)
        if has_head
        else lossmith.token_stats(logits, targets)
    )
    loss = stats.compute("nll", "entropy").nll.sum() + stats.entropy.sum()
    memory[1, 3] = bad
    with pytest.raises(RuntimeError, match=rf"targets were written over.*{bad} now.*NumPy"):
        loss.backward()


@pytest.mark.parametrize("bad", [b for b in BAD if b != -1])  # which is none
@pytest.mark.parametrize("has_head", [False, True])
def test_candidates_written_over_through_numpy(has_head, bad):
    logits, targets = batch()
    memory, candidates = from_numpy(torch.stack([targets, (targets + 1) % V], -1))
    stats = (
        lossmith.linear_token_stats(logits, torch.eye(V), targets, candidates=candidates)
        if has_head
        else lossmith.token_stats(logits, targets, candidates=candidates)
    )
    loss = stats.compute("candidate_log1m_prob").candidate_log1m_prob.sum()
    memory[1, 3, 1] = bad
    with pytest.raises(RuntimeError, match=rf"candidates were written over.*{bad} now"):
        loss.backward()


def test_saved_ids_of_the_top_wrong_answers_are_not_trusted_either(arithmetic):
    logits, targets = batch()
    needs = 4
    raw = torch.ops.lossmith.row_stats(logits, targets, None, None, None, None, -100, needs, -1)
    grads = [None, None, torch.ones(24), torch.ones(24), None]
    raw[4][5] = V + 7
    with pytest.raises(RuntimeError, match="written over" if arithmetic == "compiled" else "out of bounds"):
        torch.ops.lossmith.row_grad(
            logits, targets, None, None, None, None, -100, needs, -1, list(raw), grads
        )


# -- whatever the compiled rows are given, they are asked about it first ------------------------------


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("class_weight", torch.ones(V - 1)),
        ("class_weight", torch.ones(V, dtype=torch.float64)),
        ("targets", torch.zeros(23, dtype=torch.int64)),
        ("candidates", torch.zeros(24, 3, dtype=torch.int32)),
        ("gradient", torch.empty(24, V - 1)),
        ("gradient", torch.empty(24, V, dtype=torch.bfloat16)),
        ("gradient", torch.empty(V, 24).t()),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{list(x.shape)} {x.dtype}",
)
def test_the_compiled_rows_refuse_memory_that_is_not_what_they_take_it_for(place, value, arithmetic):
    if arithmetic == "pytorch":
        pytest.skip("PyTorch asks by itself")
    logits, targets = batch()
    given = {"targets": targets.reshape(-1), "candidates": None, "class_weight": None} | {place: value}
    gradient = given.pop("gradient", None)
    with pytest.raises(ValueError, match="the compiled code takes"):
        native_rows.run(logits.detach().reshape(24, V), Sweep(**given), [], gradient)
