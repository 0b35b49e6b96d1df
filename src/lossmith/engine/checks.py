"""What the engine expects of its inputs, said in the user's words before any work is done."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lossmith.engine.tokens import native_targets

WHOLE_NUMBERS = frozenset(
    (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)
)


def check_whole(name: str, ids: Tensor, what: str = "class ids", hint: str = "") -> None:
    """Ids are integers, of any dtype.

    Args:
        name: what the user calls them.
        ids: what came.
        what: what they are.
        hint: what to do if they are no integers.

    Raises:
        TypeError: they are no tensor of integers.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor of {what}; got {type(ids).__name__}")
    if ids.dtype not in WHOLE_NUMBERS:
        raise TypeError(f"{name} must be integer {what}; got {ids.dtype}{hint}")


def check_targets(targets: Tensor) -> None:
    """Targets are integers; see :func:`check_whole`."""
    hint = ". Probabilities as targets are not supported: pass ids, and label_smoothing for soft ones"
    check_whole("targets", targets, hint=hint)


def refuse_transforms(**inputs: Tensor | None) -> None:
    """
    Raises:
        RuntimeError: forward-mode differentiation is on, or an input is inside a transform of torch.func.
    """
    if torch.compiler.is_compiling():
        return
    is_forward_mode = forward_ad._current_level >= 0
    for name, given in inputs.items():
        if not isinstance(given, Tensor):
            continue
        instead = "use backward() or torch.autograd.grad, or torch.nn.functional.cross_entropy"
        if is_forward_mode and forward_ad.unpack_dual(given).tangent is not None:
            raise RuntimeError(f"lossmith's losses have no forward-mode derivative (jvp, jacfwd); {instead}")
        if _is_wrapped(given):
            raise RuntimeError(
                f"lossmith's losses cannot be transformed by torch.func (grad, vjp, vmap, jacrev), which "
                f"{name} come from; {instead}"
            )


def refuse_batched(*gradients: Tensor | None) -> None:
    """
    Raises:
        RuntimeError: the upstream gradients are many at once.
    """
    if torch.compiler.is_compiling():
        return
    for given in gradients:
        if given is not None and (torch._C._dispatch_keys(given).has(_BATCHED) or _is_wrapped(given)):
            raise RuntimeError(
                "lossmith's losses take one upstream gradient at a time, not a batch of them "
                "(is_grads_batched=True, jacobian(vectorize=True)); call torch.autograd.grad once for each"
            )


# What autograd.grad(is_grads_batched=True) makes of upstream gradients has no other mark.
_BATCHED = torch._C._dispatch_key_parse("Batched")  # pyright: ignore[reportAttributeAccessIssue]
# Whether a transform of torch.func has a tensor in its hands.
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]


def check_logits(logits: Tensor, targets: Tensor) -> None:
    """Logits [..., V] and targets [...] belong together.

    Raises:
        TypeError: logits are not a floating-point tensor, or targets not an integer one.
        ValueError: the shapes do not match, there is no class, or there is no token.
    """
    refuse_transforms(logits=logits, targets=targets)
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor [..., V]; got {type(logits).__name__}")
    check_targets(targets)
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point; got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V >= 1; got {list(logits.shape)}")
    if logits.shape[:-1] != targets.shape:
        raise ValueError(_shape_message(logits, targets))
    if targets.numel() == 0:
        raise ValueError(_empty_message("logits", logits))
    if logits.device != targets.device:
        raise ValueError(f"logits are on {logits.device} but targets on {targets.device}; move one of them")


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, is_autocast: Callable[[], bool]
) -> None:
    """Hidden states [..., D], a weight [V, D] and a bias [V] belong together.

    Raises:
        TypeError: one of them is no floating-point tensor, or they are of different dtypes.
        ValueError: shapes or devices do not match, or the weight is one rank's part.
    """
    given = {"hidden": hidden, "weight": weight, "bias": bias}
    refuse_transforms(**given)
    tensors = {name: value for name, value in given.items() if value is not None or name != "bias"}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            hint = ". Of the states of all layers pass the last" if isinstance(value, tuple | list) else ""
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}{hint}")
        if not value.is_floating_point():
            hint = ". A quantised head has no other weight; pass its logits" if name == "weight" else ""
            raise TypeError(f"{name} must be floating point; got {value.dtype}{hint}")
        if hasattr(value, "full_tensor"):
            raise ValueError(
                f"{name} is a DTensor, of which this rank may have a part. Compute the loss inside the "
                "forward of the module that fully_shard wraps, where the weight is whole; if fully_shard "
                "was given the head by itself, call head.unshard() there first. Under tensor parallelism "
                "pass hidden states that are a DTensor of its mesh, too"
            )
        if value.device != hidden.device:
            raise ValueError(f"hidden is on {hidden.device} but {name} on {value.device}; move one of them")
        if value.dtype != hidden.dtype and not is_autocast():
            raise TypeError(
                f"hidden is {hidden.dtype} but {name} is {value.dtype}; convert one of them, or use "
                "torch.autocast"
            )
    if weight.dim() != 2 or weight.numel() == 0:
        hint = ""
        if hasattr(weight, "ds_id"):
            hint = (
                ". ZeRO-3 has it whole only inside the forward of the model that deepspeed.initialize was "
                "given; compute the loss there"
            )
        raise ValueError(f"weight must be [V, D] with V >= 1; got {list(weight.shape)}{hint}")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        size = hidden.shape[-1] if hidden.dim() else None
        hint = "pass weight.t()" if size == weight.shape[0] else "pass weight as [V, D]"
        raise ValueError(f"hidden has D={size} but weight is {list(weight.shape)} = [V, D]; {hint}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}]; got {list(bias.shape)}")


