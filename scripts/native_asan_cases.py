"""What ``scripts/native_asan`` runs under the sanitizers: as many odd inputs as there are ways in.

Every storage is exactly as large as what is read of it, with one element before it, so that an access just
outside is seen. Prints how many cases there were; a report ends the process.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import lossmith
from lossmith.engine.head import native_products
from lossmith.engine.native import build
from lossmith.engine.rows import native_rows
from lossmith.engine.rows.operators import row_grad_op, row_stats_op
from lossmith.engine.statistics.raw import raw_names
from lossmith.engine.sweep import Sweep
from lossmith.equation.weighing import weighed_sums

warnings.simplefilter("ignore")
INF, NAN = float("inf"), float("nan")
CLASSES = (1, 2, 15, 16, 17, 33, 1000)
HALF = torch.bfloat16
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)
RNG = torch.Generator().manual_seed(0)


def exactly(x: Tensor) -> Tensor:
    """The same numbers at the end of memory of their own, off by one element."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    memory[1:] = x.reshape(-1)
    return memory[1:].view(x.shape)


# -- rows ---------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "off by one": exactly,
    "columns of a wider one": lambda z: exactly(torch.cat([z, z[..., :3]], -1))[..., : z.shape[-1]],
    "the last columns": lambda z: exactly(torch.cat([z[..., :3], z], -1))[..., min(3, z.shape[-1]) :],
    "rows the other way round": lambda z: exactly(z.transpose(0, 1).contiguous()).transpose(0, 1),
    "one row for all": lambda z: exactly(z[:1, :1]).expand(z.shape),
    "every other row": lambda z: exactly(z.repeat_interleave(2, 1))[:, ::2],
}
CONTENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "numbers": lambda z: z,
    "masked classes": lambda z: z.masked_fill(torch.rand(z.shape, generator=RNG) < 0.6, -INF),
    "nothing but masked classes": lambda z: torch.full_like(z, -INF),
    "NaN and infinities": lambda z: z.masked_fill(torch.rand(z.shape, generator=RNG) < 0.3, NAN).index_fill(
        0, torch.tensor([1]), INF
    ),
    "large": lambda z: (z * 1e36).to(z.dtype),
}


def rows() -> Iterator[None]:
    """Every layout, content, vocabulary and number of candidates; with and without ignored rows."""
    for num_classes, dtype, layout, content, num_candidates, ignored in itertools.product(
        CLASSES, (torch.float32, HALF), LAYOUTS, CONTENTS, (None, 0, 3), ("none", "some", "all")
    ):
        z = LAYOUTS[layout](CONTENTS[content](torch.randn(2, 5, num_classes, generator=RNG).to(dtype)))
        targets = torch.randint(num_classes, (2, 5), generator=RNG)
        if ignored != "none":
            targets[0 if ignored == "some" else slice(None)] = -100
        candidates = None
        if num_candidates is not None:
            candidates = exactly(torch.randint(-1, num_classes, (2, 5, num_candidates), generator=RNG))
        weight = exactly(torch.rand(num_classes, generator=RNG)) if len(layout) % 2 else None
        temperature = torch.tensor(0.7) if len(content) % 2 else None
        needs = int(torch.randint(16, (), generator=RNG)) + (0 if candidates is None else 16)
        both_ways(z, exactly(targets), candidates, weight, temperature, needs)
        yield


def both_ways(
    z: Tensor,
    targets: Tensor,
    candidates: Tensor | None,
    weight: Tensor | None,
    temperature: Tensor | None,
    needs: int,
) -> None:
    """Statistics of both views, and the gradient from any of theirs."""
    assert native_rows.takes(z, None)
    given = (z, targets, candidates, weight, temperature, None, -100, needs, needs)
    raw = row_stats_op(*given)
    names = [*raw_names(needs), *raw_names(needs)]
    known = {"target_logit", "wrong_log_sum", "wrong_entropy", "centered_sum", "top_wrong_logit"}
    known |= {"candidate_logits", "rest_log_sum"}
    grads = [
        exactly(torch.randn(value.shape, generator=RNG)) if name in known else None
        for name, value in zip(names, raw, strict=True)
    ]
    row_grad_op(*given, [exactly(value) for value in raw], grads)


