"""Two ranks with DistributedDataParallel, micro-batches, one denominator: the whole batch's gradients."""

import pytest
import torch
from torch import Tensor, nn

import linear_case
import lossmith
from linear_case import IGNORE, D, V
from ranks import on_two_ranks

ROWS, TOKENS = 6, 8
SHARES = ([slice(0, 1), slice(1, 2)], [slice(2, 5), slice(5, 6)])  # micro-batches of each rank


class Model(nn.Module):
    """Embedding, a layer, and a head that is the embedding, with the loss inside its forward."""

    def __init__(self, strategy: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D)
        self.layer = nn.Linear(D, D)
        self.bias = nn.Parameter(torch.randn(V))
        self.strategy = strategy
        self.double()

    def forward(self, ids: Tensor, labels: Tensor, denominator: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        if self.strategy == "logits":
            logits = hidden @ self.embedding.weight.T + self.bias
            return lossmith.cross_entropy(logits, labels, shift=True, z_loss=0.1, denominator=denominator)
        return lossmith.linear_cross_entropy(
            hidden,
            self.embedding.weight,
            labels,
            bias=self.bias,
            shift=True,
            z_loss=0.1,
            denominator=denominator,
            strategy=self.strategy,
            memory_budget=3 * V * 8,
        )


def batch() -> tuple[Tensor, Tensor, Tensor]:
    labels = linear_case.targets(ROWS, TOKENS, seed=3)
    labels[2, 1:] = IGNORE
    return labels.clamp(min=0), labels, (labels[:, 1:] != IGNORE).sum()


def gradients_of(rank: int) -> dict[str, list[Tensor]]:
    found = {}
    for strategy in ("auto", "one_sweep", "two_sweep"):
        model = Model(strategy)
        parallel = nn.parallel.DistributedDataParallel(model)
        ids, labels, count = batch()
        first, second = SHARES[rank]
        with parallel.no_sync():
            (parallel(ids[first], labels[first], count) * 2).backward()  # DDP divides by the ranks
        (parallel(ids[second], labels[second], count) * 2).backward()
        found[strategy] = [p.grad for p in model.parameters()]
    return found


def test_two_ranks_have_the_gradients_of_one(tmp_path):
    found = on_two_ranks(gradients_of, tmp_path)
    model = Model("logits")
    model(*batch()).backward()
    expected = [p.grad for p in model.parameters()]
    for rank in found:
        for gradients in rank.values():
            torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("strategy", ["one_sweep", "two_sweep"])
def test_a_rank_with_nothing_to_learn_has_zeros(strategy):
    model = Model(strategy)
    ids, labels, count = batch()
    model(ids, torch.full_like(labels, IGNORE), count).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