def check_targets_of_hidden(hidden: Tensor, targets: Tensor) -> None:
    """Hidden states [..., D] and targets [...] belong together.

    Raises:
        TypeError: the targets are no class ids.
        ValueError: the shapes do not match, or there is no token.
    """
    refuse_transforms(targets=targets)
    check_targets(targets)
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"expected targets of shape {list(hidden.shape[:-1])} for hidden {list(hidden.shape)} = "
            f"[..., D]; got {list(targets.shape)}"
        )
    if targets.numel() == 0:
        raise ValueError(_empty_message("hidden", hidden))
    if hidden.device != targets.device:
        raise ValueError(f"hidden is on {hidden.device} but targets on {targets.device}; move one of them")


def whole_candidates(candidates: Tensor, targets: Tensor, of: str = "") -> Tensor:
    """Candidate ids [..., K] of the targets [...], -1 as padding, as int64.

    Args:
        of: whose they are, in words, if they are not the caller's own.

    Raises:
        TypeError: the ids are not integers.
        ValueError: the shape or the device does not match.
    """
    name = f"candidates{of}"
    check_whole(name, candidates)
    if candidates.dim() != targets.dim() + 1 or candidates.shape[:-1] != targets.shape:
        raise ValueError(
            f"{name} must be [..., K] ids for targets {list(targets.shape)}; got "
            f"{list(candidates.shape)}. Pad with -1 where a position has fewer than K"
        )
    if candidates.device != targets.device:
        raise ValueError(
            f"{name} are on {candidates.device} but targets on {targets.device}; move one of them"
        )
    return candidates.long()


def _empty_message(name: str, given: Tensor) -> str:
    return (
        f"got an empty batch: {name} {list(given.shape)} hold no token. Skip it, or pass tokens whose "
        "targets are ignore_index, which give a loss of 0"
    )


def _shape_message(logits: Tensor, targets: Tensor) -> str:
    said = (
        f"expected targets of shape {list(logits.shape[:-1])} for logits {list(logits.shape)} = [..., V]; "
        f"got {list(targets.shape)}"
    )
    if logits.dim() > 2 and logits.shape[:1] + logits.shape[2:] == targets.shape:
        return said + ". The classes seem to be in dimension 1; pass logits.movedim(1, -1)"
    if targets.shape == logits.shape:
        return said + ". Pass class ids, not one-hot or probabilities"
    if logits.shape[:-1].numel() == targets.numel():
        return said + ". The numbers of tokens agree; reshape one of them"
    return said


def check_ids(name: str, ids: Tensor, num_classes: int, *, exempt: int, exempt_name: str) -> None:
    """Ids are classes, or the exempt one. An accelerator answers later, so that the host need not wait.

    Raises:
        ValueError: an id is out of range; the message has the first one and its position.
    """
    if native_targets.takes(ids) and not native_targets.is_outside(ids, num_classes, exempt):
        return
    outside = _outside(ids, num_classes, exempt)
    if ids.device.type != "cpu":
        message = f"one of the {name} is outside [0, {num_classes})"
        torch._assert_async(~outside.any(), message)  # pyright: ignore[reportPrivateImportUsage]
        return
    where = outside.nonzero()
    if where.shape[0]:
        position = tuple(int(i) for i in where[0])
        raise ValueError(
            f"{name} must be class ids in [0, {num_classes}) or {exempt_name}; got {int(ids[position])} at "
            f"position {position}. Set positions that have none to {exempt}, and check that the logits' last "
            "dimension is the vocabulary"
        )


def check_ids_again(name: str, ids: Tensor, num_classes: int, *, exempt: int) -> None:
    """Ids that :func:`check_ids` has seen are still in range; on a CPU, where others may share their memory.

    Raises:
        RuntimeError: one is out of range now.
    """
    if ids.device.type == "cpu":
        bad = ids[_outside(ids, num_classes, exempt)]
        if bad.shape[0]:
            raise written_over(name, int(bad[0]))


def written_over(name: str, found: int) -> RuntimeError:
    """What to say of ids that were right when the loss was computed, and are not on the way back."""
    return RuntimeError(
        f"the {name} were written over after the loss was computed: one of them is {found} now. Memory "
        "that is shared with NumPy (torch.from_numpy, .numpy()) changes unseen; leave it alone until "
        "backward() is done, or pass a copy, as in targets.clone()"
    )


def _outside(ids: Tensor, num_classes: int, exempt: int) -> Tensor:
    return ((ids < 0) | (ids >= num_classes)) & (ids != exempt)
