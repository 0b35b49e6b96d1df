"""``LossOutput``: what an objective made of a batch, and how more parts are added to it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lossmith.core.metrics import Metrics
from lossmith.engine.statistics.stats import TokenStats
from lossmith.equation.batch import TokenBatch


class Pull(NamedTuple):
    """What a part does to the tensors that it is computed from, 0-dimensional and detached.

    Attributes:
        norm: the norm of its gradient.
        cosine: of the angle between its gradient and that of the whole loss.
    """

    norm: Tensor
    cosine: Tensor


@dataclass(frozen=True, repr=False)
class LossOutput:
    """What an objective made of a batch.

    Attributes:
        total: the loss; the sum of ``parts``. [..., T] per token where the reduction is ``none``.
        parts: each term's contribution, weights and denominator included, by name.
        valid: [N] bool, which tokens (or scores) were supervised.
        stats: the statistics of every token, in the shape of the targets; asking for one that no term used
            costs another pass over the logits. None where there are no tokens but scores.
        batch: the tokens as they were aligned, masked, scaled and weighed, flat [N] (``stats.flat()`` goes
            with it); None likewise.
        shares: [K, N] what each token adds to each of the per-token terms, detached and before ``weigh``.
        metrics: ``loss``, each part, ``nll`` (unsmoothed, temperature 1, a mean over tokens),
            ``perplexity`` and ``accuracy``; computed when they are read.
        all_stats: the statistics, flat, also where something else than a loss looks at the predictions of a
            position without a target (``batch.also_read``).
    """

    total: Tensor
    parts: dict[str, Tensor]
    valid: Tensor
    stats: TokenStats | None
    batch: TokenBatch | None
    shares: Tensor
    metrics: Metrics
    all_stats: TokenStats | None = None

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in ("total", "parts", "num_tokens", "stats")}
        return f"LossOutput({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def num_tokens(self) -> Tensor:
        """How many tokens were supervised (0-dimensional)."""
        return self.valid.sum()

    @property
    def contributions(self) -> Tensor:
        """[N] what each token adds to the per-token terms together, detached and before ``weigh``."""
        return self.shares.sum(0)

    def pull(self, *tensors: Tensor) -> dict[str, Pull]:
        """How strongly each part pulls at tensors, and whether it pulls where the whole loss does.

        ``norm`` is that of the part's gradient g_k in the tensors; ``cosine`` is g_k · g / (‖g_k‖ ‖g‖) with
        the gradient g of ``total``, and 0 if one of them is 0. Of logits, or of the hidden states that a head
        was given, this goes back through the loss alone and not through the model: once for each part and
        once for the total. Call it before ``backward()``, which then works as before.

        Args:
            tensors: what the loss was computed from, usually the logits or the hidden states; several are
                taken as one long vector.

        Raises:
            RuntimeError: a tensor has no gradient, or the graph is gone.
            ValueError: no tensors, or a loss per token, whose parts are no scalars.

        Example:
            >>> import torch, lossmith
            >>> logits = torch.randn(2, 3, 5, requires_grad=True)
            >>> criterion = lossmith.CrossEntropyLoss(z_loss=0.1)
            >>> output = criterion.evaluate(logits, torch.ones(2, 3, dtype=torch.long))
            >>> sorted(output.pull(logits))
            ['cross_entropy', 'z_loss']
        """
        if not tensors or self.total.dim():
            raise ValueError(
                "pull needs a tensor that a scalar loss was computed from, such as the logits; got "
                + ("no tensor" if not tensors else "a loss per token (reduction='none')")
            )
        whole = _gradient(self.total, tensors)
        size = _dot(whole, whole).sqrt()
        pulls = {}
        for name, part in self.parts.items():
            own = _gradient(part, tensors)
            norm = _dot(own, own).sqrt()
            product = norm * size
            cosine = _dot(own, whole) / torch.where(product > 0, product, 1.0)
            pulls[name] = Pull(norm, cosine)
        return pulls

    def as_dict(self) -> dict[str, Tensor]:
        """The parts, and the loss as ``total_loss``."""
        return {**self.parts, "total_loss": self.total}

    def shaped(self) -> LossOutput:
        """The same with the statistics, flat while the loss is made, in the shape of the targets."""
        if self.stats is None or self.batch is None:
            return self
        if len(self.batch.shape) == 1:
            return self
        return replace(self, stats=self.stats.reshape(self.batch.shape))

    def __getstate__(self) -> dict[str, Any]:
        """Numbers without a graph, for pickle and ``copy.deepcopy``."""
        parts = {name: part.detach() for name, part in self.parts.items()}
        return {**self.__dict__, "total": self.total.detach(), "parts": parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # past the frozen setattr


def _gradient(value: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of a scalar in tensors; None where there is none. The graph is kept."""
    if not value.requires_grad:  # a part may be a constant
        return [None] * len(tensors)
    return list(torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True))


def _dot(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> Tensor:
    """The inner product of two gradients, in single precision or better."""
    products = [
        (x.to(wide) * y.to(wide)).sum()
        for x, y in zip(a, b, strict=True)
        if x is not None and y is not None
        for wide in [torch.promote_types(x.dtype, torch.float32)]
    ]
    return reduce(operator.add, products, torch.zeros(()))


def with_parts(output: LossOutput, parts: Mapping[str, Tensor]) -> LossOutput:
    """The output with further parts, weighted and divided already, added to its total."""
    if not parts:
        return output
    if output.total.dim():
        raise ValueError(
            f"the parts {', '.join(parts)} belong to no token; reduction='none' has no place for them"
        )
    twice = [name for name in parts if name in output.parts]
    if twice:
        raise ValueError(f"the parts of an objective need distinct names; {twice[0]!r} is there twice")
    total = reduce(operator.add, parts.values(), output.total)
    added = Metrics({"loss": total.sum, **{name: part.sum for name, part in parts.items()}})
    metrics = output.metrics.joined(added)
    return replace(output, total=total, parts={**output.parts, **parts}, metrics=metrics)
