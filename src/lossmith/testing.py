"""What holds a term of your own to its promises: :func:`check_term`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lossmith.batch import TokenBatch, align
from lossmith.engine.predictions import Logits
from lossmith.engine.sweep_options import SweepOptions
from lossmith.equation import Term
from lossmith.objective import Objective

IGNORED = -100
WIDTH = 5
# A chunk of a head holds this many of its tokens, so that none sees its neighbours of the next chunk.
CHUNK_ROWS = 2


def check_term(
    term: Term,
    *,
    num_classes: int = 11,
    shape: tuple[int, int] = (3, 7),
    temperature: float = 1.3,
    features: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> None:
    """Hold a term to what it declares, in fp64, on random logits.

    It reads the statistics that it declares and no others; it gives a value per token; its gradient is that
    of finite differences; tokens without a target do not matter; and where its scope is ``token``, a token's
    value and gradient do not depend on which tokens are there besides, so that one sweep of a linear head,
    a chunk at a time, gives what all the logits give.

    Args:
        term: the term.
        num_classes: V.
        shape: [B, T] of the batch.
        temperature: of the statistics; another one than 1, so that ``unscaled`` makes a difference.
        features: [B, T] what the term reads of ``batch.features``, by name.
        seed: of the random numbers.

    Raises:
        AssertionError: the term breaks a promise; the message says which.

    Example:
        >>> import lossmith
        >>> from lossmith.testing import check_term
        >>> check_term(lossmith.Term("squared", lambda s, b: s.nll**2, reads=("nll",), scope="token"))
    """
    case = _Case.random(num_classes, shape, temperature, dict(features or {}), seed)
    loss, values = _read(term, case)
    if term.scope == "token":
        _check_locality(term, case, values)
        _check_chunks(term, case)
    _check_gradient(term, case)
    _check_masks(term, case, loss)


@dataclass(frozen=True)
class _Case:
    """A batch of random hidden states, what they predict, and targets, one in four of them missing."""

    hidden: Tensor  # [B, T, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [B, T]
    input_ids: Tensor  # [B, T]
    features: dict[str, Tensor]
    temperature: float

    @classmethod
    def random(
        cls, num_classes: int, shape: tuple[int, int], temperature: float, features: dict, seed: int
    ) -> _Case:
        rng = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=rng, dtype=torch.float64)

        targets = torch.randint(num_classes, shape, generator=rng)
        # few different ones, so that something comes again
        input_ids = torch.randint(min(num_classes, 3), shape, generator=rng)
        targets[torch.rand(shape, generator=rng) < 0.25] = IGNORED
        targets[0, 0] = 0
        return cls(
            normal(*shape, WIDTH), normal(num_classes, WIDTH), targets, input_ids, features, temperature
        )

    @property
    def logits(self) -> Tensor:
        return self.hidden @ self.weight.t()

    @property
    def batch(self) -> TokenBatch:
        return align(
            self.targets,
            input_ids=self.input_ids,
            features=self.features,
            num_classes=len(self.weight),
            dtype=torch.float64,
        )

    def objective(self, term: Term) -> _OfOneTerm:
        return _OfOneTerm([term], temperature=self.temperature, features=self.features)

    def loss(self, term: Term, **predictions: object) -> Tensor:
        criterion = self.objective(term)
        return criterion(targets=self.targets, input_ids=self.input_ids, **self.features, **predictions)

    def values(self, term: Term, rows: Tensor) -> Tensor:
        """[n] what the term makes of these tokens alone; its candidates may look at all."""
        batch = self.batch
        candidates = None if term.candidates is None else term.candidates(batch)[rows]
        some = batch.select(rows)
        stats = SweepOptions(self.temperature).stats(
            Logits(self.logits.flatten(0, 1)[rows]),
            some.targets,
            ignore_index=IGNORED,
            candidates=candidates,
        )
        return torch.where(some.valid, term.values(stats.declared(term.reads), some), 0.0)


class _OfOneTerm(Objective):
    def __init__(self, terms: list[Term], *, temperature: float, features: Mapping[str, Tensor]) -> None:
        super().__init__(terms, temperature=temperature)
        self.input_names = self.feature_names = tuple(features)


def _read(term: Term, case: _Case) -> tuple[Tensor, Tensor]:
    """The loss, and the term's value at each token [N]."""
    try:
        return case.loss(term, logits=case.logits), case.values(term, torch.arange(case.targets.numel()))
    except (ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise AssertionError(f"{term.name!r} cannot be evaluated: {error}") from error


def _check_gradient(term: Term, case: _Case) -> None:
    batch = case.batch
    if term.token_weight is not None:  # a constant, whose own derivative is not asked for
        candidates = None if term.candidates is None else term.candidates(batch)
        options = SweepOptions(case.temperature)
        stats = options.stats(
            Logits(case.logits.flatten(0, 1)), batch.targets, ignore_index=IGNORED, candidates=candidates
        )
        weight = term.token_weight(stats.declared(term.reads).detach(), batch).detach()
        term = replace(term, token_weight=lambda _stats, _batch: weight)
    logits = case.logits.requires_grad_()
    try:
        torch.autograd.gradcheck(lambda z: case.loss(term, logits=z), logits)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]  # and not all of both Jacobians
        raise AssertionError(
            f"the gradient of {term.name!r} is not that of finite differences: {reason}"
        ) from error


def _check_masks(term: Term, case: _Case, loss: Tensor) -> None:
    broken = case.logits.masked_fill((case.targets == IGNORED).unsqueeze(-1), torch.nan).requires_grad_()
    with_nan = case.loss(term, logits=broken)
    torch.testing.assert_close(
        with_nan,
        loss,
        msg=lambda m: f"{term.name!r} depends on predictions of tokens that have no target. {m}",
    )
    if with_nan.requires_grad:
        (gradient,) = torch.autograd.grad(with_nan, broken)
        assert not gradient[case.targets == IGNORED].any(), (
            f"{term.name!r} has a gradient at tokens that have no target"
        )


def _check_locality(term: Term, case: _Case, values: Tensor) -> None:
    rng = torch.Generator().manual_seed(1)
    for size in (1, 2, values.numel() // 2):
        rows = torch.randperm(values.numel(), generator=rng)[:size]
        try:
            alone = case.values(term, rows)
        except (ValueError, RuntimeError, IndexError) as error:
            raise AssertionError(_looks_around(term, f"it fails on some tokens alone: {error}")) from error
        torch.testing.assert_close(alone, values[rows], msg=lambda m: _looks_around(term, m))


def _check_chunks(term: Term, case: _Case) -> None:
    leaves = (case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_())
    budget = CHUNK_ROWS * len(case.weight) * case.weight.itemsize
    expected = case.loss(term, logits=leaves[0] @ leaves[1].t())
    try:
        found = case.loss(
            term,
            hidden_states=leaves[0],
            lm_head_weight=leaves[1],
            strategy="one_sweep",
            memory_budget=budget,
        )
    except ValueError as error:
        raise AssertionError(f"{term.name!r} is no term of scope 'token': {error}") from error
    torch.testing.assert_close(found, expected, msg=lambda m: _looks_around(term, m))
    if not expected.requires_grad:  # a term of what the caller gives alone
        return
    gradients = (torch.autograd.grad(loss, leaves) for loss in (found, expected))
    torch.testing.assert_close(*gradients, msg=lambda m: _looks_around(term, m))


def _looks_around(term: Term, how: str) -> str:
    return f"{term.name!r} has scope='token' and looks at other tokens than each value's own. {how}"
