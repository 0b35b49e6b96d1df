"""The state of a loss that an engine has parted among ranks: saved whole, and loaded into the parts."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.objectives.objective import Objective

LOSS_FILE = "lossmith_loss.pt"


@contextlib.contextmanager
def whole(loss: nn.Module, model: Any, *, writes: bool = False) -> Iterator[None]:
    """Have the loss's parameters in one piece on every rank; each must enter.

    Args:
        loss, model: the loss, and the model that it is attached to, as the engine has wrapped it.
        writes: whether what they are set to inside is kept. All ranks must set the same.
    """
    parted = [parameter for parameter in loss.parameters() if hasattr(parameter, "ds_id")]
    with contextlib.ExitStack() as stack:
        if parted:
            zero = importlib.import_module("deepspeed").zero
            stack.enter_context(zero.GatheredParameters(parted, modifier_rank=0 if writes else None))
        for unit in fsdp1_units(loss, model):  # the root first, or an inner one would take itself for it
            stack.enter_context(type(unit).summon_full_params(unit, recurse=False, writeback=writes))
        yield


def fsdp1_units(loss: nn.Module, model: Any) -> list[Any]:
    """The FullyShardedDataParallel modules that hold the loss, the outermost first."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel

    units = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    return [unit for unit in units if any(module is loss for module in unit.modules())]


def is_parted(loss: nn.Module, model: Any) -> bool:
    """Whether an engine has parameters of the loss in parts. Every rank must call this."""
    if any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in loss.parameters()):
        return True
    if not fsdp1_units(loss, model):
        return False
    with whole(loss, model):  # else some ranks may see none
        return any(True for _ in loss.parameters())


def save_state(loss: Objective, model: Any, folder: str, *, writes: bool) -> None:
    """Save the loss's state as one file, if it has any. Every rank must call this; those that write do."""
    with whole(loss, model):
        state = {name: _gathered(value) for name, value in loss.state_dict().items()}
        # copied, since the parts take their places again
        state = {name: _copied(value) for name, value in state.items()} if writes else {}
    if state:
        os.makedirs(folder, exist_ok=True)  # for sharded checkpoints the Trainer has made none so far
        torch.save(state, os.path.join(folder, LOSS_FILE))


def load_state(loss: Objective, model: Any, folder: str) -> None:
    """Load what :func:`save_state` saved, on every rank.

    Raises:
        FileNotFoundError: the loss has state, and the folder none.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    path = os.path.join(folder, LOSS_FILE)
    with whole(loss, model, writes=True):
        own = loss.state_dict()
        if not own:
            return
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{folder} has no {LOSS_FILE}: {type(loss).__name__} was not trained there, and would begin "
                "anew in the middle of a run. Resume with the loss that the run had, or load the model with "
                "from_pretrained and begin a new run"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        if any(hasattr(value, "full_tensor") for value in own.values()):
            set_model_state_dict(loss, state, options=StateDictOptions(full_state_dict=True))
        else:
            loss.load_state_dict(state)


def keep_buffers(plugin: Any, loss: nn.Module, model: Any, device: torch.device) -> None:
    """Have FSDP1 ignore the modules of a loss that have buffers and no parameters: it casts buffers to the
    dtype of mixed precision, and a temperature that moves by a percent would stand still in bf16.

    Args:
        plugin: accelerate's FullyShardedDataParallelPlugin.
        loss, model: the loss, and the model that it is attached to.
        device: the one that the model is going to be on.
    """
    modules = [module for module in loss.modules() if _has_only_buffers(module)]
    for module in modules:
        module.to(device)
    given = plugin.ignored_modules
    if isinstance(given, str):  # a pattern of names
        names = [re.escape(name) for name, module in model.named_modules() if module in modules]
        plugin.ignored_modules = "|".join([given, *names])
    elif modules:
        plugin.ignored_modules = [*(given or ()), *modules]


def _has_only_buffers(module: nn.Module) -> bool:
    return any(True for _ in module.buffers()) and not any(True for _ in module.parameters())


def _gathered(value: Any) -> Any:
    """A tensor that FSDP2 has sharded, whole; every rank must call this."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
