"""The three products of a chunk of a linear head, compiled, against the same by PyTorch.

    python benchmarks/products.py [--rounds 15] [--threads 2] [--csv FILE]

PyTorch makes those of bf16 factors with an fp32 result by widening the factors first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness import Step, options, time_interleaved, write_csv
from lossmith.engine.head import native_products, products

SHAPES = ((410, 512, 32000), (262, 256, 50257), (1024, 128, 2048))  # tokens of a chunk, D, V


def make_steps(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Step]:
    """Each product twice: "logits", "hidden" (the gradient of the hidden states), "weight"."""
    num_tokens, size, num_classes = shape
    hidden, weight = torch.randn(num_tokens, size).to(dtype), torch.randn(num_classes, size).to(dtype)
    logits, gradient = torch.empty(num_tokens, num_classes), torch.randn(num_tokens, num_classes).to(dtype)
    d_hidden, d_weight = torch.empty(num_tokens, size), torch.zeros(num_classes, size)
    three: dict[str, tuple[Tensor, Tensor, Tensor, bool]] = {
        "logits": (hidden, weight.t(), logits, False),
        "hidden": (gradient, weight, d_hidden, False),
        "weight": (gradient.t(), hidden, d_weight, True),
    }
    steps = {}
    for name, (a, b, into, is_sum) in three.items():
        steps[f"{name}, PyTorch"] = lambda a=a, b=b, into=into, s=is_sum: products.in_pieces(a, b, into, s)
        steps[f"{name}, compiled"] = lambda a=a, b=b, into=into, s=is_sum: native_products.product(
            a, b, into=into, is_sum=s
        )
    return steps


def main() -> None:
    chosen = options(__doc__.splitlines()[0])
    if not native_products.is_for(both_are_bf16=False):
        raise SystemExit("nothing to compare: this machine has no use for compiled products")
    rows = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            seconds = time_interleaved(make_steps(shape, dtype), rounds=chosen.rounds, device="cpu")
            num_flops = 2 * shape[0] * shape[1] * shape[2]
            print(f"\n{' x '.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}: GFLOP/s")
            for name in ("logits", "hidden", "weight"):
                theirs, ours = (seconds[f"{name}, {who}"] for who in ("PyTorch", "compiled"))
                speeds = [num_flops / time / 1e9 for time in (theirs, ours)]
                print(f"  {name:8}{speeds[0]:8.0f}{speeds[1]:8.0f}   x {theirs / ours:.2f}")
                rows.append(["x".join(map(str, shape)), dtype, name, *speeds, theirs / ours])
    write_csv(chosen, ["shape", "dtype", "product", "pytorch_gflops", "compiled_gflops", "speedup"], rows)


if __name__ == "__main__":
    main()