def ids_of_every_dtype() -> Iterator[None]:
    """Through the door, and refused behind it."""
    for num_classes, dtype, logits_dtype in itertools.product(CLASSES, WHOLE, (torch.float32, HALF)):
        z = exactly(torch.randn(6, num_classes, generator=RNG).to(logits_dtype)).requires_grad_()
        most = min(num_classes, torch.iinfo(dtype).max)
        ids = exactly(torch.randint(most, (6, 2), generator=RNG).to(dtype))
        stats = lossmith.token_stats(z, ids[:, 0], candidates=ids)
        (stats.nll.sum() + stats.candidate_log1m_prob.nan_to_num(0, 0, 0).sum()).backward()
        if dtype != torch.int64:
            expect(TypeError, lambda z=z, y=ids[:, 0]: row_stats_op(z, y, *[None] * 4, -100, 0, -1))
        yield
    for num_classes, dtype in itertools.product(CLASSES, (torch.float32, torch.float64, torch.bool)):
        z = torch.randn(6, num_classes, generator=RNG)
        ids = exactly(torch.ones(6, 2, dtype=dtype))
        expect(TypeError, lambda z=z, y=ids: lossmith.token_stats(z, y[:, 0].long() * 0, candidates=y))
        yield


def ids_written_over() -> Iterator[None]:
    """Between forward and backward, in memory that has no version counter."""
    bad_ids = (-1, -2, -(2**40), -(2**63), 10**6, 2**40, 2**63 - 1)
    for num_classes, dtype, which, bad, strategy in itertools.product(
        CLASSES, (torch.float32, HALF), ("targets", "candidates"), (*bad_ids, "V"), ("logits", "head")
    ):
        bad = num_classes if bad == "V" else int(bad)
        z = torch.randn(6, num_classes, generator=RNG).to(dtype).requires_grad_()
        memory = {
            "targets": torch.randint(num_classes, (6,), generator=RNG).numpy(),
            "candidates": torch.randint(num_classes, (6, 2), generator=RNG).numpy(),
        }
        ids = {name: torch.from_numpy(array) for name, array in memory.items()}
        if strategy == "head":
            identity = torch.eye(num_classes, dtype=dtype)
            stats = lossmith.linear_token_stats(z, identity, **ids, memory_budget=4 * num_classes * 4)
        else:
            stats = lossmith.token_stats(z, **ids)
        loss = stats.compute("nll", "candidate_log1m_prob").nll.sum() + stats.candidate_logits.sum()
        memory[which].flat[3] = bad
        if not (which == "candidates" and bad == -1):  # which is none
            expect(RuntimeError, loss.backward)
        yield
    for num_classes, bad in itertools.product(CLASSES, bad_ids):
        z, targets = torch.randn(6, num_classes, generator=RNG), torch.zeros(6, dtype=torch.long)
        given = (z, targets, None, None, None, None, -100, 4, -1)
        raw = row_stats_op(*given)
        raw[4][3] = bad
        if bad != -1:
            expect(RuntimeError, row_grad_op, *given, raw, [None, *[torch.ones(6)] * 3, None])
        yield


def wrong_memory() -> Iterator[None]:
    """Of another dtype, size or layout than the compiled rows take it for."""
    for num_classes, dtype in itertools.product(CLASSES, (torch.float32, HALF)):
        z = torch.randn(6, num_classes, generator=RNG).to(dtype)
        right = {"targets": torch.zeros(6, dtype=torch.long), "candidates": None, "class_weight": None}
        wrong = [
            {"class_weight": torch.ones(num_classes + 1)},
            {"class_weight": torch.ones(num_classes, dtype=torch.float64)},
            {"targets": torch.zeros(5, dtype=torch.long)},
            {"targets": torch.zeros(6, dtype=torch.int32)},
            {"candidates": torch.zeros(6, 2)},
            {"candidates": torch.zeros(5, 2, dtype=torch.long)},
            {"gradient": torch.empty(5, num_classes, dtype=dtype)},
            {"gradient": torch.empty(6, num_classes, dtype=torch.float64)},
            {"gradient": torch.empty(6, num_classes + 1, dtype=dtype)[:, 1:]},
        ]
        for change in wrong:
            if num_classes > 1 or "gradient" not in change:
                given = right | change
                gradient = given.pop("gradient", None)
                expect(ValueError, native_rows.run, z, Sweep(**given), [], gradient)
            yield


