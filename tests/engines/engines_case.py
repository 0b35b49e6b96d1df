"""What every engine trains on: losses, batches of two ranks and two micro-batches, a model, and the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lossmith

V, D, T = 23, 8, 10
RANKS = MICRO_BATCHES = ROWS = 2
IGNORE = -100

# What a step of an engine came to: its loss on this rank, and the gradients that every rank ends up with.
Step = dict[str, Any]


def unified(scope: str) -> lossmith.UnifiedLoss:
    with torch.random.fork_rng():
        torch.manual_seed(1)  # of its heads
        return lossmith.UnifiedLoss(
            V,
            D,
            label_smoothing=0.1,
            z_loss=1e-2,
            use_mtp=True,
            use_ngram_penalty=True,
            ngram_size=2,
            use_immediate_repetition_penalty=True,
            use_focal_loss=True,
        )


def pipeline(scope: str) -> lossmith.LossModifierPipeline:
    return lossmith.LossModifierPipeline(
        [
            lossmith.EntropyModifier({"weight": 0.7, "stats_scope": scope}),
            lossmith.TargetSmoothingModifier({"factor": 0.1}),
        ]
    )


@dataclass(frozen=True)
class Loss:
    """A loss that engines are tried with.

    Attributes:
        make: (scope of its statistics) -> one, the same every time.
        is_whole: whether the whole batch at once is the truth; otherwise its statistics are those of a
            micro-batch over all ranks.
    """

    make: Callable[[str], lossmith.Objective]
    is_whole: bool


LOSSES = {
    "cross-entropy": Loss(lambda _: lossmith.CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-2), True),
    "modifier pipeline": Loss(pipeline, False),
    "NVAMP": Loss(lambda scope: lossmith.NVAMPLoss(gamma=0.5, top_k=2, stats_scope=scope), False),
    "UnifiedLoss": Loss(unified, True),
}


@dataclass(frozen=True)
class Batch:
    """The tokens of an optimizer step: ids and unshifted labels, [micro-batches, ranks, rows, T]."""

    ids: Tensor
    labels: Tensor

    def of(self, micro: int, rank: int | None) -> tuple[Tensor, Tensor]:
        """[rows, T] each; of all ranks if none is named."""
        if rank is None:
            return self.ids[micro].flatten(0, 1), self.labels[micro].flatten(0, 1)
        return self.ids[micro, rank], self.labels[micro, rank]

    def rows(self) -> tuple[Tensor, Tensor]:
        """All rows, in the order in which two ranks take them turn by turn."""
        return self.ids.flatten(0, 2), self.labels.flatten(0, 2)


def batches() -> list[Batch]:
    """One with a different number of tokens everywhere, one in which the second rank has none."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for nothing in (False, True):
        shape = (MICRO_BATCHES, RANKS, ROWS, T)
        ids = torch.randint(3, 9, shape, generator=rng)  # few, so that some repeat
        labels = ids.clone()
        for micro, rank, length in ((0, 0, 3), (0, 1, 9), (1, 0, 10), (1, 1, 5)):
            labels[micro, rank, :, length:] = IGNORE
        labels[1, 0, 1, 2:6] = IGNORE
        if nothing:
            labels[:, 1] = IGNORE
        found.append(Batch(ids, labels))
    return found


class Layer(nn.Linear):
    """One of the model's, by a class of its own, for engines that look for it."""


class Model(nn.Module):
    """A small language model that computes its loss in its forward, over a head that is never applied."""

    def __init__(
        self,
        objective: lossmith.Objective,
        *,
        tied: bool = False,
        checkpointed: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(V, D)
            self.layers = nn.ModuleList(Layer(D, D) for _ in range(2))
            self.head = nn.Linear(D, V, bias=False)
        self.objective = objective
        self.to(dtype)
        self.unshards_head = False  # FSDP2 was given the head by itself
        self.checkpointed = checkpointed
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, labels: Tensor, denominator: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            if self.checkpointed:
                hidden = torch.tanh(checkpoint(layer, hidden, use_reentrant=False))
            else:
                hidden = torch.tanh(layer(hidden))
        if self.unshards_head:
            self.head.unshard()
        return self.objective(
            targets=labels,
            hidden_states=hidden,
            lm_head_weight=self.head.weight,
            input_ids=ids,
            denominator=denominator,
            shift=True,
        )


def denominator_of(objective: lossmith.Objective, batch: Batch) -> Tensor:
    """What all micro-batches of all ranks are divided by."""
    ids_and_labels = [batch.of(micro, None)[1] for micro in range(MICRO_BATCHES)]
    return torch.stack([objective.count(labels, shift=True) for labels in ids_and_labels]).sum()


def expected(name: str, **of_the_model: Any) -> list[Step]:
    """The steps of one process, by itself: the whole batch at once, or what of it a micro-batch has."""
    loss = LOSSES[name]
    model = Model(loss.make("local"), **of_the_model)
    steps = []
    for batch in batches():
        denominator = denominator_of(model.objective, batch)
        parts = [batch.of(micro, None) for micro in range(MICRO_BATCHES)]
        if loss.is_whole:
            parts = [batch.rows()]
        total = torch.zeros(())
        for ids, labels in parts:
            part = model(ids, labels, denominator)
            part.backward()
            total = total + part.detach()
        steps.append({"loss": total, "gradients": gradients_of(model)})
    return steps


def shares(objective: lossmith.Objective, rank: int) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """What a rank is given in every step: ids, labels and denominator of its micro-batches."""
    for batch in batches():
        denominator = denominator_of(objective, batch)
        yield [(*batch.of(micro, rank), denominator) for micro in range(MICRO_BATCHES)]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """The gradients by name, whole and on their own, which are dropped in the model."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            found[name] = whole(gradient).detach().clone()
            parameter.grad = None
    return found


def whole(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value
