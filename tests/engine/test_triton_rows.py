"""The Triton rows, interpreted on a CPU: as near the truth as PyTorch's rows, whatever the rows are."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from interpreted_case import patched_once, quiet  # noqa: F401

import lossmith
from lossmith.engine.rows import blocks, triton_rows
from lossmith.engine.statistics.raw import Needs
from lossmith.engine.sweep import Sweep
from slow_but import slow_but

pytestmark = quiet

INF, NAN = float("inf"), float("nan")
EVERYTHING = int(Needs.ENTROPY | Needs.SUM | Needs.TOP | Needs.COUNT | Needs.CANDIDATES)
# Of these nobody takes a gradient.
CONSTANTS = {"reference", "sum_weight", "target_weight", "num_finite", "top_wrong_id", "num_wrong"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 3, 17, 507]
READINGS = {
    "plain": {},
    "plain, all sums": {"needs": EVERYTHING & ~int(Needs.CANDIDATES), "weighted": True},
    "candidates": {"needs": int(Needs.CANDIDATES), "num_candidates": 5},
    "two views": {
        "needs": EVERYTHING,
        "needs_unscaled": EVERYTHING,
        "temperature": 0.7,
        "num_candidates": 19,
    },
    "capped": {"needs": EVERYTHING, "softcap": 5.0, "num_candidates": 3, "weighted": True},
    "capped, two views": {"needs": 1, "needs_unscaled": 3, "temperature": 3.0, "softcap": 30.0},
}


def batch(num_classes, dtype, *, seed=0, spread=3.0, num_rows=7, **reading):
    """Nasty rows and a sweep of them: masked classes, an ignored row of NaN, equal candidates."""
    rng = torch.Generator().manual_seed(seed)
    z = (spread * torch.randn(num_rows, num_classes, generator=rng)).to(dtype)
    y = torch.randint(num_classes, (num_rows,), generator=rng)
    z[1], y[1] = NAN, -100
    z[2] = torch.where(torch.rand(num_classes, generator=rng) < 0.5, -INF, z[2])
    z[3], z[3, y[3]] = -INF, 1.0  # nothing but the target
    z[4, : num_classes // 2] = torch.finfo(dtype).min  # a mask only where it is below -1e30: not in fp16
    z[5, y[5]] = -INF
    candidates = weight = None
    if num := reading.pop("num_candidates", 0):
        candidates = torch.randint(-1, num_classes, (num_rows, num), generator=rng)
        candidates[0] = y[0]
        candidates[6] = z[6].float().argmax()
        candidates[6, 0] = -1
    if reading.pop("weighted", False):
        weight = torch.rand(num_classes, generator=rng)
    temperature = reading.pop("temperature", None)
    temperature = None if temperature is None else torch.tensor(temperature)
    return z, Sweep(y, candidates, weight, temperature, **reading)


def widened(sweep):
    def wide(x):
        return None if x is None else x.double()

    return replace(sweep, class_weight=wide(sweep.class_weight), temperature=wide(sweep.temperature))


def statistics(backend, z, sweep):
    outputs = sweep.blank(
        blocks.accumulation_dtype(z.dtype), z.device, is_filled=not backend.WRITES_EVERY_ROW
    )
    if backend.WRITES_EVERY_ROW:
        for out in outputs:
            out.fill_(77)
    backend.fill_stats(z, sweep, sweep.views(outputs))
    return outputs


def upstream(sweep, raw, seed=1):
    """Gradients of the statistics; the last row has none."""
    rng = torch.Generator().manual_seed(seed)
    grads = []
    for name, value in zip(sweep.names, raw, strict=True):
        g = torch.randn(value.shape, generator=rng)
        g[-1] = 0
        grads.append(None if name in CONSTANTS else g)
    return grads


def gradient(backend, z, sweep, raw, grads, *, in_place=False):
    if backend is blocks:
        wanted = torch.stack(
            [(g != 0).flatten(1).any(1) if g.dim() > 1 else g != 0 for g in grads if g is not None]
        )
        sweep = replace(sweep, targets=sweep.targets.masked_fill(~wanted.any(0), -100))
    return backend.gradient(z, sweep, sweep.views(raw, grads), in_place=in_place)


def assert_as_near(found, naive, truth, what):
    """No further off than PyTorch's rows of the same precision, and a few units of the last place."""
    assert torch.equal(found.isnan(), truth.isnan()), what
    infinite = ~truth.isfinite()
    assert torch.equal(found.double()[infinite].nan_to_num(), truth[infinite].nan_to_num()), what
    found, naive, truth = (x.double()[~infinite] for x in (found, naive, truth))
    if not truth.numel():
        return
    eps = torch.finfo(torch.float32).eps
    allowed = (naive - truth).abs().max() + 4 * eps * truth.abs().clamp(min=1.0)
    assert ((found - truth).abs() <= allowed).all(), (
        what,
        (found - truth).abs().max(),
        (naive - truth).abs().max(),
    )


