"""``warm_up``: compile what a step launches, before a CUDA graph is captured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def warm_up(loss: Callable[..., Tensor], *inputs: Any, **named: Any) -> None:
    """Run a step of a copy of a loss, forward and backward, so that every kernel of it is compiled.

    A kernel cannot be compiled while a CUDA graph is captured. Kernels depend on the dtypes and on which
    options are on, not on shapes or coefficients: call this once, with the inputs of a step, before the
    capture. Your loss, your tensors and the random state stay as they are.

    Args:
        loss: a module, which is copied with its state, or a function.
        inputs, named: what it is called with; gradients of copies of them are computed and thrown away.

    Raises:
        Whatever the loss raises.

    Example:
        >>> import torch, lossmith
        >>> criterion = lossmith.CrossEntropyLoss(z_loss=1e-4)
        >>> logits = torch.zeros(2, 3, 5, requires_grad=True)
        >>> lossmith.warm_up(criterion, logits, torch.ones(2, 3, dtype=torch.long))
        >>> logits.grad is None
        True
    """
    device_types = {given.device.type for given in _tensors((inputs, named))} - {"cpu"}
    copied = copy.deepcopy(loss) if isinstance(loss, nn.Module) else loss
    with torch.enable_grad(), _kept_random_state(device_types):
        value = copied(*tree_map(_leaf, inputs), **tree_map(_leaf, named))
        if value.requires_grad:
            value.sum().backward()
    for device_type in device_types:
        torch.get_device_module(device_type).synchronize()


def _leaf(given: Any) -> Any:
    if not isinstance(given, Tensor):
        return given
    return given.detach().requires_grad_(given.requires_grad)


def _tensors(given: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]


def _kept_random_state(device_types: set[str]) -> Any:
    return torch.random.fork_rng(device_type=next(iter(device_types), "cuda"))
