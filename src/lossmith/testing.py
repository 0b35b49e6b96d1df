"""``check_term`` and ``check_objective`` test that losses of your own keep their promises."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lossmith.engine.predictions import Logits
from lossmith.engine.sweep_options import SweepOptions
from lossmith.equation.batch import TokenBatch, align
from lossmith.equation.output import LossOutput
from lossmith.equation.term import Term
from lossmith.objectives.objective import Objective

IGNORED = -100
WIDTH = 5
# Tokens per chunk of a head: few enough that tokens in other chunks are out of sight.
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
    """Check that a term does what it declares, in fp64, on random logits.

    It reads the statistics that it declares and no others; it gives one value per token; its gradient matches
    finite differences; tokens without a target have no effect. If its scope is ``token``, a token's value and
    gradient do not depend on which other tokens are there, so that one sweep of a linear head, a chunk at a
    time, gives the same result as all the logits.

    Args:
        term: the term.
        num_classes: V.
        shape: [B, T] of the batch.
        temperature: of the statistics; other than 1, so that ``unscaled`` makes a difference.
        features: [B, T] what the term reads from ``batch.features``, by name.
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
    """Random hidden states, their predictions, and targets, of which one in four is missing."""

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
        # few distinct ids, so that some repeat
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

    def loss(self, term: Term, **predictions: Any) -> Tensor:
        criterion = self.objective(term)
        return criterion(targets=self.targets, input_ids=self.input_ids, **self.features, **predictions)

    def values(self, term: Term, rows: Tensor) -> Tensor:
        """[n] the term's values on these tokens alone; its candidates may look at all tokens."""
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
    if term.token_weight is not None:  # a constant, not differentiated
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
        reason = str(error).partition("\n")[0]  # not both Jacobians in full
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
    if not expected.requires_grad:  # a term that depends only on the caller's inputs
        return
    gradients = (torch.autograd.grad(loss, leaves) for loss in (found, expected))
    torch.testing.assert_close(*gradients, msg=lambda m: _looks_around(term, m))


def _looks_around(term: Term, how: str) -> str:
    return f"{term.name!r} has scope='token' and looks at other tokens than each value's own. {how}"


# ── a whole objective ─────────────────────────────────────────────────────────────────────────────────


def check_objective(
    criterion: Objective,
    *,
    num_classes: int = 11,
    shape: tuple[int, int] = (4, 7),
    inputs: Mapping[str, Tensor] | None = None,
    adds_up: bool = True,
    seed: int = 0,
) -> None:
    """Check that an objective does what every objective promises, in fp64, on random logits.

    Each of its terms keeps its promises (:func:`check_term`); the parts sum to the total; three times the
    loss has three times the gradient; tokens without a target have no effect and no gradient; a batch without
    targets has a gradient of 0; a linear head gives the same result as its logits; micro-batches add up to
    the batch; and its inputs are not changed.

    Args:
        criterion: the objective; a copy of it is checked.
        num_classes: V.
        shape: [B, T] of the batch.
        inputs: [B, ...] what else it takes, by name.
        adds_up: whether micro-batches add up to the batch. They do not if the loss uses statistics of the
            batch (NVAMP's mean, weights that average 1).
        seed: of the random numbers.

    Raises:
        AssertionError: the objective breaks a promise; the message says which.

    Example:
        >>> import lossmith
        >>> from lossmith.testing import check_objective
        >>> check_objective(lossmith.CrossEntropyLoss(label_smoothing=0.1, z_loss=0.1))
        >>> check_objective(lossmith.NVAMPLoss(), adds_up=False)
    """
    criterion = copy.deepcopy(criterion).double()
    features = {name: value for name, value in (inputs or {}).items() if name in criterion.feature_names}
    for term in criterion.terms():
        if not term.is_off:
            check_term(term, num_classes=num_classes, shape=shape, features=features, seed=seed)
    case = _Case.random(num_classes, shape, 1.0, {}, seed)
    whole = _Whole(criterion, case, dict(inputs or {}))
    whole.check_parts()
    whole.check_masks()
    whole.check_nothing_to_learn()
    whole.check_head()
    if adds_up:
        whole.check_micro_batches()