def check(z, sweep):
    ours, naive = statistics(triton_rows, z, sweep), statistics(blocks, z.float(), sweep)
    truth = statistics(blocks, z.double(), widened(sweep))
    for name, found, plain, exact in zip(sweep.names, ours, naive, truth, strict=True):
        assert found.dtype == plain.dtype
        if name in ("top_wrong_id", "num_finite", "num_wrong"):
            assert torch.equal(found, plain), name
        else:
            assert_as_near(found, plain, exact, name)
    grads = upstream(sweep, ours)
    wide = [None if g is None else g.double() for g in grads]
    exact = gradient(blocks, z.double(), widened(sweep), truth, wide)
    plain = gradient(blocks, z.float(), sweep, naive, grads)
    found = gradient(triton_rows, z, sweep, ours, grads)
    assert found.dtype == z.dtype
    # the interpreter cuts off what bf16 cannot hold, where a GPU rounds
    rounding = {torch.float32: 0.0, torch.float16: 0.5, torch.bfloat16: 1.0}[z.dtype] * torch.finfo(
        z.dtype
    ).eps
    # of the largest in the row: exp() of what is far below is 0 in fp32
    near = (plain - exact).abs().max() + 8 * torch.finfo(torch.float32).eps * exact.abs().amax(
        -1, keepdim=True
    )
    least = torch.finfo(z.dtype).smallest_normal
    assert ((found.double() - exact).abs() <= near + 1.01 * rounding * exact.abs() + least).all()
    for row in (1, len(z) - 1):
        assert not found[row].any()
    again = gradient(triton_rows, z.clone(), sweep, ours, grads, in_place=True)
    assert torch.equal(found, again)


# ── against the truth ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("num_classes", slow_but([1, 507], SIZES))
@pytest.mark.parametrize("reading", READINGS)
def test_statistics_and_gradient(reading, num_classes):
    dtype = DTYPES[(SIZES.index(num_classes) + list(READINGS).index(reading)) % 3]
    check(*batch(num_classes, dtype, **READINGS[reading]))


@pytest.mark.parametrize(
    ("reading", "dtype"),
    [("plain, all sums", torch.float16), ("two views", torch.bfloat16), ("capped", torch.float32)],
    ids=str,
)
def test_rows_of_many_tiles(reading, dtype):
    check(*batch(4097, dtype, **READINGS[reading]))


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**20),
    num_classes=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 0.3, 5.0, 30.0]),
    needs=st.integers(0, EVERYTHING),
    unscaled=st.integers(-1, EVERYTHING),
    temperature=st.sampled_from([None, 0.3, 2.0]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    weighted=st.booleans(),
    num_candidates=st.integers(1, 12),
)
def test_any_rows(
    seed, num_classes, dtype, spread, needs, unscaled, temperature, softcap, weighted, num_candidates
):
    reading = {"temperature": temperature, "softcap": softcap, "weighted": weighted}
    reading |= {"needs": needs, "needs_unscaled": unscaled, "num_candidates": num_candidates}
    check(*batch(num_classes, dtype, seed=seed, spread=spread, **reading))


