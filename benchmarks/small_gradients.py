"""What ``skip_small_gradients`` saves over a linear head, and what it costs in exactness.

    python benchmarks/small_gradients.py [--rounds 7] [--shape N,D,V] [--csv FILE]

No trained head is at hand, so heads are made: class v is drawn at random with probability 1/v, the rows of
the weight have a direction in common and one by frequency, a token's hidden state points to four classes with
a strength of its own, and its target is drawn from its softmax. So the model is calibrated: its mean entropy
is its loss. "Untrained" is a head of normal numbers.

Times are CPU times of one forward and backward, medians, against the same without the option: other users of
the machine change them less than they do the clock's. "Predicted" counts what is left of the three products.
Errors are those of the gradients of hidden states and weight against fp64, by norm. That of bf16 is of a
gradient of the logits that is rounded to bf16, as is the result, in products that are exact. "Below 2^-12" is
the rule of Cut Cross-Entropy, class by class in blocks of 128 tokens, without its being faster here: what it
drops, the share of the gradient that this is, and its errors.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor

import lossmith
from harness import machine, write_csv
from lossmith.engine.head.small_gradients import SmallGradients

SHAPE = "512,512,50257"
SHARES = (2**-8, 2**-6, 2**-4)
# How strongly tokens point to classes: from, to.
HEADS = {"untrained": None, "varied": (0.0, 16.0), "good": (4.0, 30.0), "sure": (16.0, 30.0)}
Case = tuple[Tensor, Tensor, Tensor]


def make(strengths: tuple[float, float] | None, shape: tuple[int, int, int]) -> Case:
    """Hidden states [N, D], weight [V, D] and targets [N]."""
    num_tokens, size, num_classes = shape
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(num_classes, size, generator=rng)
    if strengths is None:
        hidden = torch.randn(num_tokens, size, generator=rng)
        return hidden, weight * 0.02, torch.randint(num_classes, (num_tokens,), generator=rng)
    frequency = 1 / torch.arange(1, num_classes + 1)
    frequency /= frequency.sum()
    weight /= size**0.5
    weight[:, 0], weight[:, 1] = (frequency.log() + 8) / 10, 1.0
    classes = torch.multinomial(frequency, num_tokens * 4, replacement=True, generator=rng)
    mixed = weight[classes].view(num_tokens, 4, size) * torch.rand(num_tokens, 4, 1, generator=rng)
    strength = torch.empty(num_tokens, 1).uniform_(*strengths, generator=rng)
    noise = torch.randn(num_tokens, size, generator=rng) * 4 / size**0.5
    hidden = (mixed.sum(1) + noise) * strength
    hidden[:, 0], hidden[:, 1] = 8.0, 5.0
    probabilities = (hidden @ weight.t()).softmax(-1)
    return hidden, weight, torch.multinomial(probabilities, 1, generator=rng).squeeze(1)


class Exact:
    """The gradients in fp64, and how far others are off.

    Attributes:
        nll: the mean loss.
    """

    def __init__(self, case: Case) -> None:
        self.hidden, self.weight, targets = (of.double() if of.is_floating_point() else of for of in case)
        logits = self.hidden @ self.weight.t()
        self.nll = torch.nn.functional.cross_entropy(logits, targets).item()
        self.logits = logits.softmax(-1)
        self.logits[torch.arange(len(targets)), targets] -= 1
        self.logits /= len(targets)
        self.products = self.of(self.logits)

    def of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of hidden states and weight, of that of the logits."""
        return logits @ self.weight, logits.t() @ self.hidden

    def errors(self, *found: Tensor) -> list[float]:
        return [
            ((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, self.products, strict=True)
        ]

    def of_bf16(self) -> list[float]:
        rounded = self.of(self.logits.bfloat16().double())
        return self.errors(*(of.bfloat16() for of in rounded))

    def dropped(self, least: float = 2.0**-12) -> tuple[float, list[float], float]:
        """What is left out where it is below ``least``, the errors of that, and its share."""
        probabilities = self.logits * len(self.logits)
        stays = torch.cat(
            [(some.abs().amax(0) >= least).expand_as(some) for some in probabilities.split(128)]
        )
        kept = self.logits * stays
        share = 1 - kept.abs().sum() / self.logits.abs().sum()
        return 1 - stays.double().mean().item(), self.errors(*self.of(kept)), share.item()


class Counted:
    """Counts what is left out while it is open."""

    def __enter__(self) -> Counted:
        self.num_parts = self.num_left_out = 0
        self._add = add = SmallGradients.add

        def counting(skipping: SmallGradients, *given: object) -> bool:
            parts, left_out = skipping.num_parts, skipping.num_left_out
            is_done = add(skipping, *given)  # type: ignore[arg-type]
            self.num_parts += skipping.num_parts - parts
            self.num_left_out += skipping.num_left_out - left_out
            return is_done

        SmallGradients.add = counting  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        SmallGradients.add = self._add  # type: ignore[method-assign]

    @property
    def share(self) -> float:
        return self.num_left_out / max(self.num_parts, 1)


def step(case: Case, share: float) -> tuple[float, Tensor, Tensor]:
    """CPU seconds and gradients of one forward and backward."""
    hidden, weight = (of.detach().requires_grad_() for of in case[:2])
    start = time.process_time()
    lossmith.linear_cross_entropy(hidden, weight, case[2], skip_small_gradients=share).backward()
    seconds = time.process_time() - start
    assert hidden.grad is not None
    assert weight.grad is not None
    return seconds, hidden.grad, weight.grad


def measure(name: str, shape: tuple[int, int, int], rounds: int) -> Iterator[list]:
    """[head, loss, rule, left out, CPU time, predicted, errors] of each share."""
    case = make(HEADS[name], shape)
    exact = Exact(case)
    shares = (0.0, *SHARES)
    left_out, errors = {}, {}
    for share in shares:
        with Counted() as counted:
            _, *found = step(case, share)
        left_out[share], errors[share] = counted.share, exact.errors(*found)
    seconds: dict[float, list[float]] = {share: [] for share in shares}
    for k in range(rounds):
        for share in shares[k % len(shares) :] + shares[: k % len(shares)]:  # none is always the first
            seconds[share].append(step(case, share)[0])
    for share in shares:
        ratio = statistics.median(
            ours / plain for ours, plain in zip(seconds[share], seconds[0.0], strict=True)
        )
        rule = f"2^{round(torch.tensor(share).log2().item())}" if share else "whole"
        yield [name, exact.nll, rule, left_out[share], ratio, 1 - 2 / 3 * left_out[share], *errors[share]]
    yield [name, exact.nll, "whole, bf16", 0.0, "", "", *exact.of_bf16()]
    share, found, mass = exact.dropped()
    yield [name, exact.nll, f"below 2^-12, a share of {mass:.2f}", share, "", 1 - 2 / 3 * share, *found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", default=SHAPE, help="N,D,V")
    parser.add_argument("--head", choices=HEADS, action="append")
    parser.add_argument("--csv", help="also write the rows to this file")
    parser.set_defaults(device="cpu")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(machine("cpu"))
    num_tokens, size, num_classes = map(int, chosen.shape.split(","))
    rows = []
    for name in chosen.head or HEADS:
        for row in measure(name, (num_tokens, size, num_classes), chosen.rounds):
            if row[2] == "whole":
                print(f"\n{name}, loss {row[1]:.2f}; {num_tokens} x {size} x {num_classes}, fp32")
                print(f"  {'':28}{'left out':>9}{'CPU time':>9}{'predicted':>10}{'hidden':>10}{'weight':>10}")
            times = "".join(f"{of:9.2f} " if of != "" else " " * 10 for of in row[4:6])
            print(f"  {row[2]:28}{row[3]:9.2f}{times}{row[6]:10.1e}{row[7]:10.1e}", flush=True)
            rows.append(row)
    names = ["head", "loss", "rule", "left_out", "x_time", "x_predicted", "error_hidden", "error_weight"]
    write_csv(chosen, names, rows)


if __name__ == "__main__":
    main()
