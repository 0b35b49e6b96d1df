"""DTensors as predictions: logits sharded by class, or a head's weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lossmith.engine.head.linear_head import LinearHead
from lossmith.engine.predictions import Logits, Predictions
from lossmith.engine.shards.layout import VocabShards
from lossmith.engine.shards.sharded import ShardedHead, ShardedLogits


def is_dtensor(value: Any) -> bool:
    return hasattr(value, "device_mesh") and hasattr(value, "placements")


def logits_as_predictions(logits: Tensor) -> Predictions:
    """Logits [..., V], plain or a DTensor: ``Shard(-1)`` as tensor parallelism leaves them, or replicated.

    Raises:
        ValueError: a DTensor in another layout.
    """
    if not is_dtensor(logits):
        return Logits(logits)
    shards = _shards("logits", logits, dim=logits.dim() - 1)
    local: Tensor = logits.to_local()  # pyright: ignore[reportAttributeAccessIssue]
    return Logits(local) if shards is None else ShardedLogits(local, shards)


def head_as_predictions(hidden: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Predictions:
    """A linear head: plain, or with DTensors for its weight, ``Shard(0)`` as tensor parallelism leaves an
    unembedding, and for the hidden states, in any layout on the same mesh.

    Plain hidden states do not say whether they are the same on every rank. Those beside a weight that FSDP
    has split are not, so a DTensor for the weight alone is refused.

    Raises:
        ValueError: a DTensor for the weight alone, DTensors of two meshes, or in another layout.
    """
    if not is_dtensor(weight) or not is_dtensor(hidden):
        # by name: torch.compile before PyTorch 2.13 takes the first for the first of all fields
        return LinearHead(hidden=hidden, weight=weight, bias=bias, **options)
    if hidden.device_mesh != weight.device_mesh:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError("hidden states and the head's weight are on two meshes; redistribute one of them")
    shards = _shards("the head's weight", weight, dim=0)
    plain = _whole(hidden), _local(weight)
    bias = None if bias is None else _local(bias)
    if shards is None:
        return LinearHead(*plain, bias, **options)
    return ShardedHead(*plain, shards, bias, **options)


def _local(value: Tensor) -> Tensor:
    return value.to_local() if is_dtensor(value) else value  # pyright: ignore[reportAttributeAccessIssue]


def _whole(value: Any) -> Tensor:
    """The same on every rank of the mesh; its gradients there are alike, too."""
    from torch.distributed.tensor import Replicate

    everywhere = [Replicate()] * value.device_mesh.ndim
    return value.redistribute(placements=everywhere).to_local(grad_placements=everywhere)


def _shards(name: str, value: Any, dim: int) -> VocabShards | None:
    """The shards of a DTensor that is split in one dimension over one dimension of its mesh; None where every
    rank has it all.

    Raises:
        ValueError: another layout.
    """
    split = [at for at, placement in enumerate(value.placements) if not placement.is_replicate()]
    if not split:
        return None
    (at, *others) = split
    placement = value.placements[at]
    if others or not placement.is_shard() or placement.dim % value.dim() != dim:
        raise ValueError(
            f"{name} must be sharded by class, Shard({dim}) over one dimension of the mesh, or replicated; "
            f"got {tuple(value.placements)}. Redistribute it first, or pass full_tensor()"
        )
    return VocabShards.even(value.shape[dim], value.device_mesh.get_group(at))