@pytest.mark.parametrize(("gap", "place"), [(20.0, 700), (87.0, 0), (200.0, 1029)])
def test_a_wrong_answer_that_dominates(gap, place):
    z, sweep = batch(1030, torch.float32, needs=EVERYTHING, num_candidates=3)
    z[0, place], sweep.targets[0] = gap, 5
    check(z, sweep)
    log_sum = sweep.names.index("wrong_log_sum")
    found, exact = statistics(triton_rows, z, sweep), statistics(blocks, z.double(), sweep)
    torch.testing.assert_close(found[log_sum][0].double(), exact[log_sum][0], rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("temperature", [None, 0.3])
def test_a_common_offset(offset, temperature):
    z, sweep = batch(600, torch.float32, needs=EVERYTHING, num_candidates=3, temperature=temperature)
    check(z + offset, sweep)


@pytest.mark.parametrize("cap", [0.5, 5.0, 30.0])
def test_a_cap_keeps_its_digits(cap):
    """From where it is the identity to where it is flat."""
    z = torch.cat([torch.logspace(-6, 2, 40), -torch.logspace(-6, 2, 40)]).unsqueeze(1).repeat(1, 2)
    z[:, 1] = 0.25
    sweep = Sweep(torch.zeros(len(z), dtype=torch.long), softcap=cap)
    raw = statistics(triton_rows, z, sweep)
    exact = cap * torch.tanh(z[:, 0].double() / cap)
    torch.testing.assert_close(raw[1].double(), exact, rtol=4e-7, atol=0)
    grads = [None, torch.ones(len(z)), None]
    found = gradient(triton_rows, z, sweep, raw, grads)[:, 0]
    torch.testing.assert_close(found.double(), (z[:, 0].double() / cap).cosh() ** -2, rtol=1e-5, atol=1e-37)


# ── rows as nobody likes them ────────────────────────────────────────────────────────────────────────


def test_the_first_of_equal_answers_is_the_top_one():
    z = torch.zeros(3, 1500)
    z[0, [40, 700, 1400]], z[1, [1499, 513]] = 2.0, 2.0
    sweep = Sweep(torch.tensor([40, 3, 0]), needs=int(Needs.TOP))
    raw = dict(zip(sweep.names, statistics(triton_rows, z, sweep), strict=True))
    assert raw["top_wrong_id"].tolist() == [700, 513, 1]


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("place", [3, 900])
def test_a_broken_logit_is_not_hidden(poison, place):
    z = torch.randn(2, 1200)
    z[0, place] = poison
    for target in (place, 7):
        ids = torch.tensor([target, target])
        for candidates in (None, ids.unsqueeze(1)):
            stats = lossmith.token_stats(z, ids, candidates=candidates, backend="triton")
            stats.compute(
                "nll", "logsumexp", "entropy", *(["candidate_logits"] if candidates is not None else [])
            )
            for name in ("nll", "logsumexp", "entropy"):
                assert getattr(stats, name).isfinite().tolist() == [False, True]


def test_nobody_reads_what_is_ignored():
    z, sweep = batch(33, torch.float32, **READINGS["two views"])
    sweep = replace(sweep, targets=torch.full_like(sweep.targets, -100))
    ours, theirs = statistics(triton_rows, z * NAN, sweep), sweep.blank(torch.float32, z.device)
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(found, expected)
    assert not gradient(triton_rows, z * NAN, sweep, ours, upstream(sweep, ours)).any()


# ── where the rows lie ───────────────────────────────────────────────────────────────────────────────


def layouts(dtype):
    flat = torch.randn(4 * 6 * 2 * 71).to(dtype)
    whole = flat.view(4, 6, 2, 71)
    return {
        "shifted labels": whole[:, :-1].flatten(1, 2)[:, :-1],
        "two strides": whole[:, :, 0],
        "transposed": whole.transpose(0, 2),
        "expanded": whole[0, 0].expand(5, 2, 71),
        "some columns": whole[..., 3:60],
        "off by an element": flat[1 : 1 + 6 * 70].view(6, 70),
        "one row": whole[1, 2, 1],
        "negated": torch._neg_view(whole[:, 0]),
    }


@pytest.mark.parametrize("name", layouts(torch.float32))
def test_rows_are_read_where_they_are(name):
    z = layouts(torch.bfloat16)[name]
    assert triton_rows.takes(z, None, True)
    sweep = Sweep(torch.randint(z.shape[-1], (z.shape[:-1].numel(),)), needs=int(Needs.SUM | Needs.TOP))
    copy = z.clone(memory_format=torch.contiguous_format).resolve_neg()
    ours, theirs = statistics(triton_rows, z, sweep), statistics(triton_rows, copy, sweep)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)  # tiles begin elsewhere
    grads = upstream(sweep, ours)
    a, b = (gradient(triton_rows, given, sweep, ours, grads) for given in (z, copy))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_more_than_the_rows_is_written(dtype):
    """A gradient in place, of rows that lie apart and begin anywhere."""
    memory = torch.full((1 + 5 * 530,), 9.0).to(dtype)
    z = memory[1:].view(5, 530)[:, 2:519]
    z.copy_(torch.randn(5, 517))
    sweep = Sweep(torch.tensor([3, -100, 0, 516, 7]), torch.tensor([[-1, 516]] * 5), needs=EVERYTHING)
    raw = statistics(triton_rows, z, sweep)
    grads = upstream(sweep, raw)
    expected = gradient(triton_rows, z.clone(), sweep, raw, grads)
    assert torch.equal(gradient(triton_rows, z, sweep, raw, grads, in_place=True), expected)
    outside = memory[1:].view(5, 530)
    assert (outside[:, :2] == 9).all()
    assert (outside[:, 519:] == 9).all()
    assert memory[0] == 9


def test_gradients_of_any_stride():
    z, sweep = batch(17, torch.float32, needs=3)
    raw = statistics(triton_rows, z, sweep)
    grads = [None if g is None else torch.ones(()).expand_as(g) for g in upstream(sweep, raw)]
    copies = [None if g is None else g.clone() for g in grads]
    assert torch.equal(*(gradient(triton_rows, z, sweep, raw, g) for g in (grads, copies)))