def expect(kind: type[Exception], call: Callable[..., object], *given: Any, **options: Any) -> None:
    try:
        call(*given, **options)
    except kind:
        return
    raise AssertionError(f"expected a {kind.__name__}")


# -- products -----------------------------------------------------------------------------------------

FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": exactly,
    "transposed": lambda x: exactly(x.t().contiguous()).t(),
    "columns of a wider one": lambda x: exactly(torch.cat([x, x[:, :1]], 1))[:, : x.shape[1]],
    "one row for all": lambda x: exactly(x[:1]).expand(x.shape),
}
SIZES = (1, 2, 11, 12, 13, 31, 33, 130)
LARGE = ((13, 1100, 33), (25, 513, 1057), (300, 3, 1100), (40, 2049, 70))


def products() -> Iterator[None]:
    """Odd shapes, more than one block of each side, every layout of both factors, sums and no sums."""
    if not hasattr(build.library(), "lossmith_product"):
        return
    dtypes = ((torch.float32, torch.float32), (HALF, HALF), (torch.float32, HALF))
    shapes = [*itertools.product(SIZES, repeat=3), *LARGE]
    for number, (shape, (of_a, of_b)) in enumerate(itertools.product(shapes, dtypes)):
        m, k, n = shape
        layouts = list(itertools.product(FACTORS, repeat=2))
        for first, second in layouts if shape in LARGE else [layouts[number % len(layouts)]]:
            a = FACTORS[first](torch.randn(m, k, generator=RNG).to(of_a))
            b = FACTORS[second](torch.randn(k, n, generator=RNG).to(of_b))
            into = exactly(torch.cat([torch.ones(m, n), torch.zeros(m, 2)], 1))[:, :n]
            is_sum = bool(number % 2)
            native_products.product(a, b, into=into, is_sum=is_sum)
            exact = a.double() @ b.double() + int(is_sum)
            assert (into - exact).abs().max() <= 1e-6 * k * (1 + exact.abs().max()), (shape, first, second)
            yield


# -- tokens -------------------------------------------------------------------------------------------

DERIVED = (
    "nll",
    "target_prob",
    "entropy",
    "normalized_wrong_entropy",
    "wrong_logsumexp",
    "mean_logit",
    "top_prob",
)
OF_CANDIDATES = ("candidate_logits", "candidate_log1m_prob")


def tokens() -> Iterator[None]:
    """Derived statistics and their gradients, for every number of tokens and candidates."""
    for num, num_classes, dtype, content, num_candidates, ignored in itertools.product(
        (1, 2, 7, 16, 33, 3000),
        (1, 2, 5),
        (torch.float32, torch.float64),
        CONTENTS,
        (None, 0, 1, 3),
        (False, True),
    ):
        z = CONTENTS[content](torch.randn(max(num, 2), 1, num_classes, generator=RNG).to(dtype))[:num, 0]
        z, targets = exactly(z).requires_grad_(), torch.randint(num_classes, (num,), generator=RNG)
        if ignored:
            targets[:: 2 if num > 1 else 1] = -100
        names, ids = DERIVED, None
        if num_candidates is not None:
            ids = exactly(torch.randint(-1, num_classes, (num, num_candidates), generator=RNG))
            names = (*DERIVED, *OF_CANDIDATES)
        stats = lossmith.token_stats(z, exactly(targets), candidates=ids, temperature=0.7)
        found = [getattr(stats.compute(*names), name) for name in names]
        wanted = [value for value in found if value.requires_grad]
        upstream = [exactly(torch.randn(value.shape, generator=RNG).to(dtype)) for value in wanted]
        torch.autograd.grad(wanted, z, upstream)
        yield


