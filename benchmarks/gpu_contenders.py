"""Who takes part in ``benchmarks/gpu.py``: lossmith, PyTorch, and the peers that are installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import lossmith

FOUR = {"label_smoothing": 0.1, "z_loss": 1e-4, "focal_gamma": 2.0, "confidence_penalty": 0.1}
LENGTH = 64
# A name that ends in "plain" or "all four" is compared with that loss in fp64.
LOGITS = [
    "F.cross_entropy, plain",
    "F.cross_entropy compiled, plain",
    "Liger, plain",
    "lossmith, plain",
    "lossmith, all four",
    "lossmith, UnifiedLoss",
]
HEADS = [
    "F.cross_entropy, plain",
    "F.cross_entropy compiled, plain",
    "F.linear_cross_entropy, plain",
    "Liger, plain",
    "CCE, plain",
    "cce_exact, plain",
    "lossmith, plain",
    "lossmith, all four",
    "lossmith, UnifiedLoss",
]
Loss = Callable[["Case"], Tensor]


@dataclass
class Case:
    """Random bf16 logits [N, V], or hidden states [N, D] and a weight [V, D], and a repetitive text.

    Attributes:
        shape: (N, V) or (N, D, V).
        device: where they are.
    """

    shape: tuple[int, ...]
    device: str
    leaves: list[Tensor] = field(default_factory=list, repr=False)
    text: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    @property
    def is_head(self) -> bool:
        return len(self.shape) == 3

    @property
    def num_tokens(self) -> int:
        return self.shape[0]

    @property
    def targets(self) -> Tensor:
        return self.text[1:]

    def fill(self) -> None:
        """Make the tensors."""
        rng = torch.Generator(self.device).manual_seed(0)
        of = {"device": self.device, "dtype": torch.bfloat16, "generator": rng}
        self.leaves = [torch.randn(self.shape[:2], **of)]
        if self.is_head:
            self.leaves.append(torch.randn(self.shape[2], self.shape[1], **of) * 0.05)
        for leaf in self.leaves:
            leaf.requires_grad_()
        high = min(self.shape[-1], 50)
        self.text = torch.randint(high, (self.num_tokens + 1,), device=self.device, generator=rng)

    def empty(self) -> None:
        """Let them go."""
        self.leaves, self.text = [], torch.empty(0)
        torch._dynamo.reset()
        if self.device != "cpu":
            torch.cuda.empty_cache()


def make(name: str, case: Case) -> Callable[[], Tensor]:
    """One step, forward and backward, which leaves the gradients and returns the loss."""
    who, _, what = name.partition(", ")
    loss = (OF_HEADS if case.is_head else OF_LOGITS)[who](what, case)

    def step() -> Tensor:
        for leaf in case.leaves:
            leaf.grad = None
        value = loss()
        value.backward()
        return value.detach()

    return step


def _eager(what: str, case: Case) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(case.leaves[0], case.targets)


def _compiled(what: str, case: Case) -> Callable[[], Tensor]:
    compiled = torch.compile(F.cross_entropy, fullgraph=True)
    return lambda: compiled(case.leaves[0], case.targets)


def _liger(what: str, case: Case) -> Callable[[], Tensor]:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    criterion = LigerCrossEntropyLoss()
    # Liger writes the gradient over the logits: it is given a copy, which is part of what it costs.
    return lambda: criterion(case.leaves[0].clone(), case.targets)


def _ours(what: str, case: Case) -> Callable[[], Tensor]:
    if what == "UnifiedLoss":
        criterion, rows = _unified(case.shape[-1]), _rows(case)
        return lambda: criterion(
            case.leaves[0].view(*rows, -1), case.targets.view(rows), input_ids=case.text[:-1].view(rows)
        )
    options = FOUR if what == "all four" else {}
    return lambda: lossmith.cross_entropy(case.leaves[0], case.targets, **options)


def _eager_head(what: str, case: Case) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(case.leaves[0] @ case.leaves[1].T, case.targets)


def _compiled_head(what: str, case: Case) -> Callable[[], Tensor]:
    compiled = torch.compile(lambda h, w, y: F.cross_entropy(h @ w.T, y), fullgraph=True)
    return lambda: compiled(*case.leaves, case.targets)


def _torch_head(what: str, case: Case) -> Callable[[], Tensor]:
    function = F.linear_cross_entropy  # of PyTorch 2.12 on
    return lambda: function(*case.leaves, case.targets)


def _liger_head(what: str, case: Case) -> Callable[[], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    criterion = LigerFusedLinearCrossEntropyLoss()
    return lambda: criterion(case.leaves[1], case.leaves[0], case.targets)


def _cce(impl: str, what: str, case: Case) -> Callable[[], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda: linear_cross_entropy(*case.leaves, case.targets, impl=impl)


def _our_head(what: str, case: Case) -> Callable[[], Tensor]:
    if what == "UnifiedLoss":
        criterion, rows = _unified(case.shape[-1]), _rows(case)
        return lambda: criterion(
            hidden_states=case.leaves[0].view(*rows, -1),
            lm_head_weight=case.leaves[1],
            targets=case.targets.view(rows),
            input_ids=case.text[:-1].view(rows),
        )
    options = FOUR if what == "all four" else {}
    return lambda: lossmith.linear_cross_entropy(*case.leaves, case.targets, **options)


def _rows(case: Case) -> tuple[int, int]:
    return case.num_tokens // LENGTH, LENGTH


@functools.cache
def _unified(num_classes: int) -> lossmith.UnifiedLoss:
    return lossmith.UnifiedLoss(
        num_classes,
        label_smoothing=0.1,
        z_loss=1e-4,
        use_focal_loss=True,
        use_auxiliary_loss=True,
        use_ngram_penalty=True,
        use_immediate_repetition_penalty=True,
    )


Make = Callable[[str, Case], Callable[[], Tensor]]
OF_LOGITS: dict[str, Make] = {
    "F.cross_entropy": _eager,
    "F.cross_entropy compiled": _compiled,
    "Liger": _liger,
    "lossmith": _ours,
}
OF_HEADS: dict[str, Make] = {
    "F.cross_entropy": _eager_head,
    "F.cross_entropy compiled": _compiled_head,
    "F.linear_cross_entropy": _torch_head,
    "Liger": _liger_head,
    "CCE": functools.partial(_cce, "cce"),
    "cce_exact": functools.partial(_cce, "cce_exact"),
    "lossmith": _our_head,
}
