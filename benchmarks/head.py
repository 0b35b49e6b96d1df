"""Losses over a linear head, hidden @ weight.T, against the three matrix products alone and against peers.

    python benchmarks/head.py [--rounds 7] [--shape N,D,V] [--dtype float32] [--csv FILE]

"All" is label smoothing + z-loss + focal loss + confidence penalty + n-gram penalty, the same loss
however it is computed. cut-cross-entropy takes part where it is installed. Memory is what a step takes
besides its inputs and their gradients.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import lossmith
from harness import Step, against_first, machine, write_csv
from lossmith.equation.batch import align
from lossmith.terms.candidates import ngram_candidates

LENGTH = 256
SHAPES = ("2048,512,32000", "1024,512,50257", "4096,256,50257")
ALL = {
    "label_smoothing": 0.1,
    "z_loss": 1e-4,
    "use_focal_loss": True,
    "use_auxiliary_loss": True,
    "use_ngram_penalty": True,
}
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, input_ids: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, input_ids: Tensor) -> Tensor:
    """Every loss for itself, over the logits."""
    z = hidden @ weight.T
    loss = F.cross_entropy(z, targets, label_smoothing=0.1) + 1e-4 * z.logsumexp(-1).square().mean()
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    own = log_p.gather(1, targets[:, None]).squeeze(1)
    loss = loss + 0.2 * ((1 - own.exp()) ** 2 * -own).mean() + 0.1 * (p * log_p).sum(-1).mean()
    batch = align(targets.view(-1, LENGTH), input_ids=input_ids.view(-1, LENGTH))
    ids = ngram_candidates(batch, ngram_size=4, window=50)
    penalty = torch.where(ids >= 0, torch.log1p(-p.gather(1, ids.clamp(min=0))), 0.0)
    return loss - 0.1 * penalty.sum() / len(targets)


def f_linear_cross_entropy(chunk: int | None) -> Loss:
    from torch.nn import LinearCrossEntropyOptions

    given = {} if chunk is None else {"batch_chunk_size": chunk, "chunking_method": None}
    options = LinearCrossEntropyOptions(**given)
    return lambda hidden, weight, targets, input_ids: F.linear_cross_entropy(
        hidden, weight, targets, options=options
    )


def cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets, input_ids: linear_cross_entropy(
        hidden, weight, targets, impl="torch_compile"
    )


def ours(strategy: str) -> Loss:
    return lambda hidden, weight, targets, input_ids: lossmith.linear_cross_entropy(
        hidden, weight, targets, strategy=strategy
    )


def ours_all(strategy: str) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, input_ids: Tensor) -> Tensor:
        rows = (-1, LENGTH)
        return _unified(len(weight))(
            hidden_states=hidden.view(*rows, hidden.shape[-1]),
            lm_head_weight=weight,
            targets=targets.view(rows),
            input_ids=input_ids.view(rows),
            strategy=strategy,
        )

    return loss


@functools.cache
def _unified(num_classes: int) -> lossmith.UnifiedLoss:
    return lossmith.UnifiedLoss(num_classes, **ALL)


# Made when they are used: the peers need not be there, and compiled functions do not travel to processes.
CONTENDERS: dict[str, Callable[[], Loss]] = {
    "three matrix products": lambda: plain,  # made of the products alone below
    "F.cross_entropy(h @ W.T)": lambda: plain,
    "F.cross_entropy, compiled": lambda: torch.compile(plain),
    "F.linear_cross_entropy": lambda: f_linear_cross_entropy(None),
    "F.linear_cross_entropy, chunks of 512": lambda: f_linear_cross_entropy(512),
    "cut-cross-entropy, torch_compile": cut_cross_entropy,
    "naive, all": lambda: naive,
    "lossmith, one sweep": lambda: ours("one_sweep"),
    "lossmith, one sweep, all": lambda: ours_all("one_sweep"),
    "lossmith, two sweeps": lambda: ours("two_sweep"),
    "lossmith, two sweeps, all": lambda: ours_all("two_sweep"),
}


def make_step(name: str, shape: tuple[int, int, int], dtype: str, device: str) -> Step:
    """One forward and backward of a contender on random hidden states of a repetitive text."""
    num_tokens, size, num_classes = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, size, generator=generator).to(device, getattr(torch, dtype))
    weight = (torch.randn(num_classes, size, generator=generator) * 0.05).to(device, getattr(torch, dtype))
    text = torch.randint(20, (num_tokens + 1,), generator=generator).to(device)
    if name == "three matrix products":
        return lambda: products(hidden, weight)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = CONTENDERS[name]()

    def step() -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight, text[1:], text[:-1]).backward()

    return step


def products(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T
    return logits @ weight, logits.T @ hidden


def there() -> list[str]:
    """The contenders that are installed."""
    names = []
    for name, make in CONTENDERS.items():
        try:
            make()
            names.append(name)
        except ImportError as error:  # noqa: PERF203
            print(f"{name} is left out: {error}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", action="append", help="N,D,V")
    parser.add_argument("--dtype", action="append")
    parser.add_argument("--only", help="contenders whose name has this in it, besides the first two")
    parser.add_argument("--csv", help="also write the rows to this file")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    warnings.filterwarnings("ignore")
    print(machine(chosen.device))
    names = [name for k, name in enumerate(there()) if k < 2 or not chosen.only or chosen.only in name]
    rows = []
    for shape in chosen.shape or SHAPES:
        for dtype in chosen.dtype or ("float32", "bfloat16"):
            num_tokens, size, num_classes = map(int, shape.split(","))
            title = f"N={num_tokens}, D={size}, V={num_classes}, {dtype}"
            arguments = ((num_tokens, size, num_classes), dtype, chosen.device)
            found = against_first(
                title, names, make_step, *arguments, rounds=chosen.rounds, device=chosen.device
            )
            rows += [[shape, dtype, *row] for row in found]
    write_csv(chosen, ["shape", "dtype", "name", "ms", "x_products", "extra_mib"], rows)


if __name__ == "__main__":
    main()