def sums() -> Iterator[None]:
    """Terms weighed and summed, with and without factors, in memory of every layout; and of wrong sizes."""
    for num, terms, dtype, has_factor, strided in itertools.product(
        (1, 2, 15, 16, 17, 3000), (1, 2, 9), (torch.float32, torch.float64), (False, True), (False, True)
    ):
        values = [torch.randn(num, generator=RNG).to(dtype) for _ in range(terms)]
        if strided:
            values = [torch.stack([value, value], -1)[:, 0] for value in values]
        else:
            values = [exactly(value) for value in values]
        values = [value.requires_grad_() for value in values]
        scale, factor = (exactly(torch.rand(num, generator=RNG).to(dtype)) for _ in range(2))
        total, each, _ = weighed_sums(values, scale, factor if has_factor else None)
        (total + (each * torch.randn(terms, generator=RNG).to(dtype)).sum()).backward()
        for wrong in (scale[:-1], scale.to(torch.float16), torch.cat([scale, scale])):
            with contextlib.suppress(ValueError, RuntimeError, TypeError):
                weighed_sums(values, wrong)
        yield


def families() -> Iterator[None]:
    """The cross-entropy family in one step: every layout and content, with terms on and off, and ids written
    over before the way back."""
    for num_classes, dtype, layout, content, ignored, number in itertools.product(
        CLASSES, (torch.float32, HALF), LAYOUTS, CONTENTS, ("none", "some", "all"), range(4)
    ):
        z = LAYOUTS[layout](CONTENTS[content](torch.randn(2, 5, num_classes, generator=RNG).to(dtype)))
        array = torch.randint(num_classes, (2, 5), generator=RNG).numpy()
        targets = torch.from_numpy(array)
        if ignored != "none":
            targets[0 if ignored == "some" else slice(None)] = -100
        options = {"label_smoothing": 0.1, "smoothing_mode": ("uniform", "exclude_target")[number % 2]}
        criterion = lossmith.CrossEntropyLoss(
            **(options if number else {}),
            reduction=("mean", "sequence_mean", "sum")[number % 3],
            z_loss=0.1 * (number > 1),
            focal_gamma=0.5 * (number > 2),
            confidence_penalty=0.1 * (number > 1),
            temperature=0.7 if number > 1 else 1.0,
            class_weight=exactly(torch.rand(num_classes, generator=RNG)) if len(layout) % 2 else None,
        )
        leaf = z.detach().requires_grad_()
        output = criterion.evaluate(leaf, targets, token_weight=exactly(torch.rand(2, 5, generator=RNG)))
        sum(output.parts.values(), output.total).backward(retain_graph=True)
        criterion(leaf, targets).backward()  # the loss alone, where there are no class weights
        if ignored == "none":
            array[1, 2] = num_classes
            expect(RuntimeError, output.total.backward)
        yield


def heads() -> Iterator[None]:
    """Whole losses over a head, chunk by chunk, on both strategies."""
    for num_classes, size, dtype, strategy in itertools.product(
        CLASSES, (1, 7, 40), (torch.float32, HALF), ("one_sweep", "two_sweep")
    ):
        hidden = exactly(torch.randn(9, size, generator=RNG).to(dtype)).requires_grad_()
        weight = exactly(torch.randn(num_classes, size, generator=RNG).to(dtype)).requires_grad_()
        targets = torch.randint(num_classes, (9,), generator=RNG)
        targets[2] = -100
        lossmith.linear_cross_entropy(
            hidden, weight, targets, strategy=strategy, memory_budget=4 * 4 * num_classes,
            label_smoothing=0.1, z_loss=0.1, confidence_penalty=0.1, class_weight=torch.rand(num_classes),
        ).backward()  # fmt: skip
        yield


ALL = (rows, ids_of_every_dtype, ids_written_over, wrong_memory, products, tokens, sums, families, heads)


def main() -> None:
    build._PATIENCE_S = 600  # a sanitized build takes longer
    compiled = build.library()
    assert compiled is not None, "the library could not be built; see the logger lossmith"
    native_products.WORTH_IT = native_products.THIN = 0
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for cases in ALL:
            number = sum(1 for _ in cases())
            print(
                f"{threads} thread{'s' * (threads > 1)}: {cases.__name__.replace('_', ' ')}: {number} cases",
                flush=True,
            )


if __name__ == "__main__":
    main()
