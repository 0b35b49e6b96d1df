"""``PlainMeasures``: nll, perplexity and accuracy, whatever a model is trained with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lossmith.equation.output import LossOutput

# Sums over all ranks
Reduce = Callable[[Tensor], Tensor]


class PlainMeasures:
    """Sums over batches, on their device until they are read."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # [nll, tokens], and in evaluation the right ones
        self.parts: dict[str, Tensor] = {}  # of the samples together
        self.num_samples = 0

    def add(self, observed: Tensor | None, parts: Mapping[str, Tensor] | None = None, num: int = 1) -> None:
        """Add what `observe` returned for a batch, and its parts, which count for ``num`` samples."""
        if observed is None:
            return
        self.sums = observed if self.sums is None else self.sums + observed
        for name, part in (parts or {}).items():
            self.parts[name] = self.parts.get(name, 0.0) + num * part.double()
        self.num_samples += num

    def nll(self, reduce: Reduce) -> float | None:
        """The mean over the tokens of all ranks since the last time; None if there was no batch."""
        sums, self.sums = self.sums, None
        if sums is None:
            return None
        total, num = reduce(sums).tolist()
        return total / max(num, 1)

    def evaluated(self, prefix: str, reduce: Reduce) -> dict[str, float]:
        """The measures of an evaluation by their names in the log; {} if no batch had labels."""
        if self.sums is None:
            return {}
        samples = torch.tensor([self.num_samples], dtype=self.sums.dtype, device=self.sums.device)
        parts = [part.to(self.sums) for part in self.parts.values()] if len(self.parts) > 1 else []
        whole = reduce(torch.cat([self.sums, samples, *(part.reshape(1) for part in parts)])).tolist()
        total, num, correct, samples, *of_parts = whole
        nll = total / max(num, 1)
        found = {"nll": nll, "perplexity": math.exp(min(nll, 700.0)), "accuracy": correct / max(num, 1)}
        named = zip(self.parts, of_parts, strict=bool(of_parts))
        found |= {f"loss/{name}": value / max(samples, 1) for name, value in named}
        return {f"{prefix}_{name}": value for name, value in found.items()}


def observe(output: LossOutput, source: Tensor) -> Tensor:
    """[2] the sum of the plain negative log-likelihoods of a batch's tokens, and their number; [3] with the
    number of those that were predicted right, where no gradient is asked for."""
    assert output.stats is not None
    wide = torch.float32 if source.device.type == "mps" else torch.float64
    plain = output.stats.unscaled
    valid = output.valid.reshape(plain.nll.shape)
    sums = [plain.nll.detach().masked_fill(~valid, 0.0).sum(), output.num_tokens]
    if not torch.is_grad_enabled():
        sums.append((plain.correct & valid).sum())
    return torch.stack([value.to(wide) for value in sums])