@dataclass(frozen=True)
class _Whole:
    """An objective and a batch."""

    criterion: Objective
    case: _Case
    inputs: dict[str, Tensor]

    def output(self, rows: slice = slice(None), **given: Any) -> LossOutput:
        inputs = {"targets": self.case.targets, "input_ids": self.case.input_ids, **self.inputs}
        chosen: dict[str, Any] = {name: value[rows] for name, value in inputs.items()}
        return copy.deepcopy(self.criterion).evaluate(**chosen | given)

    def loss(self, **given: Any) -> Tensor:
        return self.output(**given).total.sum()

    def check_parts(self) -> None:
        logits = self.case.logits
        leaf, before = logits.clone().requires_grad_(), logits.clone()
        output = self.output(logits=leaf)
        total = sum(output.parts.values(), torch.zeros_like(output.total))
        self._close(total, output.total, "the parts do not sum to the total")
        scaled = torch.autograd.grad(3 * output.total.sum(), leaf, retain_graph=True)[0]
        plain = torch.autograd.grad(output.total.sum(), leaf)[0]
        self._close(scaled, 3 * plain, "the gradient does not scale with the loss")
        assert torch.equal(leaf.detach(), before), self._said("the logits were changed")

    def check_masks(self) -> None:
        missing = self.case.targets == IGNORED
        steps = int(self.criterion.shift or 0)  # logits[t] predict targets[t + steps]
        missing = torch.nn.functional.pad(missing[:, steps:], (0, steps), value=True)
        broken = self.case.logits.masked_fill(missing.unsqueeze(-1), torch.nan).requires_grad_()
        loss = self.loss(logits=broken)
        said = "tokens without a target matter"
        self._close(loss, self.loss(logits=self.case.logits), said)
        assert not torch.autograd.grad(loss, broken)[0][missing].any(), self._said(said)

    def check_nothing_to_learn(self) -> None:
        leaf = self.case.logits.requires_grad_()
        output = self.output(logits=leaf, targets=torch.full_like(self.case.targets, IGNORED))
        if self.criterion.empty == "nan":
            return
        per_token = sum(part for part in output.parts.values())
        (gradient,) = torch.autograd.grad(output.total.sum(), leaf)
        assert torch.as_tensor(per_token).isfinite().all(), self._said(
            "a batch without a target is not finite"
        )
        assert not gradient.any(), self._said("a batch without a target has a gradient")

    def check_head(self) -> None:
        leaves = [self.case.hidden.clone().requires_grad_(), self.case.weight.clone().requires_grad_()]
        budget = CHUNK_ROWS * len(leaves[1]) * leaves[1].itemsize
        head = {"hidden_states": leaves[0], "lm_head_weight": leaves[1], "memory_budget": budget}
        found, expected = self.loss(**head), self.loss(logits=leaves[0] @ leaves[1].t())
        said = "over a linear head it is another loss than over the logits"
        self._close(found, expected, said)
        self._close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), said)

    def check_micro_batches(self) -> None:
        criterion, targets, logits = self.criterion, self.case.targets, self.case.logits
        denominator = None if criterion.reduction in ("sum", "none") else criterion.count(targets)
        parts = [
            self.output(
                slice(row, row + 1), logits=logits[row : row + 1], denominator=denominator
            ).total.sum()
            for row in range(len(targets))
        ]
        self._close(sum(parts), self.loss(logits=logits), "micro-batches do not add up to the batch")

    def _close(self, found: Any, expected: Any, said: str) -> None:
        torch.testing.assert_close(found, expected, msg=lambda m: f"{self._said(said)}. {m}")

    def _said(self, what: str) -> str:
        return f"{type(self.criterion).__name__}: {what}"
